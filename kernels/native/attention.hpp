// Attention of rows over paths of keys. Included after vectors.hpp, like it.
//
// A row goes through its own keys alone, in the order of their positions, and every sum has one
// fixed order: its bits depend on its path, not on where the keys lie or who else is computed.

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
    float* entry = a.pool + static_cast<size_t>(a.slots[row]) * 2 * G * D;
    float head[MAX_DIM];
    for (size_t h = 0; h < H + 2 * G; h++, from += D) {
        float* to = h < H ? queries + h * D : entry + (h - H) * D;
        bool turns = h < H + G;
        for (size_t i = 0; i < D; i += LANES) store(load(from + i, D - i), (turns ? head : to) + i, D - i);
        if (!turns) continue;
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
        rotate(head, a.turns + (2 * row + (h >= H)) * D, to, D);
    }
}

// Scores of eight keys.
INLINE Vec scores_of(const float* query, const float* const* keys, size_t D) {
    Vec products[LANES] = {};
    size_t i = 0;
    for (; i + LANES <= D; i += LANES) {
        Vec part = load(query + i);
        for (size_t k = 0; k < LANES; k++) products[k] = fma(load(keys[k] + i), part, products[k]);
    }
    if (i < D) {
        Vec part = load(query + i, D - i);
        for (size_t k = 0; k < LANES; k++) products[k] = fma(load(keys[k] + i, D - i), part, products[k]);
    }
    return sums(products);
}

// From scores to weights that are yet to be divided by what is returned; `count` is a multiple of LANES.
INLINE float weigh(float* scores, size_t count) {
    Vec most = splat(-INFINITY), total = {};
    for (size_t j = 0; j < count; j += LANES) {
        Vec value = load(scores + j);
        most = either(value > most, value, most);
    }
    float top = most[0];
    for (size_t i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (size_t j = 0; j < count; j += LANES) {
        Vec weight = exponential(load(scores + j) - top);
        total += weight;
        store(weight, scores + j);
    }
    return sum(total);
}

// Weighted sums of values for QUERIES queries, VECS vectors of each.
template <size_t QUERIES, size_t VECS>
INLINE void mix(const float* const* keys, size_t to_value, const float* weights, size_t stride, size_t count,
                Vec (&totals)[QUERIES][VECS]) {
    for (auto& of_query : totals)
        for (Vec& total : of_query) total = Vec{};
    for (size_t j = 0; j < count; j++) {
        const float* value = keys[j] + to_value;
        for (size_t v = 0; v < VECS; v++) {
            Vec part = load(value + v * LANES);
            for (size_t q = 0; q < QUERIES; q++)
                totals[q][v] = fma(splat(weights[q * stride + j]), part, totals[q][v]);
        }
    }
}

template <size_t QUERIES, class T>
INLINE void attended(const float* const* keys, size_t to_value, const float* weights, size_t stride, size_t count,
                     const float* shares, size_t D, T* out) {
    size_t i = 0;
    for (; i + 4 * LANES <= D; i += 4 * LANES) {
        Vec totals[QUERIES][4];
        mix<QUERIES, 4>(keys, to_value + i, weights, stride, count, totals);
        for (size_t q = 0; q < QUERIES; q++)
            for (size_t v = 0; v < 4; v++) store(totals[q][v] * shares[q], out + q * D + i + v * LANES);
    }
    for (; i + LANES <= D; i += LANES) {
        Vec totals[QUERIES][1];
        mix<QUERIES, 1>(keys, to_value + i, weights, stride, count, totals);
        for (size_t q = 0; q < QUERIES; q++) store(totals[q][0] * shares[q], out + q * D + i);
    }
    if (i == D) return;
    for (size_t q = 0; q < QUERIES; q++) {
        Vec total = {};
        for (size_t j = 0; j < count; j++)
            total = fma(splat(weights[q * stride + j]), load(keys[j] + to_value + i, D - i), total);
        store(total * shares[q], out + q * D + i, D - i);
    }
}

// The heads that share one key head, of one row.
template <class T>
static void attend(const Attention& a, const float* queries, size_t row, size_t g, Buffers& buffers) {
    const size_t D = a.dim, Q = a.heads / a.kv_heads, G = a.kv_heads;
    const size_t count = a.find_keys(row, g, buffers.keys), padded = buffers.keys.size();
    const float* const* keys = buffers.keys.data();
    buffers.scores.resize(Q * padded);
    buffers.shares.resize(Q);
    float* scores = buffers.scores.data();
    for (size_t q = 0; q < Q; q++) {
        const float* query = queries + (row * a.heads + g * Q + q) * D;
        float* own = scores + q * padded;
        for (size_t j = 0; j < padded; j += LANES) store(scores_of(query, keys + j, D), own + j);
        for (size_t j = count; j < padded; j++) own[j] = -INFINITY;
        buffers.shares[q] = 1.0f / weigh(own, padded);
    }
    T* out = static_cast<T*>(a.out) + (row * a.heads + g * Q) * D;
    size_t q = 0;
    for (; q + 3 <= Q; q += 3)
        attended<3>(keys, G * D, scores + q * padded, padded, count, buffers.shares.data() + q, D, out + q * D);
    for (; q < Q; q++)
        attended<1>(keys, G * D, scores + q * padded, padded, count, buffers.shares.data() + q, D, out + q * D);
}
