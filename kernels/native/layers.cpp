// What a decoder does between its linear layers: norms, attention over paths, SiLU; what a drafter guesses; and what a
// target draws.
//
// Every row is computed by itself, each sum in one fixed order: a row's bits depend on the row, its
// path and the instruction set alone.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "attention_job.hpp"
#include "noise.hpp"
#include "numbers.hpp"
#include "openmp.hpp"
#include "products.hpp"
#include "tiles.hpp"

namespace outrider {

constexpr size_t THREAD_PRODUCTS = 1u << 17;  // that are worth waking a thread for
constexpr size_t THREAD_TOKENS = 1u << 15;    // the same
constexpr size_t ROWS = 16;                   // that go through keys together
constexpr size_t KEYS = 64;                   // of a block that all of them go through before the next

// Begins with a line of the cache, for vectors that lie in two take twice the time.
template <class T>
struct InLines {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};

    InLines() = default;
    template <class Other>
    InLines(const InLines<Other>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, LINE); }
    bool operator==(const InLines&) const { return true; }
    bool operator!=(const InLines&) const { return false; }
};

template <class T>
using Lines = std::vector<T, InLines<T>>;

// T: of keys and values.
template <class T>
struct Buffers {
    std::vector<const T*> keys;
    std::vector<const float*> each_query;
    Lines<float> queries, turned, scores, sums, totals, values;
};

// Vectors of so many floats, for the kernels of one instruction set.
#define VECTORS(count)                                                                     \
    constexpr size_t LANES = count;                                                        \
    typedef float Vec __attribute__((vector_size(4 * count), aligned(4)));                 \
    typedef int32_t Ints __attribute__((vector_size(4 * count), aligned(4)));              \
    typedef uint16_t Halves __attribute__((vector_size(2 * count), aligned(2)));

namespace portable {

VECTORS(8)

INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }

// Loaded once: a compiler would rather load it again for every product.
INLINE Vec in_register(Vec x) { return x; }

INLINE Ints widen(Halves x) { return __builtin_convertvector(x, Ints); }

INLINE Halves narrow(Ints x) { return __builtin_convertvector(x, Halves); }

INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// As the processors' instructions: b where one of them is not a number.
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// Of a vector's numbers, halves first.
INLINE float sum(Vec x) {
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

INLINE float largest(Vec x) {
    for (size_t i = 1; i < LANES; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}

INLINE void transpose(Vec* tile) {
    for (size_t i = 0; i < LANES; i++)
        for (size_t j = 0; j < i; j++) {
            float upper = tile[j][i];
            tile[j][i] = tile[i][j];
            tile[i][j] = upper;
        }
}

#include "vectors.hpp"
#include "pointwise.hpp"
#include "guesses.hpp"
#include "race.hpp"
#include "attention.hpp"

}  // namespace portable

#if OUTRIDER_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {

VECTORS(8)

INLINE Vec splat(float x) { return _mm256_set1_ps(x); }

INLINE Vec in_register(Vec x) {
    asm("" : "+x"(x));
    return x;
}

INLINE Ints widen(Halves x) { return (Ints)_mm256_cvtepu16_epi32((__m128i)x); }

INLINE Halves narrow(Ints x) { return __builtin_convertvector(x, Halves); }

INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }

INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }

INLINE float sum(Vec x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE float largest(Vec x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

INLINE void transpose(Vec* tile) {
    __m256 pairs[8], fours[8];
#pragma GCC unroll 4
    for (size_t i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(tile[i], tile[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(tile[i], tile[i + 1]);
    }
#pragma GCC unroll 2
    for (size_t i = 0; i < 8; i += 4) {
        fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        tile[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        tile[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

#include "vectors.hpp"
#include "pointwise.hpp"
#include "guesses.hpp"
#include "race.hpp"
#include "attention.hpp"

}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
namespace avx512 {

VECTORS(16)

INLINE Vec splat(float x) { return _mm512_set1_ps(x); }

INLINE Vec in_register(Vec x) {
    asm("" : "+v"(x));
    return x;
}

INLINE Ints widen(Halves x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)x); }

INLINE Halves narrow(Ints x) { return (Halves)_mm512_cvtepi32_epi16((__m512i)x); }

INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }

INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }

INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }

INLINE float largest(Vec x) { return _mm512_reduce_max_ps(x); }

INLINE void transpose(Vec* tile) {
    __m512 pairs[16], fours[16], eights[16];
#pragma GCC unroll 8
    for (size_t i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(tile[i], tile[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(tile[i], tile[i + 1]);
    }
    // fours[4 i + j]: of the vectors from 4 i on, the numbers j, j + 4, j + 8 and j + 12.
#pragma GCC unroll 4
    for (size_t i = 0; i < 16; i += 4) {
        fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; j++) {
        eights[j] = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
        eights[4 + j] = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
        eights[8 + j] = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
        eights[12 + j] = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; j++) {
        tile[j] = _mm512_shuffle_f32x4(eights[j], eights[8 + j], 0x88);
        tile[4 + j] = _mm512_shuffle_f32x4(eights[4 + j], eights[12 + j], 0x88);
        tile[8 + j] = _mm512_shuffle_f32x4(eights[j], eights[8 + j], 0xdd);
        tile[12 + j] = _mm512_shuffle_f32x4(eights[4 + j], eights[12 + j], 0xdd);
    }
}

#include "vectors.hpp"
#include "pointwise.hpp"
#include "guesses.hpp"
#include "race.hpp"
#include "attention.hpp"

}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
namespace avx512_bf16 {

using namespace avx512;

#include "products_by_vectors.hpp"
#include "attention_pairs.hpp"

}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if OUTRIDER_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
namespace amx {

using namespace avx512;

#include "products_by_tiles.hpp"
#include "attention_pairs.hpp"

}  // namespace amx
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif

// The kernels of one instruction set, for one type.
template <class T>
struct Kernels {
    void (*rms_norm)(T*, const T*, const T*, T*, size_t, size_t, float);
    void (*silu_mul)(const T*, T*, size_t, size_t);
    void (*guess)(const T*, size_t, const Stream&, size_t, int64_t*, double*);
    void (*place)(const Attention&, size_t, float*);
    void (*attend)(const Attention&, const float*, size_t, size_t, size_t, Buffers<T>&);
};

struct Path {
    const char* name;
    bool (*usable)();
    Kernels<uint16_t> bfloat16;
    Kernels<float> float32;
    int64_t (*race)(const float*, size_t, const Stream&, std::vector<float>&);

    template <class T>
    const Kernels<T>& kernels() const {
        if constexpr (sizeof(T) == 2)
            return bfloat16;
        else
            return float32;
    }
};

#define ALL_BUT_ATTENTION(set, T) set::rms_norm<T>, set::silu_mul<T>, set::guess<T>, set::place<T>
#define OF(set, T) {ALL_BUT_ATTENTION(set, T), set::attend<T>}
#define BY_PAIRS(set) {ALL_BUT_ATTENTION(avx512, uint16_t), set::attend}, OF(avx512, float)
static const Path PATHS[] = {
#if OUTRIDER_AMX
    {"amx", has_amx, BY_PAIRS(amx), avx512::race},
#endif
#if OUTRIDER_X86
    {"avx512_bf16", has_avx512_bf16, BY_PAIRS(avx512_bf16), avx512::race},
    {"avx512", has_avx512, OF(avx512, uint16_t), OF(avx512, float), avx512::race},
    {"avx2", has_avx2, OF(avx2, uint16_t), OF(avx2, float), avx2::race},
#endif
    {"portable", always, OF(portable, uint16_t), OF(portable, float), portable::race},
};

// All rows are placed before the first is attended to: rows of one text attend each other.
template <class T>
static void attention(const Path& path, const Attention& a, size_t threads) {
    static thread_local std::vector<float> placed;
    std::vector<float>& queries = placed;
    queries.resize(a.rows * a.heads * a.dim);
    const Kernels<T>& kernels = path.kernels<T>();
    size_t keys = 0;
    for (size_t row = 0; row < a.rows; row++) {
        kernels.place(a, row, queries.data() + row * a.heads * a.dim);
        keys += a.length(row);
    }
    threads = std::min(threads, 1 + 2 * keys * a.heads * a.dim / THREAD_PRODUCTS);
    // Head by head, so that its keys stay near while one row after the other goes through them.
    in_parts(a.rows * a.kv_heads, threads, [&](size_t first, size_t last) {
        static thread_local Buffers<T> buffers;
        for (size_t end; first < last; first = end) {
            const size_t g = first / a.rows;
            end = std::min(last, (g + 1) * a.rows);
            kernels.attend(a, queries.data(), first - g * a.rows, end - g * a.rows, g, buffers);
        }
    });
}

// The tokens of rows whose values lie behind one another, each with a stream of its own or of several rows.
static void draw(const Path& path, const float* values, size_t size, const std::vector<Stream>& streams, size_t threads,
                 int64_t* tokens) {
    threads = std::min(threads, 1 + streams.size() * size / THREAD_TOKENS);
    in_parts(streams.size(), threads, [&](size_t first, size_t last) {
        static thread_local std::vector<float> best;
        for (size_t row = first; row < last; row++)
            tokens[row] = path.race(values + row * size, size, streams[row], best);
    });
}

}  // namespace outrider

#ifndef OUTRIDER_WITHOUT_PYTHON
#include "layers_binding.hpp"
#endif
