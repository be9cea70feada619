// Runs the native norms, activation and attention over many shapes under sanitizers. Arrays end where
// their memory does: what reads past them is seen.

#define OUTRIDER_WITHOUT_PYTHON
#include "layers.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

using namespace outrider;

std::mt19937 source(1);

void draw(float& into) { into = std::normal_distribution<float>()(source); }
void draw(uint16_t& into) { into = to_bfloat16(std::normal_distribution<float>()(source)); }
double widen(float value) { return value; }
double widen(uint16_t value) { return to_float(value); }

template <class T>
std::vector<T> random(size_t count) {
    std::vector<T> values(count);
    for (T& value : values) draw(value);
    values.shrink_to_fit();
    return values;
}

void expect(const char* what, double got, double want, double tolerance) {
    if (std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) return;
    std::fprintf(stderr, "%s: %g, not %g\n", what, got, want);
    std::exit(1);
}

template <class T>
void check_rows(const Path& path, size_t size, double tolerance) {
    auto x = random<T>(3 * size), add = random<T>(3 * size), weight = random<T>(size), gates = random<T>(6 * size);
    std::vector<T> out(3 * size), sums(x);
    path.kernels<T>().rms_norm(sums.data(), add.data(), weight.data(), out.data(), 3, size, 1e-5f);
    for (size_t row = 0; row < 3; row++) {
        double squares = 0;
        for (size_t i = row * size; i < (row + 1) * size; i++) {
            expect("sum", widen(sums[i]), widen(x[i]) + widen(add[i]), tolerance);
            squares += widen(sums[i]) * widen(sums[i]);
        }
        double scale = 1 / std::sqrt(squares / static_cast<double>(size) + 1e-5);
        for (size_t i = 0; i < size; i++)
            expect("norm", widen(out[row * size + i]), widen(sums[row * size + i]) * scale * widen(weight[i]), tolerance);
    }
    path.kernels<T>().silu_mul(gates.data(), out.data(), 3, size);
    for (size_t row = 0; row < 3; row++)
        for (size_t i = 0; i < size; i++) {
            double gate = widen(gates[row * 2 * size + i]), up = widen(gates[row * 2 * size + size + i]);
            expect("silu", widen(out[row * size + i]), gate / (1 + std::exp(-gate)) * up, tolerance);
        }
}

// Rows at the ends of texts of several lengths, each with a path of two nodes below it.
template <class T>
void check_attention(const Path& path, size_t H, size_t G, size_t D, bool normed) {
    const size_t block = 4, slots = 64;
    const std::vector<int64_t> lengths{1, 3, 4, 5, 17, 24, 20, 24, 24}, firsts{0, 2, 0, 4, 7, 24, 0, 0, 0};
    const size_t rows = lengths.size();
    auto projected = random<T>(rows * (H + 2 * G) * D);
    auto turns = random<float>(rows * 2 * D), norm = random<float>((H + G) * D);
    auto pool = random<T>(slots * 2 * G * D);
    std::vector<int64_t> table{5, 1, 4, 2, 3, 6}, starts(rows, 0), nodes, node_starts{0}, own;
    for (size_t row = 0; row < rows; row++) {
        for (int64_t node : {40 + static_cast<int64_t>(row), 52 + static_cast<int64_t>(row)}) nodes.push_back(node);
        node_starts.push_back(static_cast<int64_t>(nodes.size()));
        own.push_back(nodes.back());
    }
    std::vector<T> out(rows * H * D);
    std::vector<int64_t> positions(rows);
    for (size_t row = 0; row < rows; row++) positions[row] = static_cast<int64_t>(rows - 1 - row);
    Attention a{};
    a.rows = rows, a.heads = H, a.kv_heads = G, a.dim = D, a.block = block, a.eps = 1e-5f;
    a.projected = projected.data(), a.turns = turns.data(), a.positions = positions.data(), a.norm = normed ? norm.data() : nullptr;
    a.slots = own.data(), a.pool = pool.data(), a.tables = table.data(), a.table_starts = starts.data();
    a.first = firsts.data(), a.seen = lengths.data(), a.nodes = nodes.data(), a.node_starts = node_starts.data(), a.out = out.data();
    attention<T>(path, a, 2);
    const bool rounds = !std::strcmp(path.name, "amx") || !std::strcmp(path.name, "avx512_bf16");
    const bool by_pairs = sizeof(T) == 2 && rounds && D % 32 == 0;
    for (size_t row = 0; row < rows; row++)
        for (size_t h = 0; h < H; h++) {
            std::vector<double> query(D), scores, mixed(D);
            double squares = 0;
            const T* x = projected.data() + (row * (H + 2 * G) + h) * D;
            for (size_t i = 0; i < D; i++) squares += widen(x[i]) * widen(x[i]);
            for (size_t i = 0; i < D; i++)
                query[i] = widen(x[i]) * (normed ? norm[h * D + i] / std::sqrt(squares / D + 1e-5) : 1);
            for (size_t i = 0; i < D; i += 2) {
                const float* turn = turns.data() + 2 * (rows - 1 - row) * D + i;
                double real = query[i] * turn[0] - query[i + 1] * turn[1];
                query[i + 1] = query[i] * turn[1] + query[i + 1] * turn[0];
                query[i] = real;
            }
            if (by_pairs)
                for (double& number : query) number = to_float(to_bfloat16(static_cast<float>(number)));
            auto key = [&](size_t j) {
                size_t first = static_cast<size_t>(firsts[row]), seen = static_cast<size_t>(lengths[row]) - first;
                size_t p = first + j;
                size_t slot = static_cast<size_t>(j < seen ? table[p / block] * 4 + static_cast<int64_t>(p % block)
                                                           : nodes[2 * row + j - seen]);
                return pool.data() + (slot * 2 * G + h / (H / G)) * D;
            };
            double most = -1e30, total = 0;
            for (size_t j = 0; j < a.length(row); j++) {
                double score = 0;
                for (size_t i = 0; i < D; i++) score += query[i] * widen(key(j)[i]);
                scores.push_back(score);
                most = std::max(most, score);
            }
            for (size_t j = 0; j < scores.size(); j++) {
                double weight = std::exp(scores[j] - most);
                total += weight;
                for (size_t i = 0; i < D; i++) mixed[i] += weight * widen(key(j)[G * D + i]);
            }
            for (size_t i = 0; i < D; i++)
                expect("attention", widen(out[(row * H + h) * D + i]), mixed[i] / total,
                       by_pairs ? 1e-2 : sizeof(T) == 2 ? 5e-3 : 2e-4);
        }
}

// The best token of p / E, and all shares.
template <class T>
void check_guesses(const Path& path, size_t size) {
    auto logits = random<T>(size);
    for (const Stream stream : {Stream{}, Stream::at(7, 1 << 20)}) {
        std::vector<double> scores(size), shares(size);
        std::vector<int64_t> ids(size);
        double total = 0;
        for (size_t j = 0; j < size; j++) {
            uint32_t interval[1];
            Stream::intervals(stream, j, interval);
            scores[j] = std::exp(widen(logits[j]));
            if (stream.gamma) scores[j] /= -std::log1p(-(interval[0] + 0.5) * 0x1p-32);
            total += scores[j];
        }
        path.kernels<T>().guess(logits.data(), size, stream, size, ids.data(), shares.data());
        for (size_t k = 0; k < size; k++)
            expect("share", shares[k], scores[static_cast<size_t>(ids[k])] / total, 1e-5);
        expect("first", scores[static_cast<size_t>(ids[0])], *std::max_element(scores.begin(), scores.end()), 1e-5);
    }
}

// The least noise / value, of values that end where their memory does.
void check_race(const Path& path, size_t size) {
    auto values = random<float>(size);
    for (float& value : values) value = std::fabs(value);
    std::vector<float> best;
    for (int64_t position = 0; position < 20; position++) {
        const Stream stream = Stream::at(9, position);
        const auto token = static_cast<size_t>(path.race(values.data(), size, stream, best));
        std::vector<double> keys(size);
        for (size_t j = 0; j < size; j++) {
            uint32_t interval[1];
            Stream::intervals(stream, j, interval);
            keys[j] = -std::log1p(-(interval[0] + 0.5) * 0x1p-32) / values[j];
        }
        expect("draw", keys[token], *std::min_element(keys.begin(), keys.end()), 1e-6);
    }
}

}  // namespace

int main() {
    for (const Path& path : PATHS) {
        if (!path.usable()) continue;
        for (size_t size : {1, 7, 8, 9, 31, 64, 100}) {
            check_rows<float>(path, size, 1e-5);
            check_rows<uint16_t>(path, size, 1e-2);
            check_guesses<float>(path, size);
            check_guesses<uint16_t>(path, size);
            check_race(path, size);
        }
        const size_t shapes[][3] = {{1, 1, 2}, {4, 2, 8}, {6, 2, 20}, {3, 1, 64}, {5, 1, 66}, {7, 1, 128}};
        for (auto& shape : shapes)
            for (bool normed : {false, true}) {
                check_attention<float>(path, shape[0], shape[1], shape[2], normed);
                check_attention<uint16_t>(path, shape[0], shape[1], shape[2], normed);
            }
        std::printf("%s: no error\n", path.name);
    }
}
