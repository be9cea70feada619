// AMX: up to 32 rows against 32 outputs and 32 inputs at once. Included by linear.cpp.

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

INLINE AMX void prefetch_step(const char* w) {
#pragma GCC unroll 32
    for (size_t line = 0; line < STEP * WIDTH * 2; line += 64) _mm_prefetch(w + AHEAD / 2 + line, _MM_HINT_T0);
}

// What tiles 2 and 3 sum while 0 and 1 sum the left and right outputs of a group for up to 16 rows.
enum class Beside { nothing, more_rows, next_group };

// Tiles 4 and 5 hold x, 6 and 7 weights. Every element of a sum takes the products of a tile in one
// order, however many rows it has. sums: [16][WIDTH], and as much again for what is computed beside.
template <Beside BESIDE>
AMX static void amx_pass(const Weights& weights, size_t group, const uint16_t* x, size_t stride, float* sums) {
    const char* w = weights.group(group);
    const char* next = weights.group(group + 1);
    const long x_bytes = static_cast<long>(stride * 2), sum_bytes = WIDTH * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t k = 0; k < weights.padded; k += STEP, w += STEP * WIDTH * 2) {
        prefetch_step(w);
        _tile_loadd(6, w, 64);
        _tile_loadd(4, x + k, x_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + 2 * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (BESIDE == Beside::more_rows) {
            _tile_loadd(5, x + k + 16 * stride, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else if constexpr (BESIDE == Beside::next_group) {
            prefetch_step(next);
            _tile_loadd(6, next, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, next + 2 * TILE, 64);
            _tile_dpbf16ps(3, 4, 7);
            next += STEP * WIDTH * 2;
        }
    }
    _tile_stored(0, sums, sum_bytes);
    _tile_stored(1, sums + 16, sum_bytes);
    if constexpr (BESIDE != Beside::nothing) {
        _tile_stored(2, sums + 16 * WIDTH, sum_bytes);
        _tile_stored(3, sums + 16 * WIDTH + 16, sum_bytes);
    }
    asm volatile("" : : "r"(sums) : "memory");
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
    alignas(64) float sums[32 * WIDTH];
    const uint16_t* x = static_cast<const uint16_t*>(job.x);
    size_t g = first;
    if (!lower)
        for (; g + 2 <= last; g += 2) {  // two groups at a time are two streams from memory
            amx_pass<Beside::next_group>(weights, g, x, job.stride, sums);
            store<uint16_t>(job, g, 0, count, sums);
            store<uint16_t>(job, g + 1, 0, count, sums + 16 * WIDTH);
        }
    for (; g < last; g++)
        for (size_t i = 0; i < passes; i++) {
            // The last pass goes over some rows again rather than have tiles of another size.
            size_t row = std::min(i * count, job.rows - count);
            if (lower)
                amx_pass<Beside::more_rows>(weights, g, x + row * job.stride, job.stride, sums);
            else
                amx_pass<Beside::nothing>(weights, g, x, job.stride, sums);
            store<uint16_t>(job, g, row, count, sums);
        }
    _tile_release();
}
