// What lies between a decoder's products, row by row. Included after vectors.hpp, like it.

// x += delta if there is one; out = x / sqrt(mean(x^2) + eps) * weight. Rows of `size` elements.
template <class T>
static void rms_norm(T* x, const T* delta, const T* weight, T* out, size_t rows, size_t size, float eps) {
    for (size_t row = 0; row < rows; row++, x += size, out += size) {
        Vec squares = {};
        for (size_t i = 0; i < size; i += LANES) {
            Vec value = load(x + i, size - i);
            if (delta) {
                store(value + load(delta + row * size + i, size - i), x + i, size - i);
                value = load(x + i, size - i);  // as it was rounded
            }
            squares = fma(value, value, squares);
        }
        Vec factor = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps));
        for (size_t i = 0; i < size; i += LANES)
            store(load(x + i, size - i) * factor * load(weight + i, size - i), out + i, size - i);
    }
}

// out = silu(gate) * up; a row of gate_up is `size` gates and as many ups.
template <class T>
static void silu_mul(const T* gate_up, T* out, size_t rows, size_t size) {
    for (size_t row = 0; row < rows; row++, gate_up += 2 * size, out += size)
        for (size_t i = 0; i < size; i += LANES) {
            Vec gate = load(gate_up + i, size - i), up = load(gate_up + size + i, size - i);
            store(gate / (exponential(-gate) + 1.0f) * up, out + i, size - i);
        }
}
