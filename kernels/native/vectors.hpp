// LANES floats at a time. Included once per instruction set, within a namespace of its own and after the
// types, `splat`, `in_register`, `widen`, `narrow`, `fma`, `larger`, `smaller`, `sum`, `largest` and `transpose` were defined there; what is here is compiled for that instruction set.

INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }

INLINE Vec load(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vec)(widen(halves) << 16);
}

INLINE void store(Vec value, float* to) { *reinterpret_cast<Vec*>(to) = value; }

INLINE void store(Vec value, uint16_t* to) {  // see to_bfloat16
    Ints bits = (Ints)value;
    Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
    rounded = value != value ? Ints{} + 0x7fc00000 : rounded;
    Halves halves = narrow((rounded >> 16) & 0xffff);
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of them, zeros behind.
template <class T>
INLINE Vec load(const T* from, size_t count) {
    if (count >= LANES) return load(from);
    T values[LANES] = {};
    std::memcpy(values, from, count * sizeof(T));
    return load(values);
}

template <class T>
INLINE void store(Vec value, T* to, size_t count) {
    if (count >= LANES) return store(value, to);
    T values[LANES];
    store(value, values);
    std::memcpy(to, values, count * sizeof(T));
}

// e^x to 2 units in the last place, 0 below -87.7; NaN stays NaN. Cephes' way: 2^n times a
// polynomial of what is left of x, which lies within half of log 2.
INLINE Vec exponential(Vec x) {
    const Vec magic = splat(12582912.0f);
    x = larger(splat(-88.0f), smaller(splat(88.3762626647949f), x));  // n is from -127, for which 2^n is 0
    Vec shifted = fma(x, splat(1.44269504088896341f), magic), n = shifted - magic;
    Vec r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Vec y = splat(1.9875691500e-4f);
    y = fma(y, r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(y, r * r, r + 1.0f);
    Vec scale = (Vec)(((Ints)shifted - (Ints)magic + 127) << 23);
    return y * scale;
}
