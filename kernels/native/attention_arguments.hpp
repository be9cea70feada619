// What PathAttention.described says in Python, read by the modules that attend.

#pragma once

#include "attention_job.hpp"
#include "reading.hpp"
#include "selecting.hpp"

namespace outrider {

constexpr Py_ssize_t ATTENTION_ARGUMENTS = 13;

// What is the same in all layers.
inline bool read_attention(PyObject* const* args, Attention& job) {
    size_t a[7];
    Numbers keys[6];
    if (!read_all(args, 7, a)) return false;
    for (size_t i = 0; i < 6; i++)
        if (!keys[i].read(args[7 + i], NPY_INT64)) return false;
    const auto& [tables, table_starts, first, seen, nodes, node_starts] = keys;
    job.rows = static_cast<size_t>(seen.size);
    if (table_starts.size != seen.size || first.size != seen.size || node_starts.size != seen.size + 1) {
        PyErr_Format(PyExc_ValueError, "keys of %zu rows, and other arrays of another number", job.rows);
        return false;
    }
    job.heads = a[0], job.kv_heads = a[1], job.dim = a[2], job.block = a[3];
    job.turns = reinterpret_cast<const float*>(a[4]), job.positions = reinterpret_cast<const int64_t*>(a[5]);
    job.slots = reinterpret_cast<const int64_t*>(a[6]);
    job.tables = tables.as<int64_t>(), job.table_starts = table_starts.as<int64_t>();
    job.first = first.as<int64_t>(), job.seen = seen.as<int64_t>();
    job.nodes = nodes.as<int64_t>(), job.node_starts = node_starts.as<int64_t>();
    return true;
}

}  // namespace outrider
