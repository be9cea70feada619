// What the module of layers lends to that of linear layers, in a capsule: its kernels of one instruction set.

#pragma once

#include <cstddef>

#include "attention_job.hpp"

namespace outrider {

struct LayerCalls {
    static constexpr const char* NAME = "outrider.layers";
    // Arguments as in kernels/pointwise.py; kind first, that of the rows.
    void (*rms_norm)(size_t, void* x, const void* add, const void* weight, void* out, size_t rows, size_t size, float);
    void (*silu_mul)(size_t, const void* gate_up, void* out, size_t rows, size_t size);
    void (*attend)(size_t, const Attention&, size_t threads);
};

}  // namespace outrider
