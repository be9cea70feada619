// Attention of bfloat16 models by AMX: what attention.hpp does with two products of tiles. Included by
// layers.cpp, into a namespace for its instruction set.
//
// Queries and weights are rounded to bfloat16, sums are float32. A weight's place in a sum is that of its key on
// the row's path: keys are summed 32 at a time, counted from the first, whoever else is computed and wherever
// they lie. So those behind the last full 32 that all rows share are gathered for each row by itself.

constexpr size_t STRIP = 16;    // rows of a tile
constexpr size_t SUMMED = 32;   // numbers of a row that one product of tiles sums over
constexpr size_t TOGETHER = 4;  // tiles of results that lie side by side
constexpr size_t PREPARED = 128;  // keys that are made ready at once

// What products are made with; everything is a multiple of a tile in size.
struct TileBuffers {
    std::vector<const uint16_t*> keys, last_keys;
    Lines<uint16_t> queries, weights, pairs;
    Lines<float> scores, sums;
    std::vector<float> totals;
};

// Tiles 0 to 3 for sums and 4 for what is on the left of so many rows, 5 to 7 for what is on the right.
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

// A product: left [rows][sums] of bfloat16, right [sums / 2][columns][2], result [rows][columns]; distances between
// rows are in bytes. Intrinsics do not say what memory they touch.
struct Product {
    const uint16_t* left;
    long left_apart;
    const uint16_t* right;
    long right_apart;
    size_t steps;  // of 32 summed numbers
    float* result;
    long result_apart;
};

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
    for (size_t step = 0; step < p.steps; step++, right += static_cast<long>(STRIP) * p.right_apart) {
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

INLINE size_t up_to(size_t multiple, size_t count) { return (count + multiple - 1) / multiple * multiple; }

// Keys as columns of pairs of numbers, [dim / 2][of PREPARED][2].
INLINE void turn_pairs(const uint16_t* const* keys, size_t count, size_t D, uint16_t* into) {
    for (size_t k = 0; k < count; k += STRIP)
        for (size_t i = 0; i < D; i += SUMMED) {
            Vec tile[STRIP];
            for (size_t n = 0; n < STRIP; n++) tile[n] = (Vec)_mm512_loadu_si512(keys[k + n] + i);
            transpose(tile);
            for (size_t n = 0; n < STRIP; n++)
                _mm512_store_si512(into + ((i / 2 + n) * PREPARED + k) * 2, (__m512i)tile[n]);
        }
}

// Values of pairs of keys, [keys / 2][dim][2].
INLINE void pair_values(const uint16_t* const* keys, size_t to_value, size_t count, size_t D, uint16_t* into) {
    alignas(64) uint16_t order[2][SUMMED];
    for (uint16_t i = 0; i < SUMMED; i++)
        for (uint16_t half = 0; half < 2; half++)
            order[half][i] = static_cast<uint16_t>(half * STRIP + i / 2 + (i % 2) * SUMMED);
    const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
    for (size_t k = 0; k < count; k += 2)
        for (size_t i = 0; i < D; i += SUMMED, into += 2 * SUMMED) {
            const __m512i one = _mm512_loadu_si512(keys[k] + to_value + i);
            const __m512i other = _mm512_loadu_si512(keys[k + 1] + to_value + i);
            _mm512_store_si512(into, _mm512_permutex2var_epi16(one, left, other));
            _mm512_store_si512(into + SUMMED, _mm512_permutex2var_epi16(one, right, other));
        }
}

// From scores to rounded weights that are yet to be divided by what is returned, their sum.
INLINE float weigh_rounded(const float* scores, size_t count, uint16_t* into) {
    const float top = largest(scores, count);
    Vec total = {};
    for (size_t j = 0; j < count; j += LANES) {
        const __m256bh rounded = _mm512_cvtneps_pbh(exponential(load(scores + j) - top));
        std::memcpy(into + j, &rounded, sizeof rounded);
        total += load(into + j);
    }
    return sum(total);
}

// The rows [first, first + rows) of one text, for the query heads that share key head g.
struct ByTiles {
    const Attention& a;
    size_t first, rows, g;
    size_t Q, D;             // query heads; numbers of a head, a multiple of SUMMED
    size_t shared, stepped;  // keys that all rows have, and those of their full steps
    size_t width;            // between the scores, or weights, of two queries
    TileBuffers& buffers;

    ByTiles(const Attention& a, const float* queries, size_t first, size_t last, size_t g, TileBuffers& buffers)
        : a(a), first(first), rows(last - first), g(g), Q(a.heads / a.kv_heads), D(a.dim),
          shared(a.shared(first, last)), stepped(shared / SUMMED * SUMMED),
          width(up_to(SUMMED, a.longest(first, last)) + SUMMED),  // tiles that begin anywhere fit in
          buffers(buffers) {
        const size_t all = up_to(STRIP, rows * Q);
        buffers.keys.resize(up_to(SUMMED, shared));
        buffers.scores.resize(all * width);
        buffers.weights.resize(all * width);
        buffers.sums.assign(all * D, 0.0f);
        buffers.pairs.resize(PREPARED * D);
        buffers.queries.resize(all * D);
        a.find_keys(first, g, 0, up_to(SUMMED, shared), buffers.keys.data());
        for (size_t r = 0; r < rows; r++)
            for (size_t q = 0; q < Q; q++) {
                const float* query = queries + ((first + r) * a.heads + g * Q + q) * D;
                for (size_t i = 0; i < D; i += LANES) store(load(query + i), query_of(r * Q + q) + i);
            }
    }

    size_t own(size_t r) const { return a.length(first + r) - shared; }
    uint16_t* query_of(size_t n) const { return buffers.queries.data() + n * D; }
    long bytes_apart(size_t numbers, size_t size) const { return static_cast<long>(numbers * size); }

    // Keys [from, to) of a row by itself, with the last one again up to a full `multiple`.
    const uint16_t* const* keys_of(size_t r, size_t from, size_t to, size_t multiple) const {
        const size_t count = up_to(multiple, to - from);
        buffers.last_keys.resize(count);
        a.find_keys(first + r, g, from, from + count, buffers.last_keys.data());
        return buffers.last_keys.data();
    }

    void score() const {
        configure(STRIP);
        for (size_t from = 0; from < shared; from += PREPARED) {
            const size_t count = std::min(PREPARED, shared - from);
            turn_pairs(buffers.keys.data() + from, up_to(STRIP, count), D, buffers.pairs.data());
            fetch(from, count);
            for (size_t n = 0; n < rows * Q; n += STRIP) score_keys(n, from, count);
        }
        configure(Q);
        for (size_t r = 0; r < rows; r++)
            for (size_t from = 0; from < own(r); from += PREPARED) {
                const size_t count = std::min(PREPARED, own(r) - from);
                turn_pairs(keys_of(r, shared + from, shared + from + count, STRIP), up_to(STRIP, count), D,
                           buffers.pairs.data());
                score_keys(r * Q, shared + from, count);
            }
    }

    // Of a tile's queries, from the n-th one on, for keys that are turned.
    void score_keys(size_t n, size_t from, size_t count) const {
        const Product product{query_of(n), bytes_apart(D, 2), buffers.pairs.data(), bytes_apart(PREPARED, 4), D / SUMMED,
                              buffers.scores.data() + n * width + from, bytes_apart(width, 4)};
        multiply<false>(product, up_to(STRIP, count));
    }

    // Asks memory for the values of keys, which are wanted when all scores are known, and for the next keys.
    void fetch(size_t from, size_t count) const {
        for (size_t k = from; k < from + count; k++)
            for (size_t i = 0; i < D; i += 32) {
                __builtin_prefetch(buffers.keys[k] + a.kv_heads * D + i);
                if (k + PREPARED < shared) __builtin_prefetch(buffers.keys[k + PREPARED] + i);
            }
    }

    // Scores become weights; what these are yet to be divided by goes into `totals`, [rows][Q].
    void weigh_keys(float* totals) const {
        for (size_t n = 0; n < rows * Q; n++) {
            float* scores = buffers.scores.data() + n * width;
            const size_t count = a.length(first + n / Q), whole = up_to(SUMMED, count);
            std::fill(scores + count, scores + whole, -INFINITY);
            *totals++ = weigh_rounded(scores, whole, buffers.weights.data() + n * width);
        }
    }

    void add_values() const {
        configure(STRIP);
        for (size_t from = 0; from < stepped; from += PREPARED) {
            const size_t count = std::min(PREPARED, stepped - from);
            pair_values(buffers.keys.data() + from, a.kv_heads * D, count, D, buffers.pairs.data());
            for (size_t n = 0; n < rows * Q; n += STRIP) add_keys(n, from, count);
        }
        configure(Q);
        for (size_t r = 0; r < rows; r++)
            for (size_t from = stepped, end = a.length(first + r); from < end; from += PREPARED) {
                const size_t count = up_to(SUMMED, std::min(PREPARED, end - from));
                const uint16_t* const* keys = keys_of(r, from, from + count, SUMMED);
                pair_values(keys, a.kv_heads * D, count, D, buffers.pairs.data());
                add_keys(r * Q, from, count);
            }
    }

    void add_keys(size_t n, size_t from, size_t count) const {
        const Product product{buffers.weights.data() + n * width + from, bytes_apart(width, 2), buffers.pairs.data(),
                              bytes_apart(D, 4), count / SUMMED, buffers.sums.data() + n * D, bytes_apart(D, 4)};
        multiply<true>(product, D);
    }

    void write(const float* totals) const { divide<uint16_t>(a, first, rows, g, buffers.sums.data(), D, totals); }
};

// Heads that do not fill tiles go the other way.
static void attend(const Attention& a, const float* queries, size_t first, size_t last, size_t g,
                   Buffers<uint16_t>& others) {
    if (a.dim % SUMMED || a.heads / a.kv_heads > STRIP)
        return avx512::attend<uint16_t>(a, queries, first, last, g, others);
    static thread_local TileBuffers buffers;
    attend_together<ByTiles>(a, queries, first, last, g, buffers);
    _tile_release();
}
