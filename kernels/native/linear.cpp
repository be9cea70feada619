// y = x W^T + b for few rows: the weights cross memory once per call, at memory speed.
//
// Every output of every row is reduced over the inputs in one fixed order, by one accumulator
// (or one sequence of them) that no other row and no other output touches. Rows are blocked and
// outputs are split over threads, the reduction never is: a row's bits depend on the row, the
// weights and the instruction set alone. Between instruction sets they differ.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "numbers.hpp"
#include "openmp.hpp"
#include "tiles.hpp"
#include "weights.hpp"

#if OUTRIDER_X86
#include <cpuid.h>
#endif

namespace outrider {

constexpr size_t AHEAD = 2048;             // bytes by which weights are prefetched
constexpr size_t THREAD_WORK = 96u << 10;  // bytes of weights that are worth waking a thread for

// One call. x holds rows of `stride` elements, of the type the kernel wants.
struct Job {
    const Weights* weights;
    const void* x;
    size_t stride;
    void* y;
    size_t rows;
    const float *row_scales = nullptr, *floats = nullptr;  // see int8.hpp
};

using Kernel = void (*)(const Job&, size_t first, size_t last);  // groups [first, last)

// ---- what all kernels share ---------------------------------------------------------------

INLINE void convert(const float* from, uint16_t* to, size_t count) {
    for (size_t j = 0; j < count; j++) to[j] = to_bfloat16(from[j]);
}

INLINE void convert(const float* from, float* to, size_t count) { std::memcpy(to, from, count * sizeof(float)); }

// Adds the sums of a chunk to the total. With float32 weights what the addition loses is kept, so
// that the error does not grow with the number of inputs: MKL's many short sums are as exact.
template <class T>
INLINE void join(float* total, float* lost, const float* chunk, size_t count) {
    for (size_t j = 0; j < count; j++) {
        float sum = total[j] + chunk[j];
        if constexpr (sizeof(T) == 4) {
            float added = sum - total[j];
            lost[j] += (total[j] - (sum - added)) + (chunk[j] - added);
        }
        total[j] = sum;
    }
}

// After an infinity or an overflow what was lost is not a number, and the total stands.
INLINE void recover(float* total, const float* lost, size_t count) {
    for (size_t j = 0; j < count; j++) total[j] += lost[j] == lost[j] ? lost[j] : 0.0f;
}

// Adds the bias to the sums [rows][WIDTH] of a group and stores them.
template <class T>
INLINE void store(const Job& job, size_t group, size_t row, size_t rows, float* sums) {
    const Weights& w = *job.weights;
    size_t width = std::min(WIDTH, w.outs - group * WIDTH);
    T* y = static_cast<T*>(job.y) + row * w.outs + group * WIDTH;
    for (size_t r = 0; r < rows; r++, sums += WIDTH, y += w.outs) {
        if (!w.bias.empty()) {
            const float* bias = w.bias.data() + group * WIDTH;
            for (size_t j = 0; j < WIDTH; j++) sums[j] += bias[j];
        }
        if (width == WIDTH)
            convert(sums, y, WIDTH);  // apart, so that the length is known and vectors are used
        else
            convert(sums, y, width);
    }
}


// A block of rows goes through a group's weights, one of several blocks that do so in turn.
struct Pass {
    size_t group, row;
    size_t number, passes;
};

// Computes rows [row, row + R) of one group, R being the block's own.
using Block = void (*)(const Job&, const Pass&);

// Fetches weights before they are needed, called once for every 128 bytes that are. The first block
// reads them from memory and the others from the cache: if only that one looked ahead, memory would
// stand still while they compute. So each fetches its share of the next group.
struct Lookahead {
    const char* line;
    size_t passes, due = 0;

    Lookahead(const Weights& weights, const Pass& pass) : passes(pass.passes) {
        line = passes == 1 ? weights.group(pass.group) + AHEAD
                           : weights.group(pass.group + 1) + weights.group_bytes() * pass.number / passes / 64 * 64;
    }
#if OUTRIDER_X86
    inline __attribute__((always_inline)) void step() {
        for (due += 2; due >= passes; due -= passes, line += 64) _mm_prefetch(line, _MM_HINT_T0);
    }
#endif
};

// Splits the rows into blocks of like size, at most MOST; blocks[n - 1] computes n of them.
template <size_t MOST, const Block (&BLOCKS)[MOST]>
static void by_blocks(const Job& job, size_t first, size_t last) {
    for (size_t g = first; g < last; g++) {
        size_t passes = (job.rows + MOST - 1) / MOST, row = 0;
        for (size_t number = 0; number < passes; number++) {
            size_t left = passes - number, count = (job.rows - row + left - 1) / left;
            BLOCKS[count - 1](job, {g, row, number, passes});
            row += count;
        }
    }
}

// Products summed before they join the total. What sums in float32 lose is nothing beside the rounding
// of a result to bfloat16.
template <class T>
constexpr size_t CHUNK = sizeof(T) == 2 ? std::numeric_limits<size_t>::max() / 2 : 16;

template <class T>
constexpr size_t TOGETHER = sizeof(T) == 2 ? 2 : 1;  // inputs that lie beside one another

// Where 16 outputs of a group have their weights for input k, or for it and the next; the other 16 lie RIGHT further.
template <class T>
INLINE const T* line_of(const T* group, size_t k) {
    return group + (sizeof(T) == 2 ? k / STEP * 2 * TILE + k % STEP * 16 : k * WIDTH);
}

template <class T>
constexpr size_t RIGHT = sizeof(T) == 2 ? TILE : 16;

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
// ---- AVX2 -----------------------------------------------------------------------------------

#define AVX2 __attribute__((target("avx2,fma")))

template <class T, size_t R>
AVX2 static void avx2_block(const Job& job, const Pass& pass) {
    const T* w = reinterpret_cast<const T*>(job.weights->group(pass.group));
    const float* x = static_cast<const float*>(job.x) + pass.row * job.stride;
    alignas(32) float sums[R * WIDTH] = {}, lost[R * WIDTH] = {}, of_chunk[R * WIDTH];
    Lookahead ahead(*job.weights, pass);
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    for (size_t start = 0; start < job.weights->padded; start += CHUNK<T>) {
        __m256 chunk[R][4];
        for (auto& of_row : chunk)
            for (auto& part : of_row) part = _mm256_setzero_ps();
        size_t end = std::min(start + CHUNK<T>, job.weights->padded);
        for (size_t k = start; k < end; k += TOGETHER<T>) {
            const T* line = line_of(w, k);
            ahead.step();
#pragma GCC unroll 4
            for (size_t i = 0; i < 4; i++) {
                const T* eight = line + i / 2 * RIGHT<T> + i % 2 * 8 * TOGETHER<T>;
                if constexpr (sizeof(T) == 4) {
                    __m256 weights = _mm256_loadu_ps(eight);
#pragma GCC unroll 4
                    for (size_t r = 0; r < R; r++)
                        chunk[r][i] = _mm256_fmadd_ps(weights, _mm256_set1_ps(x[r * job.stride + k]), chunk[r][i]);
                } else {
                    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(eight));
                    __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
                    __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
#pragma GCC unroll 4
                    for (size_t r = 0; r < R; r++) {
                        const float* at = x + r * job.stride + k;
                        chunk[r][i] = _mm256_fmadd_ps(even, _mm256_set1_ps(at[0]), chunk[r][i]);
                        chunk[r][i] = _mm256_fmadd_ps(odd, _mm256_set1_ps(at[1]), chunk[r][i]);
                    }
                }
            }
        }
        for (size_t r = 0; r < R; r++)
            for (size_t i = 0; i < 4; i++) _mm256_store_ps(of_chunk + r * WIDTH + i * 8, chunk[r][i]);
        join<T>(sums, lost, of_chunk, R * WIDTH);
    }
    recover(sums, lost, R * WIDTH);
    store<T>(job, pass.group, pass.row, R, sums);
}

template <class T>
constexpr Block BY_AVX2[] = {avx2_block<T, 1>, avx2_block<T, 2>, avx2_block<T, 3>};

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
    const uint16_t* w = reinterpret_cast<const uint16_t*>(job.weights->group(pass.group));
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + pass.row * job.stride;
    Lookahead ahead(*job.weights, pass);
    __m512 total[R][2];
    for (auto& of_row : total) of_row[0] = of_row[1] = _mm512_setzero_ps();
    for (size_t k = 0; k < job.weights->padded; k += 2) {
        const uint16_t* line = line_of(w, k);
        ahead.step();
        __m512bh left = (__m512bh)_mm512_load_si512(line);
        __m512bh right = (__m512bh)_mm512_load_si512(line + RIGHT<uint16_t>);
#pragma GCC unroll 12
        for (size_t r = 0; r < R; r++) {
            int pair;
            std::memcpy(&pair, x + r * job.stride + k, 4);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
            total[r][0] = _mm512_dpbf16_ps(total[r][0], left, value);
            total[r][1] = _mm512_dpbf16_ps(total[r][1], right, value);
        }
    }
    alignas(64) float sums[R * WIDTH];
#pragma GCC unroll 12
    for (size_t r = 0; r < R; r++) {
        _mm512_store_ps(sums + r * WIDTH, total[r][0]);
        _mm512_store_ps(sums + r * WIDTH + 16, total[r][1]);
    }
    store<uint16_t>(job, pass.group, pass.row, R, sums);
}

#define BF16_BLOCK(R) bf16_block<R>
constexpr Block BY_BF16[] = TWELVE(BF16_BLOCK);
#endif

// ---- weights of eight bits --------------------------------------------------------------------

#include "int8.hpp"

#if OUTRIDER_AMX
#include "compact_steps.hpp"
#include "amx.hpp"
#endif

// ---- what this processor can do -------------------------------------------------------------

struct Path {
    const char* name;
    bool (*usable)();
    Kernel bfloat16, float32;
    bool widens;  // the bfloat16 kernel wants x in float32
    Kernel int8_bfloat16, int8_float32;  // weights of eight bits, and the type of rows; x in float32 but for VNNI
    bool reads_compact = false;          // bfloat16 weights

    Kernel kernel(const Weights& w) const {
        if (w.eight_bits()) return w.kind == Kind::bfloat16 ? int8_bfloat16 : int8_float32;
        return w.kind == Kind::bfloat16 ? bfloat16 : float32;
    }
};

#if OUTRIDER_X86
static bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

static bool has_avx512_bf16() {  // with VNNI on every processor
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx512_vnni() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

#define KERNEL(blocks) by_blocks<sizeof(blocks) / sizeof(Block), blocks>
#define BOTH(blocks) KERNEL(blocks<uint16_t>), KERNEL(blocks<float>)
static const Path PATHS[] = {
#if OUTRIDER_AMX
    {"amx", has_amx, by_amx, KERNEL(BY_AVX512<float>), false, int8_by_vnni, KERNEL(INT8_BY_AVX512<float>), true},
#endif
#if OUTRIDER_X86
    {"avx512_bf16", has_avx512_bf16, KERNEL(BY_BF16), KERNEL(BY_AVX512<float>), false, int8_by_vnni,
     KERNEL(INT8_BY_AVX512<float>)},
    {"avx512_vnni", has_avx512_vnni, BOTH(BY_AVX512), true, int8_by_vnni, KERNEL(INT8_BY_AVX512<float>)},
    {"avx512", has_avx512, BOTH(BY_AVX512), true, BOTH(INT8_BY_AVX512)},
    {"avx2", has_avx2, BOTH(BY_AVX2), true, BOTH(INT8_BY_AVX2)},
#endif
    {"portable", always, BOTH(PORTABLE), true, BOTH(PORTABLE_INT8)},
};

// ---- one call -------------------------------------------------------------------------------

// Rows of x as long as they are in the layout, zeros at their ends.
template <class From, class To>
static void lay_out(const From* x, size_t rows, Job& job, std::vector<To>& into) {
    const Weights& w = *job.weights;
    into.assign(rows * w.padded, 0);
    for (size_t r = 0; r < rows; r++)
        for (size_t k = 0; k < w.ins; k++) {
            if constexpr (sizeof(From) < sizeof(To))
                into[r * w.padded + k] = to_float(x[r * w.ins + k]);
            else
                into[r * w.padded + k] = x[r * w.ins + k];
        }
    job.x = into.data();
    job.stride = w.padded;
}

// Weights in the layout of a path, which computes with them.
struct Linear : Weights {
    const Path& path;

    Linear(const Path& path, Kind kind, const void* source, size_t outs, size_t ins, const float* bias, const float* scales)
        : Weights(kind, source, outs, ins, bias, scales, path.reads_compact), path(path) {}

    void operator()(const void* x, void* y, size_t rows, size_t threads) const {
        if (rows && outs) compute(x, y, rows, threads);
    }

  private:
    void compute(const void* x, void* y, size_t rows, size_t threads) const {
        const Weights& w = *this;
        Job job{&w, x, w.ins, y, rows};
        const Kernel kernel = path.kernel(w);
        static thread_local std::vector<float> floats;
        static thread_local std::vector<uint16_t> halves;
#if OUTRIDER_X86
        static thread_local Bytes bytes;
        if (kernel == int8_by_vnni) {
            to_bytes(w, static_cast<const uint16_t*>(x), rows, bytes);
            job.x = bytes.bytes.data(), job.stride = 2 * w.padded;
            job.row_scales = bytes.scales.data(), job.floats = bytes.floats.data();
        } else
#endif
        if (w.kind == Kind::bfloat16 && (path.widens || w.eight_bits()))
            lay_out(static_cast<const uint16_t*>(x), rows, job, floats);
        else if (w.kind == Kind::bfloat16 && w.ins != w.padded)
            lay_out(static_cast<const uint16_t*>(x), rows, job, halves);
        else if (w.ins != w.padded)
            lay_out(static_cast<const float*>(x), rows, job, floats);
        threads = std::min({threads, w.groups, 1 + w.bytes() / THREAD_WORK});
        in_parts(w.groups, threads, [&](size_t first, size_t last) { kernel(job, first, last); });
    }
};

}  // namespace outrider

#ifndef OUTRIDER_WITHOUT_PYTHON
#include "binding.hpp"
#endif
