// A drafter's guesses. Included after vectors.hpp, like it.

constexpr size_t GUESSED = 64;  // tokens at a time

// Cephes' way: x is 2^n times a number near 1, whose logarithm is a polynomial's. For positive, normal x.
INLINE Vec logarithm(Vec x) {
    const Ints bits = (Ints)x, exponent = (bits >> 23) - 126;
    Vec f = (Vec)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    const Ints small = f < splat(0.707106781186547524f);
    const Vec n = __builtin_convertvector(exponent + small, Vec);  // small is -1 where it is true
    f = (small ? f + f : f) - 1.0f;
    Vec y = splat(7.0376836292e-2f);
    for (float each : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                       2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        y = fma(y, f, splat(each));
    const Vec square = f * f;
    y = y * f * square;
    y = fma(n, splat(-2.12194440e-4f), y);
    y = fma(square, splat(-0.5f), y);
    return fma(n, splat(0.693359375f), f + y);
}

// The middle of an interval, of 2^32 between 0 and 1.
INLINE Vec middle(Ints interval) {
    const Vec upper = __builtin_convertvector((interval >> 16) & 0xffff, Vec);
    const Vec lower = __builtin_convertvector(interval & 0xffff, Vec);
    return fma(upper, splat(65536.0f), lower + 0.5f) * 0x1p-32f;
}

// -log(1 - u), exact to some units in the last place for the smallest u, for those win, and for the largest.
INLINE Vec exponentials(Ints interval) {
    const Vec u = middle(interval), rest = middle(~interval);
    return rest == splat(1.0f) ? u : -logarithm(rest) * (u / (1.0f - rest));
}

// Tokens that a row has guessed so far, the likeliest first.
struct Best {
    size_t count, held;
    int64_t* ids;
    double* scores;

    float least() const { return held < count ? -1.0f : static_cast<float>(scores[count - 1]); }

    void offer(int64_t id, float score) {
        if (!(score > least())) return;
        size_t at = held < count ? held++ : count - 1;
        for (; at > 0 && scores[at - 1] < score; at--) scores[at] = scores[at - 1], ids[at] = ids[at - 1];
        scores[at] = score, ids[at] = id;
    }
};

// The `count` tokens with the largest p / E, p = softmax(logits), or p without noise; of equals the first. shares:
// what of the sum over all tokens they have; 0 where logits are not finite. `count` is at most `size`.
template <class T>
static void guess(const T* logits, size_t size, const Stream& stream, size_t count, int64_t* ids, double* shares) {
    Vec highest = splat(-INFINITY);
    size_t i = 0;
    for (; i + LANES <= size; i += LANES) highest = larger(load(logits + i), highest);  // NaN is passed over
    float most = largest(highest);
    for (; i < size; i++) {
        float values[LANES];
        store(load(logits + i, 1), values);
        most = std::max(most, values[0]);
    }
    Best best{count, 0, ids, shares};
    Vec total = {};
    alignas(64) uint32_t intervals[GUESSED];
    alignas(64) float scores[GUESSED];
    for (size_t first = 0; first < size; first += GUESSED) {
        if (stream.gamma) Stream::intervals(stream, first, intervals);
        const size_t end = std::min(GUESSED, size - first);
        Vec best_of_all = {};
        for (size_t j = 0; j < end; j += LANES) {
            Vec score = exponential(load(logits + first + j, end - j) - most);
            if (stream.gamma) {
                Ints interval;
                std::memcpy(&interval, intervals + j, sizeof interval);
                score = score / exponentials(interval);
            }
            store(score, scores + j);
            for (size_t k = end; k < j + LANES; k++) scores[k] = 0.0f;  // there are no such tokens
            score = load(scores + j);
            total = total + score;
            best_of_all = larger(score, best_of_all);
        }
        if (largest(best_of_all) > best.least())
            for (size_t j = 0; j < end; j++) best.offer(static_cast<int64_t>(first + j), scores[j]);
    }
    const float sum_of_all = sum(total);
    const bool sound = sum_of_all > 0.0f && sum_of_all < INFINITY;
    for (size_t k = best.held; k < count; k++) ids[k] = static_cast<int64_t>(k), shares[k] = 0.0;
    for (size_t k = 0; k < best.held; k++) shares[k] = sound ? std::min(1.0, shares[k] / sum_of_all) : 0.0;
}
