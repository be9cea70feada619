// bfloat16 weights in 11.2 bits, without changing one: the exponents of a trained layer are few.
//
// Of a weight's 16 bits eight are an exponent, and seven exponents make up 98 % of a layer's: what follows
// a bell curve has 2.6 bits of entropy there (Hershcovitch et al., ZipNN, 2024; Zhang et al., DFloat11,
// 2025). So a weight is a byte of sign and mantissa and a code of 3 bits, which names one of seven
// exponents or says that the next byte of a list of escapes is it. All of that is read in order and without a
// branch, 64 weights at a time: a core waits for memory longer than this takes.
//
// A tile of 512 weights is 512 bytes of signs and mantissas, and three lines of codes. Weights go through
// it in eights of lines: 64 bytes, whose i-th weight belongs to the place `line_and_word(i)` of two lines of
// the plain layout, as vectors are interleaved within 128 bits. Byte i of line r of the codes has those of
// eighths 2r and 2r + 1 in its lower six bits; its upper two belong to the last two eighths, see decode_tile.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "numbers.hpp"

namespace outrider {

constexpr size_t TILE = 512;  // weights
constexpr size_t EIGHTHS = 8;
constexpr size_t EIGHTH = TILE / EIGHTHS;
constexpr size_t COMPACT_TILE = TILE + 3 * EIGHTH;  // bytes
constexpr size_t NAMED = 7;                         // exponents with a code
constexpr uint8_t ESCAPE = 0x80;  // what an escape's code stands for: no exponent from here up has a code

// The exponents of some weights: which have codes, and how many weights do not.
struct Exponents {
    uint8_t of_code[64];  // over and over: what else an index has in its upper bits does not matter
    uint8_t code[256];
    size_t escapes = 0;

    explicit Exponents(const std::array<size_t, 256>& counts) {
        std::array<uint8_t, ESCAPE> order;
        std::iota(order.begin(), order.end(), uint8_t{0});
        std::stable_sort(order.begin(), order.end(), [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
        std::fill_n(code, 256, uint8_t{NAMED});
        for (uint8_t i = 0; i < NAMED; i++) code[order[i]] = i;
        for (size_t i = 0; i < 64; i++) of_code[i] = i % 8 == NAMED ? ESCAPE : order[i % 8];
        for (size_t e = 0; e < 256; e++) escapes += code[e] == NAMED ? counts[e] : 0;
    }
};

INLINE uint8_t exponent(uint16_t weight) { return static_cast<uint8_t>(weight >> 7); }

// Where the i-th weight of an eighth stands among the 64 of two lines.
INLINE size_t line_and_word(size_t i) { return i % 16 / 8 * 32 + i / 16 * 8 + i % 8; }

// Writes a tile, zeros before, and appends its escapes.
inline void encode_tile(const uint16_t* tile, const Exponents& exponents, uint8_t* into, uint8_t*& escapes) {
    uint8_t* codes = into + TILE;
    for (size_t eighth = 0; eighth < EIGHTHS; eighth++, tile += EIGHTH)
        for (size_t i = 0; i < EIGHTH; i++) {
            const uint16_t weight = tile[line_and_word(i)];
            const uint8_t code = exponents.code[exponent(weight)];
            into[eighth * EIGHTH + i] = static_cast<uint8_t>(weight << 1 | weight >> 15);
            if (code == NAMED) *escapes++ = exponent(weight);
            if (eighth < 6)
                codes[eighth / 2 * EIGHTH + i] |= static_cast<uint8_t>(code << eighth % 2 * 3);
            else
                for (size_t bit = (eighth - 6) * 3, left = code; bit < (eighth - 5) * 3; bit++, left >>= 1)
                    codes[bit / 2 * EIGHTH + i] |= static_cast<uint8_t>((left & 1) << (6 + bit % 2));
        }
}

#if OUTRIDER_X86
#define VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,popcnt")))

// Writes a tile in the plain layout; `ahead` lies so many bytes behind `tile` that memory has the time to answer.
INLINE VBMI2 void decode_tile(const uint8_t* tile, size_t ahead, const uint8_t* exponent_of_code,
                              const uint8_t*& escapes, uint16_t* into) {
    const __m512i of_code = _mm512_load_si512(exponent_of_code);
    __m512i codes[4];
#pragma GCC unroll 3
    for (size_t r = 0; r < 3; r++) codes[r] = _mm512_load_si512(tile + TILE + r * EIGHTH);
    // Two bits from each line are the last two eighths' six: a line's upper bits, wherever they are wanted.
    const __m512i two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(15);
    constexpr int IF_MASKED = 0xe4;  // the first where the mask is 1, else the second
    codes[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes[0], 6), _mm512_srli_epi16(codes[1], 4), two, IF_MASKED);
    codes[3] = _mm512_ternarylogic_epi32(codes[3], _mm512_srli_epi16(codes[2], 2), four, IF_MASKED);
#pragma GCC unroll 8
    for (size_t eighth = 0; eighth < EIGHTHS; eighth++) {
        const uint8_t* from = tile + eighth * EIGHTH;
        // Into the second cache: all that the first can wait for at once is less than memory can have under way.
        _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T1);
        if (eighth < 3) _mm_prefetch(reinterpret_cast<const char*>(from + ahead + TILE), _MM_HINT_T1);
        const __m512i line = codes[eighth / 2], index = eighth % 2 ? _mm512_srli_epi16(line, 3) : line;
        __m512i exponent = _mm512_permutexvar_epi8(index, of_code);
        const __mmask64 escaped = _mm512_movepi8_mask(exponent);
        exponent = _mm512_mask_expand_epi8(exponent, escaped, _mm512_loadu_si512(escapes));
        escapes += _mm_popcnt_u64(_cvtmask64_u64(escaped));
        const __m512i rest = _mm512_load_si512(from);
        const __m512i left = _mm512_unpacklo_epi8(rest, exponent), right = _mm512_unpackhi_epi8(rest, exponent);
        _mm512_store_si512(into + eighth * EIGHTH, _mm512_shrdi_epi16(left, left, 1));
        _mm512_store_si512(into + eighth * EIGHTH + 32, _mm512_shrdi_epi16(right, right, 1));
    }
}
#endif

}  // namespace outrider
