// Attention of rows over paths of keys. Included after vectors.hpp, like it.
//
// Keys and values are kept in the type of the model, T; queries, scores and sums are float32.
// A row goes through its own keys alone, in the order of their positions, and every sum has one
// fixed order: its bits depend on its path, not on where the keys lie or who else is computed.
// Rows of one text go through what they share together, so that keys come into the nearest cache once.

// Turns pairs of numbers: `turns` are complex numbers, one per pair.
INLINE void rotate(const float* x, const float* turns, float* out, size_t size) {
    for (size_t i = 0; i < size; i += 2) {
        float real = x[i] * turns[i] - x[i + 1] * turns[i + 1];
        float imaginary = x[i] * turns[i + 1] + x[i + 1] * turns[i];
        out[i] = real;
        out[i + 1] = imaginary;
    }
}

// Queries, keys and values of one row: normed if the model wants that, rotated, written.
template <class T>
static void place(const Attention& a, size_t row, float* queries) {
    const size_t D = a.dim, H = a.heads, G = a.kv_heads;
    const T* from = static_cast<const T*>(a.projected) + row * (H + 2 * G) * D;
    T* entry = static_cast<T*>(a.pool) + static_cast<size_t>(a.slots[row]) * 2 * G * D;
    std::copy(from + (H + G) * D, from + (H + 2 * G) * D, entry + G * D);
    float head[MAX_DIM], turned[MAX_DIM];
    const float* turns = a.turns + 2 * static_cast<size_t>(a.positions[row]) * D;
    for (size_t h = 0; h < H + G; h++, from += D) {
        for (size_t i = 0; i < D; i += LANES) store(load(from + i, D - i), head + i, D - i);
        if (a.norm) {
            Vec squares = {};
            for (size_t i = 0; i < D; i += LANES) {
                Vec value = load(head + i, D - i);
                squares = fma(value, value, squares);
            }
            Vec factor = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(D) + a.eps));
            for (size_t i = 0; i < D; i += LANES)
                store(load(head + i, D - i) * factor * load(a.norm + h * D + i, D - i), head + i, D - i);
        }
        if (h < H) {
            rotate(head, turns, queries + h * D, D);
            continue;
        }
        rotate(head, turns + D, turned, D);
        for (size_t i = 0; i < D; i += LANES) store(load(turned + i, D - i), entry + (h - H) * D + i, D - i);
    }
}

// Keys, or queries, as columns: [dim][of `columns`]; their number is a multiple of LANES.
template <class T>
INLINE void turn(const T* const* keys, size_t count, size_t D, float* into, size_t columns) {
    for (size_t k = 0; k < count; k += LANES)
        for (size_t i = 0; i < D; i += LANES) {
            Vec tile[LANES];
            if (D - i >= LANES) {  // apart, so that a tile stays in registers
                for (size_t n = 0; n < LANES; n++) tile[n] = load(keys[k + n] + i);
                transpose(tile);
                for (size_t n = 0; n < LANES; n++) store(tile[n], into + (i + n) * columns + k);
            } else {
                for (size_t n = 0; n < LANES; n++) tile[n] = load(keys[k + n] + i, D - i);
                transpose(tile);
                for (size_t n = 0; n < D - i; n++) store(tile[n], into + (i + n) * columns + k);
            }
        }
}

// Scores of VECS vectors of keys for QUERIES queries. turned: [dim][KEYS]. queries: [dim][of `columns`].
// into: [query][of `apart`]. A score is one sum, along the head.
template <size_t QUERIES, size_t VECS>
INLINE void score(const float* turned, const float* queries, size_t columns, size_t D, float* into, size_t apart) {
    Vec sums[QUERIES][VECS] = {};
    for (size_t d = 0; d < D; d++, turned += KEYS, queries += columns) {
        Vec keys[VECS];
        for (size_t v = 0; v < VECS; v++) keys[v] = in_register(load(turned + v * LANES));
        for (size_t q = 0; q < QUERIES; q++) {
            Vec query = splat(queries[q]);
            for (size_t v = 0; v < VECS; v++) sums[q][v] = fma(keys[v], query, sums[q][v]);
        }
    }
    for (size_t q = 0; q < QUERIES; q++)
        for (size_t v = 0; v < VECS; v++) store(sums[q][v], into + q * apart + v * LANES);
}

template <size_t QUERIES>
INLINE void score_all(const float* turned, size_t count, const float* queries, size_t columns, size_t D, float* into,
                      size_t apart) {
    // Sums and keys stay in registers, of which there are half as many where they hold 8 numbers.
    constexpr size_t VECS = LANES > 8 || QUERIES == 1 ? 4 : 2;
    size_t k = 0;
    for (; k + VECS * LANES <= count; k += VECS * LANES)
        score<QUERIES, VECS>(turned + k, queries, columns, D, into + k, apart);
    for (; k < count; k += LANES) score<QUERIES, 1>(turned + k, queries, columns, D, into + k, apart);
}

// The largest of scores; `count` is a multiple of LANES.
INLINE float largest(const float* scores, size_t count) {
    Vec most = splat(-INFINITY);
    for (size_t j = 0; j < count; j += LANES) most = larger(load(scores + j), most);  // NaN is passed over
    return largest(most);
}

// From scores to weights that are yet to be divided by what is returned; `count` is a multiple of LANES.
INLINE float weigh(float* scores, size_t count) {
    const float top = largest(scores, count);
    Vec total = {};
    for (size_t j = 0; j < count; j += LANES) {
        Vec weight = exponential(load(scores + j) - top);
        total += weight;
        store(weight, scores + j);
    }
    return sum(total);
}

// A block's values: of the i-th key at keys[i] + to_value, or in a piece, `between` floats apart.
struct ValuesOfKeys {
    const float* const* keys;
    size_t to_value;

    const float* at(size_t key) const { return keys[key] + to_value; }
    ValuesOfKeys from(size_t i) const { return {keys, to_value + i}; }
};

struct ValuesInAPiece {
    const float* values;
    size_t between;

    const float* at(size_t key) const { return values + key * between; }
    ValuesInAPiece from(size_t i) const { return {values + i, between}; }
};

// Adds weighted values to the sums of QUERIES queries, VECS vectors of each, `apart` floats apart.
template <size_t QUERIES, size_t VECS, class Values>
INLINE void mix(const Values& values, const float* weights, size_t stride, size_t count, float* sums, size_t apart) {
    Vec totals[QUERIES][VECS];
    for (size_t q = 0; q < QUERIES; q++)
        for (size_t v = 0; v < VECS; v++) totals[q][v] = load(sums + q * apart + v * LANES);
    for (size_t j = 0; j < count; j++) {
        const float* value = values.at(j);
        for (size_t v = 0; v < VECS; v++) {
            Vec part = in_register(load(value + v * LANES));
            for (size_t q = 0; q < QUERIES; q++)
                totals[q][v] = fma(splat(weights[q * stride + j]), part, totals[q][v]);
        }
    }
    for (size_t q = 0; q < QUERIES; q++)
        for (size_t v = 0; v < VECS; v++) store(totals[q][v], sums + q * apart + v * LANES);
}

template <size_t QUERIES, class Values>
INLINE void mix_heads(const Values& values, const float* weights, size_t stride, size_t count, float* sums, size_t apart,
                      size_t D) {
    size_t i = 0;
    for (; i + 4 * LANES <= D; i += 4 * LANES)
        mix<QUERIES, 4>(values.from(i), weights, stride, count, sums + i, apart);
    for (; i + LANES <= D; i += LANES) mix<QUERIES, 1>(values.from(i), weights, stride, count, sums + i, apart);
    if (i == D) return;
    for (size_t q = 0; q < QUERIES; q++) {
        Vec total = load(sums + q * apart + i);
        for (size_t j = 0; j < count; j++)
            total = fma(splat(weights[q * stride + j]), load(values.at(j) + i, D - i), total);
        store(total, sums + q * apart + i);
    }
}

// What rows attend with the query heads of key head g: sums, `apart` floats apart, divided by `totals`, [rows][of a
// key head's query heads].
template <class T>
INLINE void divide(const Attention& a, size_t first, size_t rows, size_t g, const float* sums, size_t apart,
                   const float* totals) {
    const size_t Q = a.heads / a.kv_heads, D = a.dim;
    for (size_t r = 0; r < rows; r++) {
        T* out = static_cast<T*>(a.out) + ((first + r) * a.heads + g * Q) * D;
        for (size_t q = 0; q < Q; q++, out += D, sums += apart) {
            const float share = 1.0f / *totals++;
            for (size_t i = 0; i < D; i += LANES) store(load(sums + i) * share, out + i, D - i);
        }
    }
}

// The rows [first, last) of one text, for the query heads that share key head g.
template <class T>
struct Together {
    const Attention& a;
    size_t first, rows, g;
    size_t Q, D, apart;    // query heads; floats of a head, and between the sums of two
    size_t shared;         // keys that all rows have
    size_t own_width;      // keys between those that two rows have of their own
    size_t width;          // floats between the scores of two queries
    Buffers<T>& buffers;

    Together(const Attention& a, const float* queries, size_t first, size_t last, size_t g, Buffers<T>& buffers)
        : a(a), first(first), rows(last - first), g(g), Q(a.heads / a.kv_heads), D(a.dim), apart(whole(D)),
          shared(a.shared(first, last)), own_width(whole(a.longest(first, last) - shared)), buffers(buffers) {
        width = whole(shared) + own_width + LANES;  // vectors that begin anywhere fit in
        buffers.keys.resize(whole(shared) + rows * own_width);
        buffers.scores.resize(rows * Q * width);
        buffers.sums.assign(rows * Q * apart, 0.0f);
        buffers.turned.resize(D * KEYS);
        buffers.values.resize(apart * KEYS);
        a.find_keys(first, g, 0, whole(shared), buffers.keys.data());
        for (size_t r = 0; r < rows; r++) a.find_keys(first + r, g, shared, shared + whole(own(r)), own_keys(r));
        turn_queries(queries);
    }

    void turn_queries(const float* queries) const {
        const size_t columns = whole(rows * Q);
        std::vector<const float*>& each = buffers.each_query;
        each.clear();
        for (size_t r = 0; r < rows; r++)
            for (size_t q = 0; q < Q; q++) each.push_back(queries + ((first + r) * a.heads + g * Q + q) * D);
        each.resize(columns, each.back());
        buffers.queries.resize(D * columns);
        turn(each.data(), columns, D, buffers.queries.data(), columns);
    }

    static size_t whole(size_t count) { return (count + LANES - 1) / LANES * LANES; }
    size_t own(size_t r) const { return a.length(first + r) - shared; }
    const T** own_keys(size_t r) const { return buffers.keys.data() + whole(shared) + r * own_width; }
    float* scores_of_row(size_t r) const { return buffers.scores.data() + r * Q * width; }

    void score() const {
        for (size_t from = 0; from < shared; from += KEYS)
            score_block(buffers.keys.data() + from, from, std::min(KEYS, shared - from), 0, rows, whole(shared));
        for (size_t r = 0; r < rows; r++)
            for (size_t from = 0; from < own(r); from += KEYS)
                score_block(own_keys(r) + from, shared + from, std::min(KEYS, own(r) - from), r, r + 1, 0);
    }

    // Of a block of keys for the rows [row, last). Memory is asked for the values, which are wanted when all
    // scores are known, and for the keys of the next block, if there are `known`, a bit between two products.
    void score_block(const T* const* keys, size_t from, size_t count, size_t row, size_t last, size_t known) const {
        turn(keys, whole(count), D, buffers.turned.data(), KEYS);
        const size_t columns = whole(rows * Q), stop = last * Q;
        for (size_t n = row * Q, done = 0; n < stop;) {
            const float* queries = buffers.queries.data() + n;
            float* into = buffers.scores.data() + n * width + from;
            const size_t left = stop - n, some = left >= 6 ? 6 : left >= 3 ? 3 : 1;
            if (some == 6)
                score_all<6>(buffers.turned.data(), whole(count), queries, columns, D, into, width);
            else if (some == 3)
                score_all<3>(buffers.turned.data(), whole(count), queries, columns, D, into, width);
            else
                score_all<1>(buffers.turned.data(), whole(count), queries, columns, D, into, width);
            n += some;
            for (const size_t due = count * (n - row * Q) / (stop - row * Q); done < due; done++)
                fetch(keys + done, from + done + KEYS < known);
        }
    }

    // Asks for a value, and for the key that is a block further.
    void fetch(const T* const* key, bool further) const {
        for (size_t i = 0; i < D; i += 64 / sizeof(T)) {
            __builtin_prefetch(key[0] + a.kv_heads * D + i);
            if (further) __builtin_prefetch(key[KEYS] + i);
        }
    }

    // Scores become weights; what these are yet to be divided by goes into `totals`, [rows][Q].
    void weigh_keys(float* totals) const {
        for (size_t r = 0; r < rows; r++)
            for (size_t q = 0; q < Q; q++) {
                float* of_query = scores_of_row(r) + q * width;
                const size_t count = a.length(first + r);
                std::fill(of_query + count, of_query + whole(count), -INFINITY);
                *totals++ = weigh(of_query, whole(count));
            }
    }

    void add_values() const {
        for (size_t from = 0; from < shared; from += KEYS)
            add_block(buffers.keys.data() + from, from, std::min(KEYS, shared - from), 0, rows);
        for (size_t r = 0; r < rows; r++)
            for (size_t from = 0; from < own(r); from += KEYS)
                add_block(own_keys(r) + from, shared + from, std::min(KEYS, own(r) - from), r, r + 1);
    }

    // Of a block of keys to the sums of the rows [row, last).
    void add_block(const T* const* keys, size_t from, size_t count, size_t row, size_t last) const {
        if constexpr (sizeof(T) == sizeof(float))
            add(ValuesOfKeys{keys, a.kv_heads * D}, from, count, row, last);
        else {
            for (size_t j = 0; j < count; j++)
                for (size_t i = 0; i < D; i += LANES)
                    store(load(keys[j] + a.kv_heads * D + i, D - i), buffers.values.data() + j * apart + i, D - i);
            add(ValuesInAPiece{buffers.values.data(), apart}, from, count, row, last);
        }
    }

    template <class Values>
    void add(const Values& values, size_t from, size_t count, size_t row, size_t last) const {
        for (size_t r = row; r < last; r++) {
            const float* weights = scores_of_row(r) + from;
            float* into = buffers.sums.data() + r * Q * apart;
            size_t q = 0;
            for (; q + 3 <= Q; q += 3)
                mix_heads<3>(values, weights + q * width, width, count, into + q * apart, apart, D);
            for (; q < Q; q++) mix_heads<1>(values, weights + q * width, width, count, into + q * apart, apart, D);
        }
    }

    void write(const float* totals) const { divide<T>(a, first, rows, g, buffers.sums.data(), apart, totals); }
};

// Rows [first, last), of one text or several, a text's rows together, by Rows with what it works in.
template <class Rows, class T, class Working>
static void attend_together(const Attention& a, const float* queries, size_t first, size_t last, size_t g, Working& buffers) {
    while (first < last) {
        const size_t end = a.end_of_run(first, std::min(last, first + ROWS));
        if (g == 0) a.bring_near(first, sizeof(T));
        const Rows rows(a, queries, first, end, g, buffers);
        buffers.totals.resize(rows.rows * rows.Q);
        rows.score();
        rows.weigh_keys(buffers.totals.data());
        rows.add_values();
        rows.write(buffers.totals.data());
        first = end;
    }
}

template <class T>
static void attend(const Attention& a, const float* queries, size_t first, size_t last, size_t g, Buffers<T>& buffers) {
    attend_together<Together<T>, T>(a, queries, first, last, g, buffers);
}
