// Attention of bfloat16 models by instructions that multiply pairs of bfloat16 numbers: what attention.hpp does, as two
// products. Included by layers.cpp behind one of products_by_*.hpp, into a namespace for its instruction set.
//
// Queries and weights are rounded to bfloat16, sums are float32. A weight's place in a sum is that of its key on
// the row's path: keys are summed AT_ONCE, counted from the first, whoever else is computed and wherever
// they lie. So those behind the last of these groups that all rows share are gathered for each row by itself.

constexpr size_t PREPARED = 128;  // keys that are made ready at once

// What products are made with; everything is a multiple of a tile in size.
struct PairBuffers {
    std::vector<const uint16_t*> keys, last_keys;
    Lines<uint16_t> queries, weights, pairs;
    Lines<float> scores, sums;
    std::vector<float> totals;
};

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

// From scores, of which `top` is the largest, to rounded weights that are yet to be divided by what is returned, their sum.
INLINE float weigh_rounded(const float* scores, size_t count, float top, uint16_t* into) {
    Vec total = {};
    for (size_t j = 0; j < count; j += LANES) {
        const __m256bh rounded = _mm512_cvtneps_pbh(exponential(load(scores + j) - top));
        std::memcpy(into + j, &rounded, sizeof rounded);
        total += load(into + j);
    }
    return sum(total);
}

// The rows [first, first + rows) of one text, for the query heads that share key head g.
struct ByPairs {
    const Attention& a;
    size_t first, rows, g;
    size_t Q, D;             // query heads; numbers of a head, a multiple of SUMMED
    size_t shared, stepped;  // keys that all rows have, and those of their whole groups
    size_t width;            // between the scores, or weights, of two queries
    PairBuffers& buffers;

    ByPairs(const Attention& a, const float* queries, size_t first, size_t last, size_t g, PairBuffers& buffers)
        : a(a), first(first), rows(last - first), g(g), Q(a.heads / a.kv_heads), D(a.dim),
          shared(a.shared(first, last)), stepped(shared / AT_ONCE * AT_ONCE),
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
    float* scores_of(size_t n) const { return buffers.scores.data() + n * width; }
    size_t whole_length(size_t n) const { return up_to(std::max(AT_ONCE, LANES), a.length(first + n / Q)); }
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
            for (size_t n = 0; n < rows * Q; n += STRIP) score_keys(n, std::min(STRIP, rows * Q - n), from, count);
        }
        configure(Q);
        for (size_t r = 0; r < rows; r++)
            for (size_t from = 0; from < own(r); from += PREPARED) {
                const size_t count = std::min(PREPARED, own(r) - from);
                turn_pairs(keys_of(r, shared + from, shared + from + count, STRIP), up_to(STRIP, count), D,
                           buffers.pairs.data());
                score_keys(r * Q, Q, shared + from, count);
            }
    }

    // Of some queries, from the n-th one on, for keys that are turned.
    void score_keys(size_t n, size_t queries, size_t from, size_t count) const {
        const Product product{queries, query_of(n), bytes_apart(D, 2), buffers.pairs.data(), bytes_apart(PREPARED, 4), D,
                              scores_of(n) + from, bytes_apart(width, 4)};
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
        // The largest ones first: each is a chain that a processor follows for several queries at once.
        for (size_t n = 0; n < rows * Q; n++) {
            float* scores = scores_of(n);
            std::fill(scores + a.length(first + n / Q), scores + whole_length(n), -INFINITY);
            totals[n] = largest(scores, whole_length(n));
        }
        for (size_t n = 0; n < rows * Q; n++)
            totals[n] = weigh_rounded(scores_of(n), whole_length(n), totals[n], buffers.weights.data() + n * width);
    }

    void add_values() const {
        configure(STRIP);
        for (size_t from = 0; from < stepped; from += PREPARED) {
            const size_t count = std::min(PREPARED, stepped - from);
            pair_values(buffers.keys.data() + from, a.kv_heads * D, count, D, buffers.pairs.data());
            for (size_t n = 0; n < rows * Q; n += STRIP) add_keys(n, std::min(STRIP, rows * Q - n), from, count);
        }
        configure(Q);
        for (size_t r = 0; r < rows; r++)
            for (size_t from = stepped, end = a.length(first + r); from < end; from += PREPARED) {
                const size_t count = up_to(AT_ONCE, std::min(PREPARED, end - from));
                const uint16_t* const* keys = keys_of(r, from, from + count, AT_ONCE);
                pair_values(keys, a.kv_heads * D, count, D, buffers.pairs.data());
                add_keys(r * Q, Q, from, count);
            }
    }

    void add_keys(size_t n, size_t queries, size_t from, size_t count) const {
        const Product product{queries, buffers.weights.data() + n * width + from, bytes_apart(width, 2), buffers.pairs.data(),
                              bytes_apart(D, 4), count, buffers.sums.data() + n * D, bytes_apart(D, 4)};
        multiply<true>(product, D);
    }

    void write(const float* totals) const { divide<uint16_t>(a, first, rows, g, buffers.sums.data(), D, totals); }
};

// Other sizes of heads than tiles have go the other way.
static void attend(const Attention& a, const float* queries, size_t first, size_t last, size_t g,
                   Buffers<uint16_t>& others) {
    if (a.dim % SUMMED || a.heads / a.kv_heads > STRIP)
        return avx512::attend<uint16_t>(a, queries, first, last, g, others);
    static thread_local PairBuffers buffers;
    attend_together<ByPairs, uint16_t>(a, queries, first, last, g, buffers);
    release();
}
