// A target's own draw. Included after guesses.hpp, like it.
//
// The winner is that of kernels/gumbel.py, to the last bit. Every token is scored in float32 as a drafter would; those that
// come near the best one, mostly one alone, are then scored exactly.

constexpr float NEAR = 1e-5f;  // of the best score: more than float32 loses

// What a token has to have least, as kernels/gumbel.py computes it.
INLINE float exact_key(uint32_t interval, float value) {
    return static_cast<float>(-std::log1p(-((interval + 0.5) * 0x1p-32))) / value;
}

// One row's race, of the values of all tokens: not negative, of any sum.
struct Race {
    const float* values;
    size_t size;
    const Stream& stream;
    float least = INFINITY;
    int64_t winner = 0;

    // Intervals and scores of the tokens from `first` on, and the best score; 0 where there are no more.
    MEMBER float score(size_t first, uint32_t (&intervals)[GUESSED], float* scores, Ints& unsound) const {
        Stream::intervals(stream, first, intervals);
        Vec best = {};
        for (size_t j = 0; j < GUESSED; j += LANES) {
            const Vec value = first + j < size ? load(values + first + j, size - first - j) : Vec{};
            Ints interval;
            std::memcpy(&interval, intervals + j, sizeof interval);
            const Vec of_each = value / exponentials(interval);
            unsound |= value != value;
            store(of_each, scores + j);
            best = larger(of_each, best);
        }
        return largest(best);
    }

    // Looks exactly at tokens from `first` on that score so much; in their order, for of equal ones the first wins.
    void look(size_t first, const uint32_t* intervals, const float* scores, float enough) {
        for (size_t j = 0; j < std::min(GUESSED, size - first); j++) {
            if (scores[j] < enough) continue;
            const float key = exact_key(intervals[j], values[first + j]);
            if (key < least) least = key, winner = static_cast<int64_t>(first + j);
        }
    }

    void run(std::vector<float>& best) {
        alignas(64) uint32_t intervals[GUESSED];
        alignas(64) float scores[GUESSED];
        best.clear();
        Ints unsound = {};
        for (size_t first = 0; first < size; first += GUESSED) best.push_back(score(first, intervals, scores, unsound));
        for (size_t j = 0; j < LANES; j++)
            if (unsound[j]) {
                winner = std::find_if(values, values + size, [](float value) { return value != value; }) - values;
                return;
            }
        const float top = *std::max_element(best.begin(), best.end());
        const float enough = top < INFINITY ? top * (1.0f - NEAR) : 0.0f;
        for (size_t block = 0; block < best.size(); block++) {
            if (best[block] < enough) continue;
            score(block * GUESSED, intervals, scores, unsound);
            look(block * GUESSED, intervals, scores, enough);
        }
    }
};

// The token of the row that wins: a NaN, if there is one.
static int64_t race(const float* values, size_t size, const Stream& stream, std::vector<float>& best) {
    Race of_row{values, size, stream};
    of_row.run(best);
    return of_row.winner;
}
