// Places growth of every sort in trees of many sizes under sanitizers: what is taken for an index
// without being one meets memory that may not be touched.

#include "grafting.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

namespace {

using namespace outrider;

std::mt19937_64 chance;

int64_t below(int64_t end) { return static_cast<int64_t>(chance() % static_cast<uint64_t>(end)); }

void require(bool sound, const char* what) {
    if (sound) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

int64_t wild(int64_t next) {
    const int64_t values[] = {INT64_MIN, INT64_MAX, -1, -2, -8192, next, next + 1, next + 40, 0, 1, int64_t{1} << 32};
    return values[below(std::size(values))];
}

// What a tree and a window consist of, on heaps of their own.
struct Arrays {
    std::vector<int64_t> tokens, parents, depths, births, keys, free, slots, window_births, positions;
    std::vector<double> scores;
    std::vector<uint8_t> expanded;

    Arrays(int64_t capacity, int64_t window)
        : tokens(capacity + 1), parents(capacity + 1, ROOT), depths(capacity + 1, FREE_DEPTH), births(capacity + 1, -1),
          keys(capacity + 1, FREE_KEY), free(capacity), slots(window, GONE), window_births(window),
          positions(window, NO_POSITION), scores(capacity + 1), expanded(capacity + 1) {
        for (int64_t i = 0; i < capacity; i++) free[i] = capacity - 1 - i;
        depths.back() = 0;
        scores.back() = 1.0;
    }
};

void require_sound(const Tree& tree) {
    std::vector<bool> seen(tree.capacity);
    for (int64_t i = 0; i < tree.num_free; i++) {
        require(!seen[tree.free[i]] && tree.depths[tree.free[i]] == FREE_DEPTH, "a slot is free twice, or in use");
        seen[tree.free[i]] = true;
    }
    for (int64_t slot = 0; slot < tree.capacity; slot++) {
        if (seen[slot]) continue;
        require(tree.depths[slot] > 0 && tree.depths[slot] <= tree.max_depth, "a depth is none");
        require(tree.parents[slot] >= ROOT && tree.parents[slot] < tree.capacity, "a parent is none");
    }
}

void live(int64_t capacity, int64_t window_size, double honesty) {
    Arrays arrays(capacity, window_size);
    Tree tree{capacity, 32, 1e-30, arrays.tokens.data(), arrays.parents.data(), arrays.depths.data(),
              arrays.births.data(), arrays.keys.data(), arrays.free.data(), arrays.scores.data(),
              arrays.expanded.data(), capacity, 0};
    Window window{window_size, arrays.slots.data(), arrays.window_births.data(), arrays.positions.data()};
    std::vector<int64_t> ids(20), births{3, 5, 8}, positions{12, 13, 14};
    for (int64_t& id : ids) id = below(4);
    Text text{ids.data(), 20, births.data(), positions.data(), 3};
    Scratch scratch;
    const double scores[] = {0, 0.5, 1, 1e-38, -1, 3e38, INFINITY, -INFINITY, NAN};
    int64_t next_id = 1;
    for (int round = 0; round < 40; round++) {
        int64_t count = below(round % 4 ? 30 : 3 * window_size), stale = 0;
        scratch.arrived.clear();
        for (int64_t i = 0; i < count; i++) {
            bool honest = std::generate_canonical<double, 53>(chance) < honesty;
            int64_t id = next_id + i, parent = honest ? std::max<int64_t>(0, id - 1 - below(8)) : wild(id);
            int64_t token = honest ? below(1000) : wild(1000), base = honest ? 20 - below(9) : wild(20);
            scratch.arrived.push_back({parent, token, base, scores[below(honest ? 4 : 9)], NO_POSITION, NOWHERE, GONE});
        }
        if (Grafting(tree, window, text, scratch).place(next_id, 1000, stale)) {
            require(stale >= 0 && stale <= count, "more is stale than came");
            next_id += count;
        }
        require_sound(tree);
    }
}

}  // namespace

int main() {
    for (double honesty : {1.0, 0.999, 0.9})
        for (int64_t capacity : {1, 2, 7, 100, 512})
            for (int64_t window : {1, 16, 100})
                for (int i = 0; i < 10; i++) live(capacity, window, honesty);
    std::printf("no error\n");
}
