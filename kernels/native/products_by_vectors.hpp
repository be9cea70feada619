// Products by AVX-512 BF16, see products.hpp. Included by layers.cpp before attention_pairs.hpp, into a namespace for its
// instruction set. A result is one sum, pair by pair, whatever stands beside it.

constexpr size_t AT_ONCE = 2;   // numbers that one instruction sums over
constexpr size_t TOGETHER = 4;  // vectors of results that lie side by side
constexpr size_t MOST_ROWS = 6;  // whose sums stay in registers

INLINE void configure(size_t) {}
INLINE void release() {}

template <class T>
INLINE T* further(T* from, long bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes));
}

template <size_t ROWS, size_t VECTORS, bool ADD>
static void multiply(const Product& p) {
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 6
    for (size_t r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; v++)
            sums[r][v] = ADD ? _mm512_loadu_ps(further(p.result, static_cast<long>(r) * p.result_apart) + v * LANES)
                             : _mm512_setzero_ps();
    const uint16_t *left = p.left, *right = p.right;
    for (size_t pair = 0; pair < p.summed / 2; pair++, left += 2, right = further(right, p.right_apart)) {
        __m512bh columns[VECTORS];
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; v++) columns[v] = (__m512bh)_mm512_loadu_si512(right + 2 * v * LANES);
#pragma GCC unroll 6
        for (size_t r = 0; r < ROWS; r++) {
            int two;
            std::memcpy(&two, further(left, static_cast<long>(r) * p.left_apart), 4);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
            for (size_t v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
        }
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; v++) {
            asm("" : "+v"(sums[r][v]));  // otherwise compilers store it in the loop above, each time
            _mm512_storeu_ps(further(p.result, static_cast<long>(r) * p.result_apart) + v * LANES, sums[r][v]);
        }
}

template <size_t VECTORS, bool ADD>
INLINE void multiply_rows(const Product& p, size_t rows) {
    static constexpr void (*OF_ROWS[MOST_ROWS])(const Product&) = {
        multiply<1, VECTORS, ADD>, multiply<2, VECTORS, ADD>, multiply<3, VECTORS, ADD>,
        multiply<4, VECTORS, ADD>, multiply<5, VECTORS, ADD>, multiply<6, VECTORS, ADD>};
    OF_ROWS[rows - 1](p);
}

// `columns` is a multiple of a vector's.
template <bool ADD>
static void multiply(Product p, size_t columns) {
    for (size_t left = p.rows, passes = (left + MOST_ROWS - 1) / MOST_ROWS; left; passes--) {
        const size_t rows = (left + passes - 1) / passes;
        for (size_t v = 0, some; v < columns / LANES; v += some) {
            Product part = p;
            part.right += 2 * v * LANES, part.result += v * LANES;
            some = columns / LANES - v >= TOGETHER ? TOGETHER : 1;
            some == 1 ? multiply_rows<1, ADD>(part, rows) : multiply_rows<TOGETHER, ADD>(part, rows);
        }
        left -= rows;
        p.left = further(p.left, static_cast<long>(rows) * p.left_apart);
        p.result = further(p.result, static_cast<long>(rows) * p.result_apart);
    }
}
