// y = x W^T + b for few rows: the weights cross memory once per call, at memory speed.
//
// Every output of every row is reduced over the inputs in one fixed order, by one accumulator
// (or one sequence of them) that no other row and no other output touches. Rows are blocked and
// outputs are split over threads, the reduction never is: a row's bits depend on the row, the
// weights and the instruction set alone. Between instruction sets they differ.
//
// Layout: groups of 32 outputs. Within a group the inputs follow one another, for float32
// [in][32], for bfloat16 [in / 2][32][2], pairs being what AMX and AVX512-BF16 multiply.
// Missing outputs of the last group are zero and are never stored; bfloat16 inputs are filled up
// with zeros to a multiple of 32, in the weights and in x alike, so that 0 * inf cannot appear.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define OUTRIDER_X86 1
#if defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#include <sys/syscall.h>
#include <unistd.h>
#define OUTRIDER_AMX 1
#endif
#endif

// Inlined into kernels of every instruction set, whose vectors it then uses.
#define INLINE static inline __attribute__((always_inline))

namespace outrider {

constexpr size_t WIDTH = 32;            // outputs of a group
constexpr size_t STEP = 32;             // inputs of an AMX tile; bfloat16 inputs are padded to it
constexpr size_t CHUNK = 32;            // float32 products summed before they join the total
constexpr size_t AHEAD = 2048;          // bytes by which weights are prefetched
constexpr size_t HUGE_PAGE = 2u << 20;
constexpr size_t ARENA = 32u << 20;
constexpr size_t THREAD_WORK = 96u << 10;  // bytes of weights that are worth waking a thread for

enum class Kind { bfloat16 = 0, float32 = 1 };

// ---- memory -------------------------------------------------------------------------------

// Weights lie one after another in huge pages: with small ones a virtual machine spends most of
// the time walking page tables. A block of memory is returned when nobody uses any of it.
struct Arena {
    char* mapped;
    size_t length, used;
    char* base;
    size_t end, users;
};

static std::mutex arena_lock;
static Arena* current_arena = nullptr;

static Arena* new_arena(size_t bytes) {
    size_t end = std::max(ARENA, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    size_t length = end + HUGE_PAGE;
    void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    uintptr_t aligned = (reinterpret_cast<uintptr_t>(mapped) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char* base = reinterpret_cast<char*>(aligned);
#ifdef MADV_HUGEPAGE
    madvise(base, end, MADV_HUGEPAGE);  // where it is refused there is nothing lost but time
#endif
    return new Arena{static_cast<char*>(mapped), length, 0, base, end, 0};
}

static void* take(size_t bytes, Arena*& arena) {
    std::lock_guard<std::mutex> guard(arena_lock);
    bytes = (bytes + 127) / 128 * 128;
    if (!current_arena || current_arena->end - current_arena->used < bytes) {
        Arena* fresh = new_arena(bytes);
        current_arena = fresh;
    }
    arena = current_arena;
    void* memory = arena->base + arena->used;
    arena->used += bytes;
    arena->users++;
    return memory;
}

static void give_back(Arena* arena) {
    std::lock_guard<std::mutex> guard(arena_lock);
    if (--arena->users) return;
    if (current_arena == arena) current_arena = nullptr;
    munmap(arena->mapped, arena->length);
    delete arena;
}

// ---- weights ------------------------------------------------------------------------------

struct Weights {
    Kind kind;
    size_t outs, ins;
    size_t padded;  // inputs in the layout
    size_t groups;
    char* data = nullptr;
    std::vector<float> bias;  // empty, or one per output of every group
    Arena* arena = nullptr;

    Weights(Kind kind, const void* source, size_t outs, size_t ins, const float* offsets)
        : kind(kind), outs(outs), ins(ins) {
        padded = kind == Kind::bfloat16 ? (ins + STEP - 1) / STEP * STEP : ins;
        groups = (outs + WIDTH - 1) / WIDTH;
        if (offsets) {
            bias.assign(groups * WIDTH, 0.0f);
            std::copy(offsets, offsets + outs, bias.begin());
        }
        data = static_cast<char*>(take(bytes(), arena));
        std::memset(data, 0, bytes());
        if (kind == Kind::bfloat16)
            fill<uint16_t, 2>(static_cast<const uint16_t*>(source));
        else
            fill<float, 1>(static_cast<const float*>(source));
    }
    Weights(const Weights&) = delete;
    Weights& operator=(const Weights&) = delete;
    ~Weights() { give_back(arena); }

    size_t size() const { return kind == Kind::bfloat16 ? 2 : 4; }
    size_t group_bytes() const { return padded * WIDTH * size(); }
    size_t bytes() const { return groups * group_bytes(); }
    const char* group(size_t g) const { return data + g * group_bytes(); }

  private:
    template <class T, size_t TOGETHER>
    void fill(const T* source) {
        T* into = reinterpret_cast<T*>(data);
        for (size_t out = 0; out < outs; out++) {
            const T* row = source + out * ins;
            T* column = into + out / WIDTH * WIDTH * padded + out % WIDTH * TOGETHER;
            for (size_t k = 0; k < ins; k++)
                column[k / TOGETHER * WIDTH * TOGETHER + k % TOGETHER] = row[k];
        }
    }
};

// One call. x holds rows of `stride` elements, of the type the kernel wants.
struct Job {
    const Weights* weights;
    const void* x;
    size_t stride;
    void* y;
    size_t rows;
};

using Kernel = void (*)(const Job&, size_t first, size_t last);  // groups [first, last)

// ---- what all kernels share ---------------------------------------------------------------

// To nearest even; NaN stays NaN.
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

INLINE float to_float(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

INLINE void convert(const float* from, uint16_t* to, size_t count) {
    for (size_t j = 0; j < count; j++) to[j] = to_bfloat16(from[j]);
}

INLINE void convert(const float* from, float* to, size_t count) { std::memcpy(to, from, count * sizeof(float)); }

// Adds the bias to the sums [rows][WIDTH] of a group and stores them.
template <class T>
INLINE void store(const Job& job, size_t group, size_t row, size_t rows, float* sums) {
    const Weights& w = *job.weights;
    size_t width = std::min(WIDTH, w.outs - group * WIDTH);
    T* y = static_cast<T*>(job.y) + row * w.outs + group * WIDTH;
    for (size_t r = 0; r < rows; r++, sums += WIDTH, y += w.outs) {
        if (!w.bias.empty()) {
            const float* bias = w.bias.data() + group * WIDTH;
            for (size_t j = 0; j < WIDTH; j++) sums[j] += bias[j];
        }
        if (width == WIDTH)
            convert(sums, y, WIDTH);  // apart, so that the length is known and vectors are used
        else
            convert(sums, y, width);
    }
}

// Splits rows into blocks of like size, at most MOST, and runs `block<R>` on each.
template <int MOST, template <int> class Block>
INLINE void for_row_blocks(const Job& job, size_t group) {
    size_t blocks = (job.rows + MOST - 1) / MOST;
    for (size_t i = 0, row = 0; i < blocks; i++) {
        size_t count = (job.rows - row + blocks - i - 1) / (blocks - i);
        Block<MOST>::run(job, group, row, count);
        row += count;
    }
}

// Turns the number of rows of a block, 1 to R, into a template argument.
#define OUTRIDER_DISPATCH(Name, R)                                                            \
    template <>                                                                               \
    struct Name<0> {                                                                          \
        static void run(const Job&, size_t, size_t, size_t) {}                                \
    };

// ---- portable -----------------------------------------------------------------------------

template <class T>
INLINE void load_weights(const T* from, float (&even)[WIDTH], float (&odd)[WIDTH]);

template <class T>
static void portable(const Job& job, size_t first, size_t last);

}  // namespace outrider
