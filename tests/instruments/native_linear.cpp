// Runs the native linear layers over many shapes under sanitizers. Inputs end where their memory
// ends: what reads past them, tiles included, meets a page that may not be touched.

#define OUTRIDER_WITHOUT_PYTHON
#include "linear.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

using namespace outrider;

// `count` elements at the end of their pages.
template <class T>
struct AtTheEdge {
    size_t length;
    char* mapped;
    T* data;

    explicit AtTheEdge(size_t count) {
        size_t bytes = count * sizeof(T), page = 4096, whole = (bytes + page - 1) / page * page;
        length = whole + page;
        mapped = static_cast<char*>(mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (mapped == MAP_FAILED || mprotect(mapped + whole, page, PROT_NONE)) std::abort();
        data = reinterpret_cast<T*>(mapped + whole - bytes);
    }
    AtTheEdge(const AtTheEdge&) = delete;
    ~AtTheEdge() { munmap(mapped, length); }
};

float widen(float value) { return value; }
float widen(uint16_t value) { return to_float(value); }
float widen(int8_t value) { return value; }
void narrow(float value, float& into) { into = value; }
void narrow(float value, int8_t& into) { into = static_cast<int8_t>(value * 32); }
void narrow(float value, uint16_t& into) { into = to_bfloat16(value); }

// T: of rows and results. W: of weights.
template <class T, class W = T>
void check(const Path& path, size_t outs, size_t ins, size_t rows, bool with_bias) {
    std::mt19937 random(static_cast<unsigned>(outs * 1000 + ins));
    std::normal_distribution<float> normal;
    AtTheEdge<W> source(outs * ins);
    AtTheEdge<T> x(rows * ins), y(rows * outs);
    AtTheEdge<float> bias(outs), scales(outs);
    for (size_t i = 0; i < outs * ins; i++) narrow(normal(random), source.data[i]);
    for (size_t i = 0; i < rows * ins; i++) narrow(normal(random), x.data[i]);
    for (size_t i = 0; i < outs; i++) bias.data[i] = normal(random), scales.data[i] = sizeof(W) == 1 ? normal(random) : 1;
    Kind kind = sizeof(T) == 2 ? Kind::bfloat16 : Kind::float32;
    const Linear linear(path, kind, source.data, outs, ins, with_bias ? bias.data : nullptr,
                        sizeof(W) == 1 ? scales.data : nullptr);
    // With weights of eight bits such rows may become integers.
    const double tolerance = sizeof(T) == 2 && sizeof(W) == 1 ? 1e-4 : 1e-6;
    linear(x.data, y.data, rows, 2);
    for (size_t r = 0; r < rows; r++)
        for (size_t o = 0; o < outs; o++) {
            double sum = with_bias ? bias.data[o] : 0, size = std::fabs(sum);
            for (size_t k = 0; k < ins; k++) {
                double product = static_cast<double>(widen(x.data[r * ins + k])) * widen(source.data[o * ins + k]) *
                                 scales.data[o];
                sum += product;
                size += std::fabs(product);
            }
            double error = std::fabs(sum - widen(y.data[r * outs + o]));
            if (error <= size * tolerance + std::fabs(sum) * (sizeof(T) == 2 ? 1.0 / 256 : 1e-6)) continue;
            std::fprintf(stderr, "%s: %zux%zu, row %zu of %zu, output %zu: off by %g of %g\n", path.name, outs, ins, r,
                         rows, o, error, sum);
            std::exit(1);
        }
}

#if OUTRIDER_AMX
// Compact weights are the weights, bit for bit: every bfloat16 number once in each of several surroundings.
VBMI2 void check_compact() {
    constexpr size_t outs = 96, ins = 65 * STEP;
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<uint16_t> source(outs * ins);
    for (const size_t apart : {1, 2, 3}) {
        for (auto& weight : source) weight = to_bfloat16(normal(random));
        for (size_t bits = 0; bits < 1u << 16; bits++) source[outs + bits * apart] = static_cast<uint16_t>(bits);
        const Weights compact(Kind::bfloat16, source.data(), outs, ins, nullptr, nullptr, true);
        const Weights plain(Kind::bfloat16, source.data(), outs, ins, nullptr, nullptr, false);
        bool same = compact.compact() && !plain.compact() && compact.bytes() < plain.bytes() * 9 / 10;
        for (size_t g = 0; g < plain.groups; g++) {
            Plain decoded;
            same = same && !std::memcmp(decoded.of(compact, g), plain.group(g), plain.group_bytes());
            CompactSteps steps(compact, g);
            for (size_t i = 0; i < ins / STEP; i++) {
                steps.fetch(i);
                if (i < CompactSteps::LAG) continue;
                const char* step = plain.group(g) + (i - CompactSteps::LAG) * STEP * WIDTH * 2;
                same = same && !std::memcmp(steps.at(i - CompactSteps::LAG), step, STEP * WIDTH * 2);
            }
        }
        if (!same) std::fprintf(stderr, "compact weights, numbers %zu apart, are others\n", apart), std::exit(1);
    }
    for (size_t i = 0; i < source.size(); i++) source[i] = static_cast<uint16_t>(random());
    if (Weights(Kind::bfloat16, source.data(), outs, ins, nullptr, nullptr, true).compact())
        std::fprintf(stderr, "weights of which nothing can be saved are compact\n"), std::exit(1);
    std::printf("compact: no error\n");
}
#endif

}  // namespace

int main() {
#if OUTRIDER_AMX
    if (has_amx()) check_compact();
#endif
    const size_t shapes[][2] = {{1, 1}, {1, 129}, {33, 7}, {31, 33}, {32, 32}, {64, 95}, {80, 64}};
    const size_t rows[] = {1, 2, 3, 5, 12, 13, 16, 17, 31, 32, 33, 47, 64, 65};
    for (const Path& path : PATHS) {
        if (!path.usable()) continue;
        for (auto& shape : shapes)
            for (size_t count : rows)
                for (bool bias : {false, true}) {
                    check<uint16_t>(path, shape[0], shape[1], count, bias);
                    check<float>(path, shape[0], shape[1], count, bias);
                    check<uint16_t, int8_t>(path, shape[0], shape[1], count, bias);
                    check<float, int8_t>(path, shape[0], shape[1], count, bias);
                }
        std::printf("%s: no error\n", path.name);
    }
}
