// Places one session's growth in its tree: what Replica.apply and LivingTree.graft do with NumPy,
// node by node. What those two treat in a way of its own is left to them: a call that meets it
// changes nothing and says so.
//
// Nodes come in the order of their ids, hence parents before children: a loop over them finds the
// parent's values ready. Results are the reference's, path scores bit for bit.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace outrider {

// As in speculation/: tree.py, tree_slots.py, replication/messages.py and replication/replica.py.
constexpr int64_t ROOT = -1, GONE = -2, NO_POSITION = -1, ROOT_ID = 0;
constexpr int64_t FREE_DEPTH = -1, FREE_KEY = INT64_MIN;
constexpr int64_t NOWHERE = -1;  // in place of an index

// The arrays of a TreeSlots: `capacity` slots and, behind them, the root.
struct Tree {
    int64_t capacity, max_depth;
    double smallest_score;
    int64_t *tokens, *parents, *depths, *births, *keys, *free;
    double* scores;
    uint8_t* expanded;
    int64_t num_free, next_birth;

    int64_t at(int64_t parent) const { return parent == ROOT ? capacity : parent; }
    int64_t key(int64_t parent, int64_t token) const {
        return static_cast<int64_t>(static_cast<uint64_t>(token) * static_cast<uint64_t>(capacity + 1) +
                                    static_cast<uint64_t>(parent));
    }
};

// What the last `size` ids of a generation stand for.
struct Window {
    int64_t size;
    int64_t *slots, *births, *positions;
};

// Committed tokens, and the committed nodes that may still be named, the oldest first.
struct Text {
    const int64_t* ids;
    int64_t length;
    const int64_t *births, *positions;
    int64_t num_births;

    int64_t position_of(int64_t birth) const {
        const int64_t* found = std::lower_bound(births, births + num_births, birth);
        return found == births + num_births || *found != birth ? NO_POSITION : positions[found - births];
    }
    bool continues(int64_t position, int64_t token) const {
        return position >= 0 && position < length && ids[position] == token;
    }
};

// A node as it came. parent: an id. base: the text's length when it was said.
struct Arrived {
    int64_t parent, token, base;
    double score;
    int64_t position;  // where the node itself stands in the text, or NO_POSITION
    int64_t kept;      // its index among the nodes that hang in the tree, or NOWHERE
    int64_t slot;
};

// A node that hangs in the tree, or will. above: its parent among these, or NOWHERE.
struct Kept {
    int64_t index, parent, above, jump, token, depth;
    double score;
    bool placed;
};

// A node that competes for room, old or new: the one has a slot, the other an index, else NOWHERE.
struct Candidate {
    uint64_t score;
    int64_t depth, birth, slot, kept;

    // Best first, as LivingTree has it.
    bool operator<(const Candidate& other) const {
        if (score != other.score) return score > other.score;
        if (depth != other.depth) return depth < other.depth;
        return birth < other.birth;
    }
};

// A score as an integer of the same order; total, for NaN would break a sort.
inline uint64_t ordered(double score) {
    uint64_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

// One call. Vectors are those of the caller, who keeps them for their memory.
struct Scratch {
    std::vector<Arrived> arrived;
    std::vector<Kept> kept;
    std::vector<Candidate> candidates;
    std::vector<int64_t> table;
};

class Grafting {
  public:
    Grafting(Tree& tree, const Window& window, const Text& text, Scratch& scratch)
        : tree(tree), window(window), text(text), arrived(scratch.arrived), kept(scratch.kept),
          candidates(scratch.candidates), table(scratch.table) {}

    // Takes in what arrived, ids from `first` on; returns false, having changed nothing, if a value
    // is impossible or two nodes are one. stale: how many hang nowhere.
    bool place(int64_t first, int64_t vocab_size, int64_t& stale) {
        if (!possible(first, vocab_size)) return false;
        stale = resolve(first);
        if (has_aliases()) return false;
        inherit();
        make_room();
        put();
        remember(first);
        return true;
    }

  private:
    Tree& tree;
    const Window& window;
    const Text& text;
    std::vector<Arrived>& arrived;
    std::vector<Kept>& kept;
    std::vector<Candidate>& candidates;
    std::vector<int64_t>& table;

    bool possible(int64_t first, int64_t vocab_size) const {
        int64_t id = first;
        for (const Arrived& node : arrived)
            if (node.parent >= id++ || node.token < 0 || node.token >= vocab_size || node.base > text.length)
                return false;
        return true;
    }

    // From ids to slots and indices. Growth from before the last commits is walked down the
    // committed tokens. Returns how many nodes hang nowhere.
    int64_t resolve(int64_t first) {
        int64_t stale = 0;
        kept.clear();
        for (size_t i = 0; i < arrived.size(); i++) {
            Arrived& node = arrived[i];
            const Arrived* inside = node.parent >= first ? &arrived[node.parent - first] : nullptr;
            int64_t parent = GONE, position = NO_POSITION, above = NOWHERE;
            if (!inside)
                parent = look_up(node, first, position);
            else if (inside->position != NO_POSITION)
                position = inside->position;
            else
                above = inside->kept;
            if (position == text.length) parent = ROOT;
            node.position = text.continues(position, node.token) ? position + 1 : NO_POSITION;
            node.slot = GONE;
            if (above == NOWHERE && parent == GONE) {
                node.kept = NOWHERE;
                stale += node.position == NO_POSITION;
            } else {
                node.kept = static_cast<int64_t>(kept.size());
                kept.push_back({static_cast<int64_t>(i), parent, above, above, node.token, 0, node.score, true});
            }
        }
        return stale;
    }

    // The slot that an earlier id stands for, or GONE; and its position, if it was committed.
    int64_t look_up(const Arrived& node, int64_t first, int64_t& position) const {
        if (node.parent == ROOT_ID) {
            position = node.base;
            return GONE;
        }
        if (node.parent < first - window.size) return GONE;
        int64_t at = (node.parent % window.size + window.size) % window.size, slot = window.slots[at];
        position = window.positions[at];
        if (slot < 0 || slot >= tree.capacity) return GONE;
        if (tree.depths[slot] > 0 && tree.births[slot] == window.births[at]) return slot;
        position = text.position_of(window.births[at]);
        return GONE;
    }

    // Whether a node has the parent and the token of another, in the tree or among those that came.
    bool has_aliases() {
        size_t room = 16;
        while (room < 2 * kept.size()) room *= 2;
        table.assign(room, FREE_KEY);
        for (const Kept& node : kept) {
            int64_t key = key_of(node);
            size_t at = find(key);
            if (table[at] == key) return true;
            table[at] = key;
        }
        for (int64_t slot = 0; slot < tree.capacity; slot++)
            if (tree.keys[slot] != FREE_KEY && table[find(tree.keys[slot])] == tree.keys[slot]) return true;
        return false;
    }

    // The tree's keys are -1 or more; below them are those of nodes that hang below new ones.
    int64_t key_of(const Kept& node) const {
        if (node.above == NOWHERE) return tree.key(node.parent, node.token);
        uint64_t inner = static_cast<uint64_t>(node.token) * kept.size() + static_cast<uint64_t>(node.above);
        return static_cast<int64_t>(uint64_t{0} - 2 - inner);
    }

    // Where a key lies in the table, or would. At least half of the table is empty.
    size_t find(int64_t key) const {
        uint64_t mixed = static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u;
        size_t mask = table.size() - 1, at = (mixed ^ mixed >> 32) & mask;
        while (table[at] != FREE_KEY && table[at] != key) at = (at + 1) & mask;
        return at;
    }

    // Depths and path scores, by pointer jumping: it is the reference's order of multiplying.
    void inherit() {
        bool more = false;
        for (Kept& node : kept) {
            if (node.above != NOWHERE) {
                node.depth = 1;
                more = true;
            } else {
                int64_t at = tree.at(node.parent);
                node.depth = tree.depths[at] + 1;
                node.score = tree.scores[at] * node.score;
            }
        }
        while (more) {
            more = false;
            // Backwards, so that a round sees the round before it.
            for (auto node = kept.rbegin(); node != kept.rend(); ++node) {
                if (node->jump == NOWHERE) continue;
                const Kept& via = kept[node->jump];
                node->depth += via.depth;
                node->score *= via.score;
                node->jump = via.jump;
                more |= node->jump != NOWHERE;
            }
        }
        for (Kept& node : kept) {
            if (!(node.score >= tree.smallest_score)) node.score = tree.smallest_score;
            // Rounding may have put a child above its parent by one unit in the last place.
            if (node.above != NOWHERE) node.score = std::min(node.score, kept[node.above].score);
        }
    }

    // Drops what is too deep, then the worst of old and new nodes as far as room is short.
    void make_room() {
        int64_t fresh = 0;
        for (Kept& node : kept) {
            node.placed = node.depth <= tree.max_depth;
            fresh += node.placed;
        }
        if (fresh <= tree.num_free) return;
        candidates.clear();
        for (int64_t slot = 0; slot < tree.capacity; slot++)
            if (tree.depths[slot] >= 0)
                candidates.push_back(
                    {ordered(tree.scores[slot]), tree.depths[slot], tree.births[slot], slot, NOWHERE});
        int64_t birth = tree.next_birth;
        for (size_t i = 0; i < kept.size(); i++)
            if (kept[i].placed)
                candidates.push_back(
                    {ordered(kept[i].score), kept[i].depth, birth++, NOWHERE, static_cast<int64_t>(i)});
        // The last ones of an order with parents first: no node stays without its parent.
        auto worst = candidates.end() - (fresh - tree.num_free);
        std::nth_element(candidates.begin(), worst, candidates.end());
        std::sort(worst, candidates.end());
        for (; worst != candidates.end(); ++worst)
            if (worst->slot == NOWHERE)
                kept[worst->kept].placed = false;
            else
                release(worst->slot);
    }

    void release(int64_t slot) {
        tree.depths[slot] = FREE_DEPTH;
        tree.keys[slot] = FREE_KEY;
        tree.expanded[slot] = 0;
        tree.free[tree.num_free++] = slot;
    }

    void put() {
        int64_t count = std::count_if(kept.begin(), kept.end(), [](const Kept& node) { return node.placed; });
        tree.num_free -= count;
        const int64_t* next = tree.free + tree.num_free;
        for (const Kept& node : kept) {
            if (!node.placed) continue;
            int64_t slot = *next++;
            int64_t parent = node.above == NOWHERE ? node.parent : arrived[kept[node.above].index].slot;
            arrived[node.index].slot = slot;
            tree.tokens[slot] = node.token;
            tree.parents[slot] = parent;
            tree.depths[slot] = node.depth;
            tree.scores[slot] = node.score;
            tree.keys[slot] = tree.key(parent, node.token);
            tree.births[slot] = tree.next_birth++;
        }
    }

    void remember(int64_t first) {
        int64_t count = static_cast<int64_t>(arrived.size());
        for (int64_t i = std::max<int64_t>(0, count - window.size); i < count; i++) {
            int64_t at = (first + i) % window.size;
            window.slots[at] = arrived[i].slot;
            window.positions[at] = arrived[i].position;
            window.births[at] = tree.births[tree.at(std::max(arrived[i].slot, ROOT))];
        }
    }
};

}  // namespace outrider
