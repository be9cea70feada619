// What a decoder does between its linear layers: norms, attention over paths, SiLU.
//
// Every row is computed by itself, each sum in one fixed order: a row's bits depend on the row, its
// path and the instruction set alone.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.hpp"
#include "openmp.hpp"

namespace outrider {

constexpr size_t LANES = 8;
constexpr size_t MAX_DIM = 1024;              // of a head
constexpr size_t THREAD_PRODUCTS = 1u << 18;  // that are worth waking a thread for

// One call. All arrays are dense; sizes stand in kernels/path_attention.py.
struct Attention {
    size_t rows, heads, kv_heads, dim, block;
    const void* projected;  // [rows][heads + 2 * kv_heads][dim]
    const float* turns;     // [rows][2][dim]: of queries, and of keys
    const float* norm;      // [heads + kv_heads][dim], or nothing
    float eps;
    const int64_t* slots;         // [rows], where keys and values go
    float* pool;                  // [slots][2][kv_heads][dim]
    const int64_t* tables;        // of blocks, all sequences' behind one another
    const int64_t* table_starts;  // [rows]
    const int64_t* first;         // [rows], the first position of the committed text that a row attends
    const int64_t* seen;          // [rows], the position behind the last one
    const int64_t* nodes;         // slots of the paths below
    const int64_t* node_starts;   // [rows + 1]
    void* out;                    // [rows][heads][dim]

    size_t length(size_t row) const {
        return static_cast<size_t>(seen[row] - first[row] + node_starts[row + 1] - node_starts[row]);
    }

    // Where the row's keys of head g lie; the last one again until LANES divides their number.
    size_t find_keys(size_t row, size_t g, std::vector<const float*>& keys) const {
        const size_t entry = 2 * kv_heads * dim, count = length(row), stop = static_cast<size_t>(seen[row]);
        keys.resize((count + LANES - 1) / LANES * LANES);
        const int64_t* table = tables + table_starts[row];
        const float* head = pool + g * dim;
        size_t j = 0;
        for (size_t p = static_cast<size_t>(first[row]); p < stop;) {
            const float* key = head + (static_cast<size_t>(table[p / block]) * block + p % block) * entry;
            for (size_t end = std::min(stop, p - p % block + block); p < end; p++, key += entry) keys[j++] = key;
        }
        for (const int64_t* node = nodes + node_starts[row]; j < count; j++, node++)
            keys[j] = head + static_cast<size_t>(*node) * entry;
        for (; j < keys.size(); j++) keys[j] = keys[j - 1];
        return count;
    }
};

typedef float Vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2)));

struct Buffers {
    std::vector<const float*> keys;
    std::vector<float> scores, shares;
};

namespace portable {

INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// The sums of eight vectors.
INLINE Vec sums(const Vec* of) {
    Vec result;
    for (size_t k = 0; k < LANES; k++)
        result[k] = ((of[k][0] + of[k][1]) + (of[k][2] + of[k][3])) + ((of[k][4] + of[k][5]) + (of[k][6] + of[k][7]));
    return result;
}

#include "vectors.hpp"
#include "pointwise.hpp"
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

INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

INLINE Vec sums(const Vec* of) {
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(of[4], of[5]), _mm256_hadd_ps(of[6], of[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#include "vectors.hpp"
#include "pointwise.hpp"
#include "attention.hpp"

}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// The kernels of one instruction set, for one type.
template <class T>
struct Kernels {
    void (*rms_norm)(T*, const T*, const T*, T*, size_t, size_t, float);
    void (*silu_mul)(const T*, T*, size_t, size_t);
    void (*place)(const Attention&, size_t, float*);
    void (*attend)(const Attention&, const float*, size_t, size_t, Buffers&);
};

struct Path {
    const char* name;
    bool (*usable)();
    Kernels<uint16_t> bfloat16;
    Kernels<float> float32;

    template <class T>
    const Kernels<T>& kernels() const {
        if constexpr (sizeof(T) == 2)
            return bfloat16;
        else
            return float32;
    }
};

static bool always() { return true; }

#define OF(set, T) {set::rms_norm<T>, set::silu_mul<T>, set::place<T>, set::attend<T>}
static const Path PATHS[] = {
#if OUTRIDER_X86
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, OF(avx2, uint16_t),
     OF(avx2, float)},
#endif
    {"portable", always, OF(portable, uint16_t), OF(portable, float)},
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
        static thread_local Buffers buffers;
        for (size_t i = first; i < last; i++) kernels.attend(a, queries.data(), i % a.rows, i / a.rows, buffers);
    });
}

}  // namespace outrider

#ifndef OUTRIDER_WITHOUT_PYTHON
#include "layers_binding.hpp"
#endif
