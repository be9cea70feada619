// AMX: up to 32 rows against 32 outputs and 32 inputs at once. Included by linear.cpp.

#define AMX __attribute__((target(AMX_AND)))

// Steps as they lie in memory.
class PlainSteps {
  public:
    static constexpr size_t LAG = 0;       // steps between fetching and use
    static constexpr size_t AHEAD = 1024;  // bytes by which they are prefetched

    explicit PlainSteps(const char* weights) : weights(weights) {}
    MEMBER AMX void fetch(size_t i) const {
        const char* ahead = weights + i * STEP * WIDTH * 2 + AHEAD;
#pragma GCC unroll 32
        for (size_t line = 0; line < STEP * WIDTH * 2; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
    }
    MEMBER AMX const uint16_t* at(size_t i) const {
        return reinterpret_cast<const uint16_t*>(weights) + i * STEP * WIDTH;
    }

  private:
    const char* weights;
};

// Multiplies up to 32 rows of a step's inputs: tiles 4 and 5 hold x, 6 and 7 weights. Every element of a sum
// takes the products of a tile in one order, however many rows it has.
template <bool MORE_ROWS>
INLINE AMX void multiply_step(const uint16_t* w, const uint16_t* x, size_t stride) {
    const long x_bytes = static_cast<long>(stride * 2);
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (MORE_ROWS) {
        _tile_loadd(5, x + 16 * stride, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Tiles 0 and 1 sum the left and right outputs of a group for up to 16 rows, 2 and 3 for more.
INLINE AMX void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// sums: [32][WIDTH].
template <bool MORE_ROWS>
INLINE AMX void read_sums(float* sums) {
    _tile_stored(0, sums, WIDTH * 4);
    _tile_stored(1, sums + 16, WIDTH * 4);
    if constexpr (MORE_ROWS) {
        _tile_stored(2, sums + 16 * WIDTH, WIDTH * 4);
        _tile_stored(3, sums + 16 * WIDTH + 16, WIDTH * 4);
    }
    asm volatile("" : : "r"(sums) : "memory");
}

// Rows [row, row + rows) go through groups [first, last), whose steps follow one another.
template <bool MORE_ROWS, class Steps>
AMX static void amx_pass(const Job& job, Steps& steps, size_t first, size_t last, size_t row, size_t rows) {
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + row * job.stride;
    const size_t of_group = job.weights->padded / STEP, all = (last - first) * of_group;
    alignas(64) float sums[32 * WIDTH];
    size_t group = first, step = 0;
    zero_sums();
    for (size_t i = 0; i < all + Steps::LAG; i++) {
        if (i < all) steps.fetch(i);
        if (i < Steps::LAG) continue;
        multiply_step<MORE_ROWS>(steps.at(i - Steps::LAG), x + step * STEP, job.stride);
        if (++step < of_group) continue;
        read_sums<MORE_ROWS>(sums);
        store<uint16_t>(job, group++, row, rows, sums);
        zero_sums();
        step = 0;
    }
}

template <class Steps>
static void amx_pass(const Job& job, Steps&& steps, size_t first, size_t last, size_t row, size_t rows) {
    if (rows > 16)
        amx_pass<true>(job, steps, first, last, row, rows);
    else
        amx_pass<false>(job, steps, first, last, row, rows);
}

static void in_passes(const Job& job, size_t first, size_t last, size_t passes, size_t rows) {
    const Weights& weights = *job.weights;
    static thread_local Plain decoded;
    for (size_t g = first; g < last; g++) {
        const char* plain = weights.compact() ? decoded.of(weights, g) : weights.group(g);
        // The last pass goes over some rows again rather than have tiles of another size.
        for (size_t i = 0; i < passes; i++)
            amx_pass(job, PlainSteps(plain), g, g + 1, std::min(i * rows, job.rows - rows), rows);
    }
}

AMX static void by_amx(const Job& job, size_t first, size_t last) {
    const Weights& weights = *job.weights;
    size_t passes = (job.rows + 31) / 32, count = (job.rows + passes - 1) / passes;
    size_t upper = std::min<size_t>(count, 16), lower = count - upper;
    TileConfig config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        bool beside = lower && (tile == 2 || tile == 3 || tile == 5);
        config.row_bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? 16 : beside ? lower : upper);
    }
    // The intrinsics do not say what memory they read.
    asm volatile("" : : "r"(&config), "r"(job.x) : "memory");
    _tile_loadconfig(&config);
    if (passes == 1 && weights.compact())
        amx_pass(job, CompactSteps(weights, first), first, last, 0, count);
    else if (passes == 1)
        amx_pass(job, PlainSteps(weights.group(first)), first, last, 0, count);
    else
        in_passes(job, first, last, passes, count);
    _tile_release();
}
