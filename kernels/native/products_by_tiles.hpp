// Products by AMX, see products.hpp. Included by layers.cpp before attention_pairs.hpp, into a namespace for its
// instruction set.

constexpr size_t AT_ONCE = SUMMED;  // numbers that one instruction sums over
constexpr size_t TOGETHER = 4;      // tiles of results that lie side by side

// Tiles 0 to 3 for sums and 4 for what is on the left, of so many rows whatever a product says; 5 to 7 for what is on
// the right.
static void configure(size_t rows) {
    TileConfig config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : STRIP);
    }
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// Intrinsics do not say what memory they touch.
template <size_t TILES, bool ADD>
static void multiply(const Product& p) {
    asm volatile("" : : : "memory");
    if constexpr (ADD) {
        _tile_loadd(0, p.result, p.result_apart);
        if constexpr (TILES > 1) _tile_loadd(1, p.result + STRIP, p.result_apart);
        if constexpr (TILES > 2) _tile_loadd(2, p.result + 2 * STRIP, p.result_apart);
        if constexpr (TILES > 3) _tile_loadd(3, p.result + 3 * STRIP, p.result_apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const char* right = reinterpret_cast<const char*>(p.right);
    for (size_t step = 0; step < p.summed / SUMMED; step++, right += static_cast<long>(STRIP) * p.right_apart) {
        _tile_loadd(4, p.left + step * SUMMED, p.left_apart);
        _tile_loadd(5, right, p.right_apart);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (TILES > 1) {
            _tile_loadd(6, right + 64, p.right_apart);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (TILES > 2) {
            _tile_loadd(7, right + 128, p.right_apart);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (TILES > 3) {
            _tile_loadd(5, right + 192, p.right_apart);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, p.result, p.result_apart);
    if constexpr (TILES > 1) _tile_stored(1, p.result + STRIP, p.result_apart);
    if constexpr (TILES > 2) _tile_stored(2, p.result + 2 * STRIP, p.result_apart);
    if constexpr (TILES > 3) _tile_stored(3, p.result + 3 * STRIP, p.result_apart);
    asm volatile("" : : : "memory");
}

// `columns` is a multiple of a tile's.
template <bool ADD>
static void multiply(Product p, size_t columns) {
    for (; columns >= TOGETHER * STRIP; columns -= TOGETHER * STRIP) {
        multiply<TOGETHER, ADD>(p);
        p.right += 2 * TOGETHER * STRIP;
        p.result += TOGETHER * STRIP;
    }
    if (columns == 3 * STRIP) multiply<3, ADD>(p);
    if (columns == 2 * STRIP) multiply<2, ADD>(p);
    if (columns == STRIP) multiply<1, ADD>(p);
}

INLINE void release() { _tile_release(); }
