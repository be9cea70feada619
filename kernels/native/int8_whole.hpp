// Weights of eight bits by rows of bfloat16 that have become whole numbers. Included by linear.cpp.
//
// A row becomes integers of 16 bits with one scale: beside the rounding of a result to bfloat16 that is
// exact. Sums of products are exact as well, whatever their order, as far as they fit an integer of 32 bits. A row
// that has no such scale, or is too long, is computed like a float32 one.

// Rows of two bytes for every input, in the layout of a path.
struct WholeRows {
    std::vector<uint8_t> bytes;
    std::vector<float> scales;
    std::vector<float> floats;  // of rows without a scale
};

using WholeRowsOf = void (*)(const Weights&, const uint16_t* x, size_t rows, WholeRows& into);

#if OUTRIDER_X86
constexpr size_t MOST_INPUTS = 1u << 16;  // sums of as many products of bytes fit an integer of 32 bits
constexpr float NO_SCALE = -1.0f;

// Numbers of a row, scaled, as a path lays them out behind `into`; there are zeros there.
using Split = void (*)(const uint16_t* from, float factor, size_t ins, size_t padded, uint8_t* into);

template <Split SPLIT>
INLINE void lay_out_whole(const Weights& w, const uint16_t* x, size_t rows, WholeRows& into) {
    into.bytes.assign(2 * w.padded * rows, 0);
    into.scales.resize(rows);
    for (size_t r = 0; r < rows; r++, x += w.ins) {
        uint16_t most = 0;  // as bits, magnitudes are in the order of their numbers, and NaN is above them all
        for (size_t k = 0; k < w.ins; k++) most = std::max<uint16_t>(most, x[k] & 0x7fff);
        const float largest = to_float(most);
        if (w.padded <= MOST_INPUTS && (!most || (largest >= 1e-30f && largest <= 1e30f))) {
            into.scales[r] = largest / 32767.0f;
            SPLIT(x, most ? 32767.0f / largest : 0.0f, w.ins, w.padded, into.bytes.data() + 2 * w.padded * r);
        } else {
            into.scales[r] = NO_SCALE;
            into.floats.resize(w.padded * rows);
            float* floats = into.floats.data() + w.padded * r;
            for (size_t k = 0; k < w.padded; k++) floats[k] = k < w.ins ? to_float(x[k]) : 0.0f;
        }
    }
}

template <size_t MOST, const Block (&BLOCKS)[MOST], Block FLOATS>
static void by_whole_rows(const Job& job, size_t first, size_t last) {
    by_blocks<MOST, BLOCKS>(job, first, last);
    Job floats = job;
    floats.x = job.floats;
    floats.stride = job.weights->padded;
    for (size_t r = 0; r < job.rows; r++)
        if (job.row_scales[r] == NO_SCALE)
            for (size_t g = first; g < last; g++) FLOATS(floats, {g, r, 0, 1});
}

// ---- AVX2: two products of 16 bits per lane ---------------------------------------------------
//
// In the order in which avx2.hpp multiplies them: of four the first, the third, the second, the fourth.

// Four numbers of 32 bits, 0 to 3, and four more; saturated to 16 bits, in the order above.
INLINE AVX2 __m256i pack_evens_first(__m256i first, __m256i second) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(packed, 0xd8), 0xd8);
}

INLINE AVX2 __m256i scaled(const uint16_t* eight, __m256 factor) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(eight));
    const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    return _mm256_cvtps_epi32(_mm256_mul_ps(x, factor));
}

AVX2 static void split_pairs(const uint16_t* from, float factor, size_t ins, size_t, uint8_t* bytes) {
    size_t k = 0;
    for (; k + 16 <= ins; k += 16) {
        const __m256 factors = _mm256_set1_ps(factor);
        const __m256i sixteen = pack_evens_first(scaled(from + k, factors), scaled(from + k + 8, factors));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 2 * k), sixteen);
    }
    for (; k < ins; k++) {
        const size_t place = k / QUAD * QUAD + k % 2 * 2 + k % QUAD / 2;
        const int16_t whole = static_cast<int16_t>(std::lrint(to_float(from[k]) * factor));
        std::memcpy(bytes + 2 * place, &whole, 2);
    }
}

AVX2 static void to_pairs(const Weights& w, const uint16_t* x, size_t rows, WholeRows& into) {
    lay_out_whole<split_pairs>(w, x, rows, into);
}

// ---- AVX512-VNNI: four products of bytes per lane ---------------------------------------------
//
// Upper and lower bytes are multiplied apart, both without a sign, so that an integer is
// 256 (upper - 128) + lower. Of a row four upper bytes lie before the four lower ones.

#define AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))

AVX512 static void split_bytes(const uint16_t* from, float factor, size_t ins, size_t, uint8_t* bytes) {
    size_t k = 0;
    for (; k + 16 <= ins; k += 16) {
        __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
        __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16));
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(factor)));
        __m128i upper = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_srai_epi32(whole, 8), _mm512_set1_epi32(128)));
        __m128i lower = _mm512_cvtepi32_epi8(whole);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * k), _mm_unpacklo_epi32(upper, lower));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * k + 16), _mm_unpackhi_epi32(upper, lower));
    }
    for (; k < ins; k++) {
        const long whole = std::lrint(to_float(from[k]) * factor);
        uint8_t* at = bytes + 2 * (k / QUAD * QUAD) + k % QUAD;
        at[0] = static_cast<uint8_t>((whole >> 8) + 128);
        at[QUAD] = static_cast<uint8_t>(whole);
    }
}

AVX512 static void to_bytes(const Weights& w, const uint16_t* x, size_t rows, WholeRows& into) {
    lay_out_whole<split_bytes>(w, x, rows, into);
}

// Of 16 outputs the sums of a row, scaled.
INLINE AVX512 __m512 scaled_sums(const Weights& w, size_t first, __m512i upper, __m512i lower, float row_scale) {
    const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(w.sums.data() + first), 7);
    const __m512 high = _mm512_cvtepi32_ps(_mm512_sub_epi32(upper, excess));
    const __m512 whole = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(lower));
    return _mm512_mul_ps(_mm512_mul_ps(whole, _mm512_set1_ps(row_scale)), _mm512_loadu_ps(w.scales.data() + first));
}

template <size_t R>
AVX512_VNNI static void vnni_block(const Job& job, const Pass& pass) {
    const Weights& weights = *job.weights;
    const char *w = weights.group(pass.group), *end = w + weights.group_bytes();
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + pass.row * job.stride;
    const size_t stride = job.stride;
    Lookahead ahead(weights, pass, ahead_of<R>);
    __m512i upper[R][2], lower[R][2];
#pragma GCC unroll 6
    for (size_t r = 0; r < R; r++) upper[r][0] = upper[r][1] = lower[r][0] = lower[r][1] = _mm512_setzero_si512();
    for (; w != end; w += QUAD * WIDTH, x += 2 * QUAD) {
        ahead.step();
        __m512i left = _mm512_load_si512(w), right = _mm512_load_si512(w + 64);
#pragma GCC unroll 6
        for (size_t r = 0; r < R; r++) {
            int of_upper, of_lower;
            std::memcpy(&of_upper, x + r * stride, 4);
            std::memcpy(&of_lower, x + r * stride + QUAD, 4);
            __m512i high = _mm512_set1_epi32(of_upper), low = _mm512_set1_epi32(of_lower);
            upper[r][0] = _mm512_dpbusd_epi32(upper[r][0], high, left);
            upper[r][1] = _mm512_dpbusd_epi32(upper[r][1], high, right);
            lower[r][0] = _mm512_dpbusd_epi32(lower[r][0], low, left);
            lower[r][1] = _mm512_dpbusd_epi32(lower[r][1], low, right);
        }
    }
    alignas(64) float sums[R * WIDTH];
    const size_t first = pass.group * WIDTH;
#pragma GCC unroll 6
    for (size_t r = 0; r < R; r++) {
        // They come from registers: otherwise compilers store them in the loop above, each time.
        asm("" : "+v"(upper[r][0]), "+v"(upper[r][1]), "+v"(lower[r][0]), "+v"(lower[r][1]));
        const float scale = job.row_scales[pass.row + r];
        _mm512_store_ps(sums + r * WIDTH, scaled_sums(weights, first, upper[r][0], lower[r][0], scale));
        _mm512_store_ps(sums + r * WIDTH + 16, scaled_sums(weights, first + 16, upper[r][1], lower[r][1], scale));
    }
    store<uint16_t>(job, pass.group, pass.row, R, sums);
}

constexpr Block BY_VNNI[] = {vnni_block<1>, vnni_block<2>, vnni_block<3>, vnni_block<4>, vnni_block<5>, vnni_block<6>};
#endif
