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

namespace outrider {

constexpr size_t AHEAD = 8192;             // bytes by which weights are prefetched
constexpr size_t THREAD_WORK = 96u << 10;  // bytes of weights that are worth waking a thread for

// One call. x holds rows of `stride` elements, of the type the kernel wants.
struct Job {
    const Weights* weights;
    const void* x;
    size_t stride;
    void* y;
    size_t rows;
    const float *row_scales = nullptr, *floats = nullptr;  // see int8_whole.hpp
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

    // One half of a block that goes through its outputs in halves.
    Pass half(size_t which) const { return {group, row, 2 * number + which, 2 * passes}; }
};

// Computes rows [row, row + R) of one group, R being the block's own.
using Block = void (*)(const Job&, const Pass&);

// Where little is to be done with a line, a processor sees many of them coming by itself.
template <size_t R>
constexpr size_t ahead_of = R < 3 ? AHEAD / 2 : AHEAD;

// Fetches weights before they are needed, called once for every 128 bytes that are. The first block
// reads them from memory and the others from the cache: if only that one looked ahead, memory would
// stand still while they compute. So each fetches its share of the next group.
struct Lookahead {
    const char* line;
    size_t passes, due = 0;

    Lookahead(const Weights& weights, const Pass& pass, size_t distance = AHEAD) : passes(pass.passes) {
        line = passes == 1 ? weights.group(pass.group) + distance
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

// ---- what computes a block of rows ------------------------------------------------------------

#if OUTRIDER_X86
#include "avx2.hpp"
#endif
#include "blocks.hpp"
#include "int8.hpp"
#include "int8_whole.hpp"

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
    Kernel int8_bfloat16, int8_float32;  // weights of eight bits, and the type of rows; x in float32
    WholeRowsOf whole = nullptr;         // what int8_bfloat16 wants in place of x in float32
    bool reads_compact = false;          // bfloat16 weights

    Kernel kernel(const Weights& w) const {
        if (w.eight_bits()) return w.kind == Kind::bfloat16 ? int8_bfloat16 : int8_float32;
        return w.kind == Kind::bfloat16 ? bfloat16 : float32;
    }
};

#define KERNEL(blocks) by_blocks<sizeof(blocks) / sizeof(Block), blocks>
#define BOTH(blocks) KERNEL(blocks<uint16_t>), KERNEL(blocks<float>)
#define WHOLE(blocks, floats) by_whole_rows<sizeof(blocks) / sizeof(Block), blocks, floats<uint16_t, 1>>
#define BY_BYTES WHOLE(BY_VNNI, avx512_int8_block), KERNEL(INT8_BY_AVX512<float>), to_bytes
static const Path PATHS[] = {
#if OUTRIDER_AMX
    {"amx", has_amx, by_amx, KERNEL(BY_AVX512<float>), false, BY_BYTES, true},
#endif
#if OUTRIDER_X86
    {"avx512_bf16", has_avx512_bf16, KERNEL(BY_BF16), KERNEL(BY_AVX512<float>), false, BY_BYTES},
    {"avx512_vnni", has_avx512_vnni, BOTH(BY_AVX512), true, BY_BYTES},
    {"avx512", has_avx512, BOTH(BY_AVX512), true, BOTH(INT8_BY_AVX512)},
    {"avx2", has_avx2, KERNEL(BY_AVX2<Bfloat16ByAvx2>), KERNEL(FLOAT32_BY_AVX2), true,
     WHOLE(BY_AVX2<PairsByAvx2>, avx2_int8_block), KERNEL(INT8_BY_AVX2<float>), to_pairs},
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
        static thread_local WholeRows whole;
        if (kernel == path.int8_bfloat16 && path.whole) {
            path.whole(w, static_cast<const uint16_t*>(x), rows, whole);
            job.x = whole.bytes.data(), job.stride = 2 * w.padded;
            job.row_scales = whole.scales.data(), job.floats = whole.floats.data();
        } else if (w.kind == Kind::bfloat16 && (path.widens || w.eight_bits()))
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
