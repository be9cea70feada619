// Weights in the layout that the kernels of linear.cpp stream.
//
// Layout: groups of 32 outputs. Within a group the inputs follow one another, for float32
// [in][32], for bfloat16 [in / 32][2][16][16][2]: tiles of 16 pairs of inputs by 16 outputs, pairs
// being what AMX and AVX512-BF16 multiply. A tile is 1 KiB in one piece, for AMX reads pieces a tenth
// faster than lines here and there.
// Missing outputs of the last group are zero and are never stored; bfloat16 inputs are filled up
// with zeros to a multiple of 32, in the weights and in x alike, so that 0 * inf cannot appear. Where the
// instruction set can read them so, and it saves something, tiles are compact; see compact.hpp.
// Weights of eight bits are [in / 4][32][4], fours being what AVX512-VNNI multiplies, and filled up to
// a multiple of 4 inputs.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include <sys/mman.h>

#include "compact.hpp"
#include "numbers.hpp"

namespace outrider {

constexpr size_t WIDTH = 32;  // outputs of a group
constexpr size_t STEP = 32;   // inputs of an AMX tile; bfloat16 inputs are padded to it
constexpr size_t TILES = STEP * WIDTH / TILE;  // of a step
constexpr size_t QUAD = 4;                 // inputs that lie together where weights have eight bits
constexpr size_t HUGE_PAGE = 2u << 20;
constexpr size_t ARENA = 32u << 20;

// ---- memory -------------------------------------------------------------------------------

// Weights lie one after another in huge pages: with small ones a virtual machine spends most of
// the time walking page tables. A block of memory is returned when nobody uses any of it.
struct Arena {
    char* mapped;
    size_t length, used;
    char* base;
    size_t end, users;
};

static std::mutex arena_lock;
static Arena* current_arena = nullptr;

static Arena* new_arena(size_t bytes) {
    size_t end = std::max(ARENA, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    size_t length = end + HUGE_PAGE;
    void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    uintptr_t aligned = (reinterpret_cast<uintptr_t>(mapped) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char* base = reinterpret_cast<char*>(aligned);
#ifdef MADV_HUGEPAGE
    madvise(base, end, MADV_HUGEPAGE);  // where it is refused there is nothing lost but time
#endif
    return new Arena{static_cast<char*>(mapped), length, 0, base, end, 0};
}

static void* take(size_t bytes, Arena*& arena) {
    std::lock_guard<std::mutex> guard(arena_lock);
    bytes = (bytes + 127) / 128 * 128;
    if (!current_arena || current_arena->end - current_arena->used < bytes) {
        Arena* fresh = new_arena(bytes);
        current_arena = fresh;
    }
    arena = current_arena;
    void* memory = arena->base + arena->used;
    arena->used += bytes;
    arena->users++;
    return memory;
}

static void give_back(Arena* arena) {
    std::lock_guard<std::mutex> guard(arena_lock);
    if (--arena->users) return;
    if (current_arena == arena) current_arena = nullptr;
    munmap(arena->mapped, arena->length);
    delete arena;
}

// ---- weights ------------------------------------------------------------------------------

struct Weights {
    Kind kind;  // of rows, and of weights unless they have eight bits
    size_t outs, ins;
    size_t padded;  // inputs in the layout
    size_t groups;
    char* data = nullptr;
    std::vector<float> bias;    // empty, or one per output of every group
    std::vector<float> scales;  // the same; where there are some, weights have eight bits
    std::vector<int32_t> sums;  // of an output's weights, where these have eight bits
    std::vector<const uint8_t*> escapes;  // those of every group, where weights are compact
    size_t escaped = 0;                   // weights
    alignas(64) uint8_t exponent_of_code[64];
    Arena* arena = nullptr;

    // may_be_compact: whether whoever computes with them can read them so.
    Weights(Kind kind, const void* source, size_t outs, size_t ins, const float* offsets, const float* factors,
            bool may_be_compact)
        : kind(kind), outs(outs), ins(ins), groups((outs + WIDTH - 1) / WIDTH) {
        per_output(offsets, bias);
        per_output(factors, scales);
        const size_t multiple = eight_bits() ? QUAD : kind == Kind::bfloat16 ? STEP : 1;
        padded = (ins + multiple - 1) / multiple * multiple;
        if (eight_bits()) {
            fill(static_cast<const int8_t*>(source));
            add_up(static_cast<const int8_t*>(source));
        } else if (kind == Kind::float32)
            fill(static_cast<const float*>(source));
        else if (!may_be_compact || !fill_compactly(static_cast<const uint16_t*>(source)))
            fill(static_cast<const uint16_t*>(source));
    }
    Weights(const Weights&) = delete;
    Weights& operator=(const Weights&) = delete;
    ~Weights() { give_back(arena); }

    bool eight_bits() const { return !scales.empty(); }
    bool compact() const { return !escapes.empty(); }
    size_t group_bytes() const {
        if (compact()) return padded * WIDTH / TILE * COMPACT_TILE;
        return padded * WIDTH * (eight_bits() ? 1 : kind == Kind::bfloat16 ? 2 : 4);
    }
    size_t bytes() const { return groups * group_bytes() + escaped; }
    const char* group(size_t g) const { return data + g * group_bytes(); }

  private:
    void per_output(const float* from, std::vector<float>& into) {
        if (!from) return;
        into.assign(groups * WIDTH, 0.0f);
        std::copy(from, from + outs, into.begin());
    }

    void add_up(const int8_t* source) {
        sums.assign(groups * WIDTH, 0);
        for (size_t out = 0; out < outs; out++)
            sums[out] = std::accumulate(source + out * ins, source + (out + 1) * ins, int32_t{0});
    }

    // A group's weights, zeros before.
    template <class T>
    void arrange(const T* source, size_t g, T* group) const {
        const T* row = source + g * WIDTH * ins;
        for (size_t o = 0; o < std::min(WIDTH, outs - g * WIDTH); o++, row += ins)
            for (size_t k = 0; k < ins; k++) {
                if constexpr (sizeof(T) == 1)
                    group[k / QUAD * QUAD * WIDTH + o * QUAD + k % QUAD] = row[k];
                else if constexpr (sizeof(T) == 2)
                    group[(k / STEP * TILES + o / 16) * TILE + k % STEP / 2 * 32 + o % 16 * 2 + k % 2] = row[k];
                else
                    group[k * WIDTH + o] = row[k];
            }
    }

    template <class T>
    void fill(const T* source) {
        data = static_cast<char*>(take(bytes(), arena));
        std::memset(data, 0, bytes());
        for (size_t g = 0; g < groups; g++) arrange(source, g, reinterpret_cast<T*>(data + g * group_bytes()));
    }

    // False where a tenth or less would be saved.
    bool fill_compactly(const uint16_t* source) {
        std::array<size_t, 256> counts = {};
        for (size_t i = 0; i < outs * ins; i++) counts[exponent(source[i])]++;
        counts[0] += groups * WIDTH * padded - outs * ins;
        const Exponents exponents(counts);
        const size_t tiles = groups * padded * WIDTH / TILE, plain = tiles * TILE * 2;
        if (tiles * COMPACT_TILE + exponents.escapes > plain / 10 * 9) return false;
        // Escapes first, for what is fetched ahead behind the last tile is then the next layer's. The last
        // ones are read with whatever lies behind them.
        const size_t list = (exponents.escapes + 2 * EIGHTH - 1) / EIGHTH * EIGHTH;
        char* memory = static_cast<char*>(take(list + tiles * COMPACT_TILE, arena));
        std::memset(memory, 0, list + tiles * COMPACT_TILE);
        data = memory + list;
        escaped = exponents.escapes;
        std::copy(std::begin(exponents.of_code), std::end(exponents.of_code), exponent_of_code);
        escapes.reserve(groups);
        std::vector<uint16_t> group(padded * WIDTH);
        uint8_t* escape = reinterpret_cast<uint8_t*>(memory);
        for (size_t g = 0; g < groups; g++) {
            escapes.push_back(escape);
            std::fill(group.begin(), group.end(), uint16_t{0});
            arrange(source, g, group.data());
            uint8_t* into = reinterpret_cast<uint8_t*>(data + g * group_bytes());  // now that it is compact
            for (size_t tile = 0; tile < padded * WIDTH / TILE; tile++)
                encode_tile(group.data() + tile * TILE, exponents, into + tile * COMPACT_TILE, escape);
        }
        return true;
    }
};

}  // namespace outrider
