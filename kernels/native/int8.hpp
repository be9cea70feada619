// Blocks for weights of eight bits with a scale per output. Included by linear.cpp.
//
// A weight is widened in a register, exactly, and multiplied like a float32 one: rows are not quantised,
// and a sum takes its products in the order of the inputs. The scale comes once, at its end. T is the
// type of the rows' results; x is float32. How AVX512-VNNI does it, see below.

template <class T>
INLINE void store_scaled(const Job& job, const Pass& pass, size_t rows, float* sums, const float* lost) {
    recover(sums, lost, rows * WIDTH);
    const float* scales = job.weights->scales.data() + pass.group * WIDTH;
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < WIDTH; j++) sums[r * WIDTH + j] *= scales[j];
    store<T>(job, pass.group, pass.row, rows, sums);
}

INLINE void multiply(const int8_t* w, const float* x, float* sums) {
    for (size_t i = 0; i < QUAD; i++)
        for (size_t j = 0; j < WIDTH; j++) sums[j] += static_cast<float>(w[j * QUAD + i]) * x[i];
}

template <class T, size_t R>
static void portable_int8_block(const Job& job, const Pass& pass) {
    const int8_t* w = reinterpret_cast<const int8_t*>(job.weights->group(pass.group));
    const float* x = static_cast<const float*>(job.x) + pass.row * job.stride;
    float sums[R * WIDTH] = {}, lost[R * WIDTH] = {};
    for (size_t start = 0; start < job.weights->padded; start += CHUNK<T>) {
        float chunk[R * WIDTH] = {};
        size_t end = std::min(start + CHUNK<T>, job.weights->padded);
        for (size_t k = start; k < end; k += QUAD)
            for (size_t r = 0; r < R; r++) multiply(w + k * WIDTH, x + r * job.stride + k, chunk + r * WIDTH);
        join<T>(sums, lost, chunk, R * WIDTH);
    }
    store_scaled<T>(job, pass, R, sums, lost);
}

template <class T>
constexpr Block PORTABLE_INT8[] = {portable_int8_block<T, 1>, portable_int8_block<T, 2>, portable_int8_block<T, 3>,
                                   portable_int8_block<T, 4>};

#if OUTRIDER_X86
// Of 8 or 16 outputs' four weights the i-th ones.
INLINE AVX2 __m256 eight_weights(const int8_t* w, size_t i) {
    __m256i fours = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    __m256i left = _mm256_sll_epi32(fours, _mm_cvtsi32_si128(static_cast<int>(24 - 8 * i)));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(left, 24));
}

template <class T, size_t R>
AVX2 static void avx2_int8_block(const Job& job, const Pass& pass) {
    const int8_t* w = reinterpret_cast<const int8_t*>(job.weights->group(pass.group));
    const float* x = static_cast<const float*>(job.x) + pass.row * job.stride;
    alignas(32) float sums[R * WIDTH] = {}, lost[R * WIDTH] = {}, of_chunk[R * WIDTH];
    Lookahead ahead(*job.weights, pass);
    for (size_t start = 0; start < job.weights->padded; start += CHUNK<T>) {
        __m256 chunk[R][4];
        for (auto& of_row : chunk)
            for (auto& part : of_row) part = _mm256_setzero_ps();
        size_t end = std::min(start + CHUNK<T>, job.weights->padded);
        for (size_t quad = start; quad < end; quad += QUAD) {
            ahead.step();
#pragma GCC unroll 4
            for (size_t k = 0; k < QUAD; k++)
#pragma GCC unroll 4
                for (size_t i = 0; i < 4; i++) {
                    __m256 weights = eight_weights(w + quad * WIDTH + i * 8 * QUAD, k);
#pragma GCC unroll 4
                    for (size_t r = 0; r < R; r++) {
                        __m256 value = _mm256_set1_ps(x[r * job.stride + quad + k]);
                        chunk[r][i] = _mm256_fmadd_ps(weights, value, chunk[r][i]);
                    }
                }
        }
        for (size_t r = 0; r < R; r++)
            for (size_t i = 0; i < 4; i++) _mm256_store_ps(of_chunk + r * WIDTH + i * 8, chunk[r][i]);
        join<T>(sums, lost, of_chunk, R * WIDTH);
    }
    store_scaled<T>(job, pass, R, sums, lost);
}

template <class T>
constexpr Block INT8_BY_AVX2[] = {avx2_int8_block<T, 1>, avx2_int8_block<T, 2>, avx2_int8_block<T, 3>};

INLINE AVX512 __m512 sixteen_weights(const int8_t* w, size_t i) {
    __m512i left = _mm512_sll_epi32(_mm512_load_si512(w), _mm_cvtsi32_si128(static_cast<int>(24 - 8 * i)));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(left, 24));
}

template <class T, size_t R>
AVX512 static void avx512_int8_block(const Job& job, const Pass& pass) {
    const int8_t* w = reinterpret_cast<const int8_t*>(job.weights->group(pass.group));
    const float* x = static_cast<const float*>(job.x) + pass.row * job.stride;
    alignas(64) float sums[R * WIDTH] = {}, lost[R * WIDTH] = {};
    Lookahead ahead(*job.weights, pass);
    for (size_t start = 0; start < job.weights->padded; start += CHUNK<T>) {
        __m512 chunk[R][2];
#pragma GCC unroll 12
        for (size_t r = 0; r < R; r++) chunk[r][0] = chunk[r][1] = _mm512_setzero_ps();
        size_t end = std::min(start + CHUNK<T>, job.weights->padded);
        for (size_t quad = start; quad < end; quad += QUAD) {
            ahead.step();
#pragma GCC unroll 4
            for (size_t k = 0; k < QUAD; k++) {
                const int8_t* fours = w + quad * WIDTH;
                __m512 left = sixteen_weights(fours, k), right = sixteen_weights(fours + 16 * QUAD, k);
#pragma GCC unroll 12
                for (size_t r = 0; r < R; r++) {
                    __m512 value = _mm512_set1_ps(x[r * job.stride + quad + k]);
                    chunk[r][0] = _mm512_fmadd_ps(left, value, chunk[r][0]);
                    chunk[r][1] = _mm512_fmadd_ps(right, value, chunk[r][1]);
                }
            }
        }
#pragma GCC unroll 12
        for (size_t r = 0; r < R; r++) {
            join_sixteen<T>(sums + r * WIDTH, lost + r * WIDTH, chunk[r][0]);
            join_sixteen<T>(sums + r * WIDTH + 16, lost + r * WIDTH + 16, chunk[r][1]);
        }
    }
    store_scaled<T>(job, pass, R, sums, lost);
}

#define AVX512_INT8_BLOCK(R) avx512_int8_block<T, R>
template <class T>
constexpr Block INT8_BY_AVX512[] = TWELVE(AVX512_INT8_BLOCK);

// ---- AVX512-VNNI: four products of bytes per lane ---------------------------------------------
//
// A row becomes integers of 16 bits with one scale: beside the rounding of a result to bfloat16 that is
// exact. Their upper and lower bytes are multiplied apart, both without a sign, so that an integer is
// 256 (upper - 128) + lower; sums are exact, whatever their order. A row that has no such scale, or is
// too long for exact sums, is computed like a float32 one.

#define AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))

constexpr size_t MOST_INPUTS = 1u << 16;  // sums of as many products of bytes fit an integer of 32 bits
constexpr float NO_SCALE = -1.0f;

// Row r: its upper bytes, then its lower ones.
struct Bytes {
    std::vector<uint8_t> bytes;
    std::vector<float> scales;
    std::vector<float> floats;  // of rows without a scale
};

AVX512 static void split(const uint16_t* from, float factor, size_t ins, uint8_t* upper, uint8_t* lower) {
    size_t k = 0;
    for (; k + 16 <= ins; k += 16) {
        __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
        __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16));
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(factor)));
        __m512i above = _mm512_add_epi32(_mm512_srai_epi32(whole, 8), _mm512_set1_epi32(128));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(upper + k), _mm512_cvtepi32_epi8(above));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(lower + k), _mm512_cvtepi32_epi8(whole));
    }
    for (; k < ins; k++) {
        const long whole = std::lrint(to_float(from[k]) * factor);
        upper[k] = static_cast<uint8_t>((whole >> 8) + 128);
        lower[k] = static_cast<uint8_t>(whole);
    }
}

AVX512 static void to_bytes(const Weights& w, const uint16_t* x, size_t rows, Bytes& into) {
    into.bytes.assign(2 * w.padded * rows, 0);
    into.scales.resize(rows);
    for (size_t r = 0; r < rows; r++, x += w.ins) {
        uint16_t most = 0;  // as bits, magnitudes are in the order of their numbers, and NaN is above them all
        for (size_t k = 0; k < w.ins; k++) most = std::max<uint16_t>(most, x[k] & 0x7fff);
        const float largest = to_float(most);
        if (w.padded <= MOST_INPUTS && (!most || (largest >= 1e-30f && largest <= 1e30f))) {
            into.scales[r] = largest / 32767.0f;
            uint8_t* upper = into.bytes.data() + 2 * w.padded * r;
            split(x, most ? 32767.0f / largest : 0.0f, w.ins, upper, upper + w.padded);
        } else {
            into.scales[r] = NO_SCALE;
            into.floats.resize(w.padded * rows);
            float* floats = into.floats.data() + w.padded * r;
            for (size_t k = 0; k < w.padded; k++) floats[k] = k < w.ins ? to_float(x[k]) : 0.0f;
        }
    }
}

template <size_t R>
AVX512_VNNI static void vnni_block(const Job& job, const Pass& pass) {
    const char* w = job.weights->group(pass.group);
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + pass.row * job.stride;
    const size_t padded = job.weights->padded;
    Lookahead ahead(*job.weights, pass);
    __m512i upper[R][2], lower[R][2];
#pragma GCC unroll 6
    for (size_t r = 0; r < R; r++) upper[r][0] = upper[r][1] = lower[r][0] = lower[r][1] = _mm512_setzero_si512();
    for (size_t k = 0; k < padded; k += QUAD, w += QUAD * WIDTH) {
        ahead.step();
        __m512i left = _mm512_load_si512(w), right = _mm512_load_si512(w + 64);
#pragma GCC unroll 6
        for (size_t r = 0; r < R; r++) {
            int four[2];
            std::memcpy(four, x + r * job.stride + k, 4);
            std::memcpy(four + 1, x + r * job.stride + padded + k, 4);
            __m512i high = _mm512_set1_epi32(four[0]), low = _mm512_set1_epi32(four[1]);
            upper[r][0] = _mm512_dpbusd_epi32(upper[r][0], high, left);
            upper[r][1] = _mm512_dpbusd_epi32(upper[r][1], high, right);
            lower[r][0] = _mm512_dpbusd_epi32(lower[r][0], low, left);
            lower[r][1] = _mm512_dpbusd_epi32(lower[r][1], low, right);
        }
    }
    alignas(64) float sums[R * WIDTH];
    for (size_t side = 0; side < 2; side++) {
        const size_t first = pass.group * WIDTH + side * 16;
        const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(job.weights->sums.data() + first), 7);
        const __m512 scales = _mm512_loadu_ps(job.weights->scales.data() + first);
#pragma GCC unroll 6
        for (size_t r = 0; r < R; r++) {
            __m512 high = _mm512_cvtepi32_ps(_mm512_sub_epi32(upper[r][side], excess));
            __m512 whole = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(lower[r][side]));
            __m512 scaled = _mm512_mul_ps(whole, _mm512_set1_ps(job.row_scales[pass.row + r]));
            _mm512_store_ps(sums + r * WIDTH + side * 16, _mm512_mul_ps(scaled, scales));
        }
    }
    store<uint16_t>(job, pass.group, pass.row, R, sums);
}

constexpr Block BY_VNNI[] = {vnni_block<1>, vnni_block<2>, vnni_block<3>, vnni_block<4>, vnni_block<5>, vnni_block<6>};

static void int8_by_vnni(const Job& job, size_t first, size_t last) {
    by_blocks<6, BY_VNNI>(job, first, last);
    Job floats = job;
    floats.x = job.floats;
    floats.stride = job.weights->padded;
    for (size_t r = 0; r < job.rows; r++)
        if (job.row_scales[r] == NO_SCALE)
            for (size_t g = first; g < last; g++) avx512_int8_block<uint16_t, 1>(floats, {g, r, 0, 1});
}
#endif
