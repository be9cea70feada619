// The noise of kernels/gumbel.py: the same streams, here for drafters, whose exponentials need not be exact.

#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.hpp"

namespace outrider {

constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15, BASE = 0xd1b54a32d192ed03, GAMMA = 0x8cb92ba72f3d8dd7;
constexpr uint64_t MULTIPLIERS[] = {0xbf58476d1ce4e5b9, 0x94d049bb133111eb};

INLINE uint64_t finalise(uint64_t word) {
    word = (word ^ word >> 30) * MULTIPLIERS[0];
    word = (word ^ word >> 27) * MULTIPLIERS[1];
    return word ^ word >> 31;
}

// One position's stream. Where gamma is 0, which it is for no position, there is no noise.
struct Stream {
    uint64_t base = 0, gamma = 0;

    static Stream at(uint64_t state, int64_t position) {
        const uint64_t mixed = finalise(finalise(static_cast<uint64_t>(position) + GOLDEN) ^ state) + GOLDEN;
        return {finalise(mixed ^ BASE), finalise(mixed ^ GAMMA) | 1};
    }

    // Of `count` tokens from the first on the number of the interval, of 2^32 between 0 and 1, in which u lies.
    template <size_t COUNT>
    INLINE void intervals(const Stream& stream, size_t first, uint32_t (&into)[COUNT]) {
        for (size_t j = 0; j < COUNT; j++) {
            // The last xor-shift would touch but one of these bits, which is flipped with or without it.
            uint64_t z = stream.base + (first + j) * stream.gamma;
            z = (z ^ z >> 30) * MULTIPLIERS[0];
            z = (z ^ z >> 27) * MULTIPLIERS[1];
            into[j] = static_cast<uint32_t>(z >> 32) ^ 0x80000000u;
        }
    }
};

}  // namespace outrider
