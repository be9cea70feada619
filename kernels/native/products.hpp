// Products of small matrices of bfloat16 numbers, as processors multiply them: two numbers of a row by two of a
// column at once.

#pragma once

#include <cstddef>
#include <cstdint>

namespace outrider {

constexpr size_t STRIP = 16;   // rows and columns of a tile
constexpr size_t SUMMED = 32;  // numbers of a row of a tile

// left [rows][summed], right [summed / 2][columns][2], result [rows][columns] of float32; distances between rows
// are in bytes.
struct Product {
    size_t rows;  // at most STRIP
    const uint16_t* left;
    long left_apart;
    const uint16_t* right;
    long right_apart;
    size_t summed;
    float* result;
    long result_apart;
};

}  // namespace outrider
