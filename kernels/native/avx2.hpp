// Blocks for AVX2, by the kind of weights. Included by linear.cpp.
//
// Sixteen registers hold the sums of three rows for a group's outputs, or of six for one half of them after the
// other, one weight for each of sixteen outputs, and a number of a row. Compilers do not see that, and keep some sums
// in memory, which takes as long as four products for every one: so a row's step is in assembly.

#define AVX2 __attribute__((target("avx2,fma")))

// What a kind of weights is for the loop over them. A line of memory has the weights of 16 outputs for some INPUTS, of
// which each of PARTS is multiplied by itself; the other half of a group's outputs lies HALF bytes further. After
// LINES lines the next STEP begins, and where the kind JOINS, sums join a total.
struct Bfloat16ByAvx2 {
    using Result = uint16_t;
    using Number = float;
    using Sums = __m256;
    static constexpr size_t INPUTS = 2, PARTS = 2, NEXT_PART = 1;
    static constexpr size_t LINES = 16, LINE = 64, HALF = 2 * TILE, STEP = 4 * TILE;
    static constexpr bool JOINS = false;
    alignas(32) static constexpr uint32_t UPPER[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                      0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};

    static size_t stride(const Job& job) { return job.stride; }
    INLINE AVX2 __m256 eight(const char* at, size_t part) {
        __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        if (part)
            asm("vpand %1, %0, %0" : "+x"(pairs) : "m"(UPPER));  // which needs no register
        else
            pairs = _mm256_slli_epi32(pairs, 16);
        return _mm256_castsi256_ps(pairs);
    }
    template <bool FEW>
    INLINE AVX2 void multiply(__m256 left, __m256 right, const float* number, __m256& lower, __m256& upper) {
        if constexpr (FEW) {
            lower = _mm256_fmadd_ps(left, _mm256_set1_ps(*number), lower);
            upper = _mm256_fmadd_ps(right, _mm256_set1_ps(*number), upper);
            return;
        }
        __m256 a = lower, b = upper;
        asm("vbroadcastss %4, %%ymm15\n\t"
            "vfmadd231ps %%ymm15, %2, %0\n\t"
            "vfmadd231ps %%ymm15, %3, %1"
            : "+&x"(a), "+&x"(b)
            : "x"(left), "x"(right), "m"(*number)
            : "xmm15");
        lower = a, upper = b;
    }
    INLINE AVX2 void join(__m256 eight, float* sums, float*) { _mm256_store_ps(sums, eight); }
};

struct Float32ByAvx2 : Bfloat16ByAvx2 {
    using Result = float;
    static constexpr size_t INPUTS = 1, PARTS = 1;
    static constexpr size_t LINES = CHUNK<float>, LINE = 128, HALF = 64, STEP = LINES * LINE;
    static constexpr bool JOINS = true;

    INLINE AVX2 __m256 eight(const char* at, size_t) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }
    template <bool FEW>
    INLINE AVX2 void multiply(__m256 left, __m256 right, const float* number, __m256& lower, __m256& upper) {
        Bfloat16ByAvx2::multiply<true>(left, right, number, lower, upper);
    }
    INLINE AVX2 void join(__m256 eight, float* sums, float* lost) {  // as outrider::join
        const __m256 before = _mm256_load_ps(sums), sum = _mm256_add_ps(before, eight), added = _mm256_sub_ps(sum, before);
        const __m256 error = _mm256_add_ps(_mm256_sub_ps(before, _mm256_sub_ps(sum, added)), _mm256_sub_ps(eight, added));
        _mm256_store_ps(lost, _mm256_add_ps(_mm256_load_ps(lost), error));
        _mm256_store_ps(sums, sum);
    }
};

// Weights of eight bits by rows of whole numbers, see int8_whole.hpp. Of a lane's four weights the even and the odd ones
// are pairs of 16 bits, two shifts away; the numbers of a row stand in that order: 0, 2, 1, 3.
struct PairsByAvx2 {
    using Result = uint16_t;
    using Number = int16_t;
    using Sums = __m256i;
    static constexpr size_t INPUTS = QUAD, PARTS = 2, NEXT_PART = 2;
    // Products of 512 inputs, 127 by 32767 at most, add up in 32 bits.
    static constexpr size_t LINES = 512 / QUAD, LINE = 128, HALF = 64, STEP = LINES * LINE;
    static constexpr bool JOINS = true;

    static size_t stride(const Job& job) { return job.weights->padded; }
    INLINE AVX2 __m256i eight(const char* at, size_t part) {
        __m256i fours = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        return _mm256_srai_epi16(part ? fours : _mm256_slli_epi16(fours, 8), 8);
    }
    template <bool FEW>
    INLINE AVX2 void multiply(__m256i left, __m256i right, const int16_t* two, __m256i& lower, __m256i& upper) {
        if constexpr (FEW) {
            int both;
            std::memcpy(&both, two, 4);
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(left, _mm256_set1_epi32(both)));
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(right, _mm256_set1_epi32(both)));
            return;
        }
        __m256i a = lower, b = upper;
        asm("vpbroadcastd %4, %%ymm15\n\t"
            "vpmaddwd %%ymm15, %2, %%ymm14\n\t"
            "vpaddd %%ymm14, %0, %0\n\t"
            "vpmaddwd %%ymm15, %3, %%ymm14\n\t"
            "vpaddd %%ymm14, %1, %1"
            : "+&x"(a), "+&x"(b)
            : "x"(left), "x"(right), "m"(*reinterpret_cast<const char(*)[4]>(two))
            : "xmm14", "xmm15");
        lower = a, upper = b;
    }
    INLINE AVX2 void join(__m256i eight, float* sums, float*) {
        _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), _mm256_cvtepi32_ps(eight)));
    }
};

// Sums of R rows for one half of a group's outputs, or for both. sums, lost: [R][WIDTH].
template <class W, size_t R, size_t HALVES>
INLINE AVX2 void avx2_sums(const Job& job, const Pass& pass, size_t half, float* sums, float* lost) {
    constexpr bool FEW = R < 3;  // there are registers for all the compiler wants
    const char* w = job.weights->group(pass.group) + half * W::HALF;
    const size_t stride = W::stride(job), lines = job.weights->padded / W::INPUTS;
    const typename W::Number* x = static_cast<const typename W::Number*>(job.x) + pass.row * stride;
    Lookahead ahead(*job.weights, pass);
    typename W::Sums chunk[R][2 * HALVES] = {};
    for (size_t done = 0; done < lines; done += W::LINES, w += W::STEP) {
        const char* line = w;
        for (size_t left = std::min(W::LINES, lines - done); left; left--, line += W::LINE, x += W::INPUTS) {
            ahead.step();
#pragma GCC unroll 2
            for (size_t h = 0; h < HALVES; h++)
#pragma GCC unroll 2
                for (size_t part = 0; part < W::PARTS; part++) {
                    if constexpr (!FEW) asm volatile("" : "+r"(line), "+r"(x));  // nothing read before is kept
                    const auto first = W::eight(line + h * W::HALF, part), second = W::eight(line + h * W::HALF + 32, part);
#pragma GCC unroll 6
                    for (size_t r = 0; r < R; r++)
                        W::template multiply<FEW>(first, second, x + r * stride + part * W::NEXT_PART, chunk[r][2 * h],
                                    chunk[r][2 * h + 1]);
                }
        }
        if (!W::JOINS && done + W::LINES < lines) continue;
#pragma GCC unroll 6
        for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
            for (size_t i = 0; i < 2 * HALVES; i++) {
                const size_t at = r * WIDTH + half * 16 + i * 8;
                W::join(chunk[r][i], sums + at, lost + at);
                chunk[r][i] = typename W::Sums{};
            }
    }
}

template <class W, size_t R>
AVX2 static void avx2_block(const Job& job, const Pass& pass) {
    alignas(32) float sums[R * WIDTH] = {}, lost[R * WIDTH] = {};
    if constexpr (R <= 3)
        avx2_sums<W, R, 2>(job, pass, 0, sums, lost);
    else
        for (size_t half = 0; half < 2; half++) avx2_sums<W, R, 1>(job, pass.half(half), half, sums, lost);
    recover(sums, lost, R * WIDTH);
    if (job.row_scales) {
        const float* scales = job.weights->scales.data() + pass.group * WIDTH;
        for (size_t r = 0; r < R; r++)
            for (size_t j = 0; j < WIDTH; j++) sums[r * WIDTH + j] *= job.row_scales[pass.row + r] * scales[j];
    }
    store<typename W::Result>(job, pass.group, pass.row, R, sums);
}

template <class W>
constexpr Block BY_AVX2[] = {avx2_block<W, 1>, avx2_block<W, 2>, avx2_block<W, 3>,
                             avx2_block<W, 4>, avx2_block<W, 5>, avx2_block<W, 6>};

// Their sums join a total so often that more rows gain nothing.
constexpr Block FLOAT32_BY_AVX2[] = {avx2_block<Float32ByAvx2, 1>, avx2_block<Float32ByAvx2, 2>,
                                     avx2_block<Float32ByAvx2, 3>};
