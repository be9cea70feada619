// Blocks for weights of eight bits with a scale per output. Included by linear.cpp.
//
// A weight is widened in a register, exactly, and multiplied like a float32 one: rows are not quantised,
// and a sum takes its products in the order of the inputs. The scale comes once, at its end. T is the
// type of the rows' results; x is float32. For rows of bfloat16 see int8_whole.hpp.

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
#endif
