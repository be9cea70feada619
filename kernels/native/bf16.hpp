// AVX-512 BF16: two products of bfloat16 per lane. Included by linear.cpp.

#define AVX512_BF16 __attribute__((target(AVX512_BF16_AND)))

constexpr size_t MOST_BF16_ROWS = 12;  // whose sums for a group stay in registers

struct NoLookahead {
    MEMBER void step() {}
};

// Adds the products of a step of 32 inputs to the sums of R rows for a group's outputs.
template <size_t R, class Ahead>
INLINE AVX512_BF16 void add_step(const uint16_t* line, const uint16_t* x, size_t stride, Ahead& ahead, __m512 (&sums)[R][2]) {
    for (const uint16_t* end = line + TILE; line != end; line += 32, x += 2) {
        ahead.step();
        const __m512bh left = (__m512bh)_mm512_load_si512(line);
        const __m512bh right = (__m512bh)_mm512_load_si512(line + RIGHT<uint16_t>);
#pragma GCC unroll 12
        for (size_t r = 0; r < R; r++) {
            int pair;
            std::memcpy(&pair, x + r * stride, 4);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, value);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, value);
        }
    }
}

// Stores a group's sums, and begins others.
template <size_t R>
INLINE AVX512_BF16 void store_sums(const Job& job, size_t group, size_t row, __m512 (&sums)[R][2]) {
    alignas(64) float stored[R * WIDTH];
#pragma GCC unroll 12
    for (size_t r = 0; r < R; r++) {
        // They come from registers: otherwise compilers store them at every input.
        asm("" : "+v"(sums[r][0]), "+v"(sums[r][1]));
        _mm512_store_ps(stored + r * WIDTH, sums[r][0]);
        _mm512_store_ps(stored + r * WIDTH + 16, sums[r][1]);
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    }
    store<uint16_t>(job, group, row, R, stored);
}

template <size_t R>
AVX512_BF16 static void bf16_block(const Job& job, const Pass& pass) {
    const uint16_t* step = reinterpret_cast<const uint16_t*>(pass.weights);
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + pass.row * job.stride;
    Lookahead ahead(*job.weights, pass, ahead_of<R>);
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (size_t r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (size_t k = 0; k < job.weights->padded; k += STEP, step += STEP * WIDTH) add_step(step, x + k, job.stride, ahead, sums);
    store_sums(job, pass.group, pass.row, sums);
}

#define BF16_BLOCK(R) bf16_block<R>
constexpr Block BY_BF16[MOST_BF16_ROWS] = TWELVE(BF16_BLOCK);

// All rows go through compact groups, whose steps follow one another.
template <size_t R>
AVX512_BF16 static void compact_block(const Job& job, size_t first, size_t last) {
    using Steps = CompactSteps<FIRST_CACHE>;
    const uint16_t* x = static_cast<const uint16_t*>(job.x);
    const size_t of_group = job.weights->padded / STEP, all = (last - first) * of_group;
    Steps steps(*job.weights, first);
    NoLookahead ahead;
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (size_t r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (size_t i = 0, group = first, step = 0; i < all + Steps::LAG; i++) {
        if (i < all) steps.fetch(i);
        if (i < Steps::LAG) continue;
        add_step(steps.at(i - Steps::LAG), x + step * STEP, job.stride, ahead, sums);
        if (++step < of_group) continue;
        store_sums(job, group++, 0, sums);
        step = 0;
    }
}

#define COMPACT_BLOCK(R) compact_block<R>
constexpr Kernel BY_COMPACT[MOST_BF16_ROWS] = TWELVE(COMPACT_BLOCK);

AVX512_BF16 static void by_bf16(const Job& job, size_t first, size_t last) {
    if (!job.weights->compact()) return by_blocks<MOST_BF16_ROWS, BY_BF16>(job, first, last);
    if (job.rows <= MOST_BF16_ROWS) return BY_COMPACT[job.rows - 1](job, first, last);
    static thread_local Plain<FIRST_CACHE> decoded;
    for (size_t g = first; g < last; g++) group_by_blocks<MOST_BF16_ROWS, BY_BF16>(job, g, decoded.of(*job.weights, g));
}
