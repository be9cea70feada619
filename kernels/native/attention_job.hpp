// One layer's attention of some rows, as the modules hand it to one another.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace outrider {

constexpr size_t MAX_DIM = 1024;       // of a head
constexpr size_t BROUGHT = 512u << 10;  // bytes, see bring_near

// One call. All arrays are dense; sizes stand in kernels/path_attention.py.
struct Attention {
    size_t rows, heads, kv_heads, dim, block;
    const void* projected;  // [rows][heads + 2 * kv_heads][dim]
    const float* turns;     // [positions][2][dim]: of queries, and of keys
    const int64_t* positions;  // [rows]
    const float* norm;      // [heads + kv_heads][dim], or nothing
    float eps;
    const int64_t* slots;         // [rows], where keys and values go
    void* pool;                   // [slots][2][kv_heads][dim], in the type of what is projected
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

    // Keys of the committed text that all of these rows of one text have, and the most keys that one has.
    size_t shared(size_t begin, size_t end) const {
        size_t least = static_cast<size_t>(seen[begin] - first[begin]);
        for (size_t row = begin; row < end; row++) least = std::min(least, static_cast<size_t>(seen[row] - first[row]));
        return least;
    }
    size_t longest(size_t begin, size_t end) const {
        size_t most = 0;
        for (size_t row = begin; row < end; row++) most = std::max(most, length(row));
        return most;
    }

    // Behind the last of the rows from this one on that attend the same text from the same position, at most `stop`.
    size_t end_of_run(size_t row, size_t stop) const {
        size_t end = row + 1;
        while (end < stop && table_starts[end] == table_starts[row] && first[end] == first[row]) end++;
        return end;
    }

    // Reads a number of every line of what the row attends of its text, in the order of memory, which gives it at twice
    // the speed of one head's keys after another's. More than so many bytes would not stay near until they are wanted.
    void bring_near(size_t row, size_t number_bytes) const {
        const size_t entry = 2 * kv_heads * dim * number_bytes, begin = static_cast<size_t>(first[row]);
        const size_t end = std::min(static_cast<size_t>(seen[row]), begin + BROUGHT / entry);
        const int64_t* table = tables + table_starts[row];
        for (size_t p = begin, stop; p < end; p = stop) {
            stop = std::min(end, (p / block + 1) * block);
            const char* from = static_cast<const char*>(pool) + (static_cast<size_t>(table[p / block]) * block + p % block) * entry;
            for (size_t at = 0; at < (stop - p) * entry; at += 64) asm volatile("" : : "r"(from[at]));
        }
    }

    // Where the row's keys [from, to) of head g lie; the last one again where there are no more.
    template <class T>
    void find_keys(size_t row, size_t g, size_t from, size_t to, const T** into) const {
        const size_t entry = 2 * kv_heads * dim, begin = static_cast<size_t>(first[row]);
        const size_t committed = static_cast<size_t>(seen[row]) - begin, count = length(row);
        const int64_t* table = tables + table_starts[row];
        const T* head = static_cast<const T*>(pool) + g * dim;
        size_t j = from;
        for (const size_t stop = std::min(committed, to); j < stop;) {
            const size_t p = begin + j;
            const T* key = head + (static_cast<size_t>(table[p / block]) * block + p % block) * entry;
            for (size_t end = std::min(stop, j + block - p % block); j < end; j++, key += entry) *into++ = key;
        }
        const int64_t* path = nodes + node_starts[row];
        for (; j < std::min(count, to); j++) *into++ = head + static_cast<size_t>(path[j - committed]) * entry;
        for (; j < to; j++, into++) *into = into[-1];
    }
};

}  // namespace outrider
