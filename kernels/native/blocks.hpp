// Blocks for bfloat16 and float32 weights, by instruction set. Included by linear.cpp.

// ---- portable: the compiler's vectors -------------------------------------------------------

INLINE void multiply(const float* w, const float* x, float* sums) {
    for (size_t j = 0; j < WIDTH; j++) sums[j] += w[j] * x[0];
}

INLINE void multiply(const uint16_t* w, const float* x, float* sums) {
    for (size_t side = 0; side < 2; side++, w += RIGHT<uint16_t>, sums += 16) {
        for (size_t j = 0; j < 16; j++) sums[j] += to_float(w[2 * j]) * x[0];
        for (size_t j = 0; j < 16; j++) sums[j] += to_float(w[2 * j + 1]) * x[1];
    }
}

template <class T, size_t R>
static void portable_block(const Job& job, const Pass& pass) {
    const T* w = reinterpret_cast<const T*>(job.weights->group(pass.group));
    const float* x = static_cast<const float*>(job.x) + pass.row * job.stride;
    float sums[R * WIDTH] = {}, lost[R * WIDTH] = {};
    for (size_t start = 0; start < job.weights->padded; start += CHUNK<T>) {
        float chunk[R * WIDTH] = {};
        size_t end = std::min(start + CHUNK<T>, job.weights->padded);
        for (size_t k = start; k < end; k += TOGETHER<T>)
            for (size_t r = 0; r < R; r++) multiply(line_of(w, k), x + r * job.stride + k, chunk + r * WIDTH);
        join<T>(sums, lost, chunk, R * WIDTH);
    }
    recover(sums, lost, R * WIDTH);
    store<T>(job, pass.group, pass.row, R, sums);
}

template <class T>
constexpr Block PORTABLE[] = {portable_block<T, 1>, portable_block<T, 2>, portable_block<T, 3>, portable_block<T, 4>};

#if OUTRIDER_X86
// ---- AVX-512 --------------------------------------------------------------------------------

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))

// See join. In registers: compilers leave more than eight rows in memory.
template <class T>
INLINE AVX512 void join_sixteen(float* total, float* lost, __m512 chunk) {
    __m512 before = _mm512_load_ps(total), sum = _mm512_add_ps(before, chunk);
    if constexpr (sizeof(T) == 4) {
        __m512 added = _mm512_sub_ps(sum, before);
        __m512 error = _mm512_add_ps(_mm512_sub_ps(before, _mm512_sub_ps(sum, added)), _mm512_sub_ps(chunk, added));
        _mm512_store_ps(lost, _mm512_add_ps(_mm512_load_ps(lost), error));
    }
    _mm512_store_ps(total, sum);
}

template <class T, size_t R>
AVX512 static void avx512_block(const Job& job, const Pass& pass) {
    const T* w = reinterpret_cast<const T*>(job.weights->group(pass.group));
    const float* x = static_cast<const float*>(job.x) + pass.row * job.stride;
    alignas(64) float sums[R * WIDTH] = {}, lost[R * WIDTH] = {};
    Lookahead ahead(*job.weights, pass);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (size_t start = 0; start < job.weights->padded; start += CHUNK<T>) {
        __m512 chunk[R][2];
#pragma GCC unroll 12
        for (size_t r = 0; r < R; r++) chunk[r][0] = chunk[r][1] = _mm512_setzero_ps();
        size_t end = std::min(start + CHUNK<T>, job.weights->padded);
        for (size_t k = start; k < end; k += TOGETHER<T>) {
            const T* line = line_of(w, k);
            ahead.step();
            if constexpr (sizeof(T) == 4) {
                __m512 left = _mm512_load_ps(line), right = _mm512_load_ps(line + RIGHT<T>);
#pragma GCC unroll 12
                for (size_t r = 0; r < R; r++) {
                    __m512 value = _mm512_set1_ps(x[r * job.stride + k]);
                    chunk[r][0] = _mm512_fmadd_ps(left, value, chunk[r][0]);
                    chunk[r][1] = _mm512_fmadd_ps(right, value, chunk[r][1]);
                }
            } else {
                __m512i left = _mm512_load_si512(line), right = _mm512_load_si512(line + RIGHT<T>);
                __m512 left_even = _mm512_castsi512_ps(_mm512_slli_epi32(left, 16));
                __m512 left_odd = _mm512_castsi512_ps(_mm512_and_si512(left, upper));
                __m512 right_even = _mm512_castsi512_ps(_mm512_slli_epi32(right, 16));
                __m512 right_odd = _mm512_castsi512_ps(_mm512_and_si512(right, upper));
#pragma GCC unroll 12
                for (size_t r = 0; r < R; r++) {
                    const float* at = x + r * job.stride + k;
                    __m512 even = _mm512_set1_ps(at[0]), odd = _mm512_set1_ps(at[1]);
                    chunk[r][0] = _mm512_fmadd_ps(left_even, even, chunk[r][0]);
                    chunk[r][1] = _mm512_fmadd_ps(right_even, even, chunk[r][1]);
                    chunk[r][0] = _mm512_fmadd_ps(left_odd, odd, chunk[r][0]);
                    chunk[r][1] = _mm512_fmadd_ps(right_odd, odd, chunk[r][1]);
                }
            }
        }
#pragma GCC unroll 12
        for (size_t r = 0; r < R; r++) {
            join_sixteen<T>(sums + r * WIDTH, lost + r * WIDTH, chunk[r][0]);
            join_sixteen<T>(sums + r * WIDTH + 16, lost + r * WIDTH + 16, chunk[r][1]);
        }
    }
    recover(sums, lost, R * WIDTH);
    store<T>(job, pass.group, pass.row, R, sums);
}

#define TWELVE(block)                                                                          \
    {                                                                                          \
        block(1), block(2), block(3), block(4), block(5), block(6), block(7), block(8), block(9), \
            block(10), block(11), block(12)                                                    \
    }

#define AVX512_BLOCK(R) avx512_block<T, R>
template <class T>
constexpr Block BY_AVX512[] = TWELVE(AVX512_BLOCK);

// ---- AVX-512 BF16: two products of bfloat16 per lane ----------------------------------------

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

template <size_t R>
AVX512_BF16 static void bf16_block(const Job& job, const Pass& pass) {
    const uint16_t* line = reinterpret_cast<const uint16_t*>(job.weights->group(pass.group));
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + pass.row * job.stride;
    const size_t stride = job.stride;
    Lookahead ahead(*job.weights, pass, ahead_of<R>);
    __m512 total[R][2];
#pragma GCC unroll 12
    for (size_t r = 0; r < R; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (size_t step = 0; step < job.weights->padded; step += STEP, line += RIGHT<uint16_t>)
        for (const uint16_t* end = line + TILE; line != end; line += 32, x += 2) {
            ahead.step();
            __m512bh left = (__m512bh)_mm512_load_si512(line);
            __m512bh right = (__m512bh)_mm512_load_si512(line + RIGHT<uint16_t>);
#pragma GCC unroll 12
            for (size_t r = 0; r < R; r++) {
                int pair;
                std::memcpy(&pair, x + r * stride, 4);
                __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
                total[r][0] = _mm512_dpbf16_ps(total[r][0], left, value);
                total[r][1] = _mm512_dpbf16_ps(total[r][1], right, value);
            }
        }
    alignas(64) float sums[R * WIDTH];
#pragma GCC unroll 12
    for (size_t r = 0; r < R; r++) {
        // They come from registers: otherwise compilers store them in the loop above, each time.
        asm("" : "+v"(total[r][0]), "+v"(total[r][1]));
        _mm512_store_ps(sums + r * WIDTH, total[r][0]);
        _mm512_store_ps(sums + r * WIDTH + 16, total[r][1]);
    }
    store<uint16_t>(job, pass.group, pass.row, R, sums);
}

#define BF16_BLOCK(R) bf16_block<R>
constexpr Block BY_BF16[] = TWELVE(BF16_BLOCK);
#endif
