// Compact groups as the kernels want them: step by step of 32 inputs, or whole. Included by linear.cpp.

constexpr size_t COMPACT_AHEAD = 11 * COMPACT_TILE;  // bytes by which compact tiles are prefetched
constexpr size_t ESCAPES_AHEAD = 192;

// Decodes into the nearest cache, step by step. A tile that is loaded from what was just stored waits for it.
class CompactSteps {
  public:
    static constexpr size_t LAG = 2;  // steps between fetching and use

    CompactSteps(const Weights& weights, size_t group)
        : exponent_of_code(weights.exponent_of_code),
          tiles(reinterpret_cast<const uint8_t*>(weights.group(group))),
          escapes(weights.escapes[group]) {}
    MEMBER VBMI2 void fetch(size_t i) {
        _mm_prefetch(reinterpret_cast<const char*>(escapes + ESCAPES_AHEAD), _MM_HINT_T1);
        uint16_t* into = ring[i % DEPTH];
        for (size_t tile = 0; tile < TILES; tile++)
            decode_tile(tiles + (i * TILES + tile) * COMPACT_TILE, COMPACT_AHEAD, exponent_of_code, escapes,
                        into + tile * TILE);
        asm volatile("" : : "r"(into) : "memory");  // intrinsics that load tiles do not say what they read
    }
    MEMBER VBMI2 const uint16_t* at(size_t i) const { return ring[i % DEPTH]; }

  private:
    static constexpr size_t DEPTH = 4;

    const uint8_t *exponent_of_code, *tiles, *escapes;
    alignas(64) uint16_t ring[DEPTH][STEP * WIDTH];
};

// One group in the plain layout, for rows that go through it in several passes.
class Plain {
  public:
    VBMI2 const char* of(const Weights& weights, size_t group) {
        const size_t tiles = weights.padded * WIDTH / TILE;
        if (memory.size() < tiles) memory.resize(tiles);
        const uint8_t* tile = reinterpret_cast<const uint8_t*>(weights.group(group));
        const uint8_t* escapes = weights.escapes[group];
        for (size_t i = 0; i < tiles; i++, tile += COMPACT_TILE)
            decode_tile(tile, COMPACT_AHEAD, weights.exponent_of_code, escapes, memory[i].weights);
        return reinterpret_cast<const char*>(memory.data());
    }

  private:
    struct alignas(64) Tile {
        uint16_t weights[TILE];
    };
    std::vector<Tile> memory;
};
