// Lays out the rows of one forward: what models/batch.py does with NumPy, in one pass over them.

#include "reading.hpp"

#include <algorithm>
#include <vector>

namespace {

using outrider::Numbers;
using outrider::Slot;

constexpr int64_t ROOT = -1;  // as in speculation/tree.py
constexpr size_t ARRAYS = 8;

// One sequence's rows; see Rows in models/batch.py.
struct Part {
    Numbers arrays[ARRAYS];
    int64_t committed, blocks;

    const int64_t* numbers(size_t which) const { return arrays[which].as<int64_t>(); }
    int64_t rows() const { return arrays[0].size; }
    const int64_t* tokens() const { return numbers(0); }
    const int64_t* positions() const { return numbers(1); }
    const int64_t* slots() const { return numbers(2); }
    const int64_t* nodes() const { return numbers(3); }
    const int64_t* node_parents() const { return numbers(4); }
    const int64_t* node_depths() const { return numbers(5); }
    const int64_t* node_slots() const { return numbers(6); }
    const int64_t* table() const { return numbers(7); }

    bool fits() const {
        for (size_t i : {1, 2, 3})
            if (arrays[i].size != rows()) return false;
        for (size_t i : {5, 6})
            if (arrays[i].size != arrays[4].size) return false;
        return committed >= 0 && blocks <= arrays[7].size;
    }

    // Appends the slots from the root down to a row's node that its window still shows; false if there is no such path.
    bool add_path(int64_t node, int64_t before, std::vector<int64_t>& into) const {
        const size_t start = into.size();
        for (int64_t depth = -1; node != ROOT; node = node_parents()[node]) {
            if (node < 0 || node >= arrays[4].size || (depth >= 0 && node_depths()[node] != depth - 1)) return false;
            depth = node_depths()[node];
            if (committed - 1 + depth >= before) into.push_back(node_slots()[node]);
        }
        std::reverse(into.begin() + static_cast<std::ptrdiff_t>(start), into.end());
        return true;
    }
};

struct Batcher {
    PyObject_HEAD
    PyTypeObject* rows;
    Slot arrays[ARRAYS], committed;
    int64_t block;
};

bool read(const Batcher& batcher, PyObject* from, Part& part) {
    if (!outrider::require(from, batcher.rows)) return false;
    for (size_t i = 0; i < ARRAYS; i++) {
        PyObject* array = batcher.arrays[i].in(from);
        if (!array || !part.arrays[i].read(array, NPY_INT64)) return false;
    }
    if (!batcher.committed.read(from, part.committed)) return false;
    part.blocks = (part.committed + batcher.block - 1) / batcher.block;
    if (part.fits()) return true;
    PyErr_SetString(PyExc_ValueError, "arrays of rows that do not belong together");
    return false;
}

// A new array at the given place of a tuple, and its numbers.
int64_t* new_array(PyObject* tuple, Py_ssize_t place, int64_t size) {
    npy_intp length = size;
    PyObject* array = PyArray_SimpleNew(1, &length, NPY_INT64);
    if (!array) return nullptr;
    PyTuple_SET_ITEM(tuple, place, array);
    return static_cast<int64_t*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(array)));
}

// Tokens, positions and slots, then the fields of PathKeys in their order.
PyObject* laid_out(const std::vector<Part>& parts, int64_t rows, int64_t blocks, int64_t window) {
    PyObject* result = PyTuple_New(9);
    if (!result) return nullptr;
    const int64_t sizes[] = {rows, rows, rows, blocks, rows, rows, rows};
    int64_t* into[7];
    for (Py_ssize_t i = 0; i < 7; i++)
        if (!(into[i] = new_array(result, i, sizes[i]))) return Py_DECREF(result), nullptr;
    auto& [tokens, positions, slots, tables, table_starts, first, seen] = into;
    std::vector<int64_t> nodes, node_starts{0};
    int64_t row = 0, table_start = 0;
    for (const Part& part : parts) {
        std::copy_n(part.tokens(), part.rows(), tokens + row);
        std::copy_n(part.positions(), part.rows(), positions + row);
        std::copy_n(part.slots(), part.rows(), slots + row);
        std::copy_n(part.table(), part.blocks, tables + table_start);
        for (int64_t r = 0; r < part.rows(); r++, row++) {
            const int64_t position = positions[row];
            const int64_t before = window < 0 ? 0 : std::max<int64_t>(0, position - window + 1);
            table_starts[row] = table_start;
            seen[row] = std::min(position, part.committed - 1) + 1;
            first[row] = std::min(before, seen[row]);
            if (!part.add_path(part.nodes()[r], before, nodes)) {
                PyErr_Format(PyExc_ValueError, "row %lld has no path", static_cast<long long>(row));
                return Py_DECREF(result), nullptr;
            }
            node_starts.push_back(static_cast<int64_t>(nodes.size()));
        }
        table_start += part.blocks;
    }
    int64_t* paths = new_array(result, 7, static_cast<int64_t>(nodes.size()));
    int64_t* starts = paths ? new_array(result, 8, rows + 1) : nullptr;
    if (!starts) return Py_DECREF(result), nullptr;
    std::copy(nodes.begin(), nodes.end(), paths);
    std::copy(node_starts.begin(), node_starts.end(), starts);
    return result;
}

PyObject* batcher_call(PyObject* self, PyObject* args, PyObject*) {
    const Batcher& batcher = *reinterpret_cast<Batcher*>(self);
    PyObject* given;
    long long window;
    if (!PyArg_ParseTuple(args, "OL", &given, &window)) return nullptr;
    PyObject* sequence = PySequence_Fast(given, "rows of sequences were expected");
    if (!sequence) return nullptr;
    PyObject* result = nullptr;
    try {
        std::vector<Part> parts(static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence)));
        int64_t rows = 0, blocks = 0;
        bool readable = true;
        for (size_t i = 0; readable && i < parts.size(); i++) {
            readable = read(batcher, PySequence_Fast_GET_ITEM(sequence, static_cast<Py_ssize_t>(i)), parts[i]);
            rows += parts[i].rows(), blocks += parts[i].blocks;
        }
        if (readable) result = laid_out(parts, rows, blocks, window);
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    }
    Py_DECREF(sequence);
    return result;
}

PyObject* batcher_new(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject* rows;
    long long block;
    if (!PyArg_ParseTuple(args, "O!L", &PyType_Type, &rows, &block)) return nullptr;
    PyObject* object = type->tp_alloc(type, 0);
    if (!object) return nullptr;
    Batcher& batcher = *reinterpret_cast<Batcher*>(object);
    batcher.rows = reinterpret_cast<PyTypeObject*>(Py_NewRef(rows));
    batcher.block = block;
    const char* names[ARRAYS] = {"tokens",       "positions",   "slots",      "nodes",
                                 "node_parents", "node_depths", "node_slots", "table"};
    bool found = batcher.committed.find(batcher.rows, "committed");
    for (size_t i = 0; found && i < ARRAYS; i++) found = batcher.arrays[i].find(batcher.rows, names[i]);
    if (found) return object;
    Py_DECREF(object);
    return nullptr;
}

void batcher_dealloc(PyObject* self) {
    Py_XDECREF(reinterpret_cast<Batcher*>(self)->rows);
    Py_TYPE(self)->tp_free(self);
}

PyTypeObject batcher_type = [] {
    PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
    type.tp_name = "outrider.kernels.native._batching.Batcher";
    type.tp_doc = "Batcher(Rows, block): called as (parts, window or -1); see models/batch.py.";
    type.tp_basicsize = sizeof(Batcher);
    type.tp_flags = Py_TPFLAGS_DEFAULT;
    type.tp_new = batcher_new;
    type.tp_dealloc = batcher_dealloc;
    type.tp_call = batcher_call;
    return type;
}();

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_batching", "Laying out the rows of a forward.", -1, nullptr,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__batching(void) {
    import_array();
    PyObject* created = PyModule_Create(&module);
    if (created && PyModule_AddType(created, &batcher_type)) Py_CLEAR(created);
    return created;
}
