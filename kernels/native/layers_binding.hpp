// The Python module: functions that are called with addresses.

#include "selecting.hpp"

namespace {

template <class T>
T* at(size_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void norm(const size_t (&a)[7], float eps) {
    selected.load()->kernels<T>().rms_norm(at<T>(a[1]), at<T>(a[2]), at<T>(a[3]), at<T>(a[4]), a[5], a[6], eps);
}

PyObject* rms_norm(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    size_t a[7];  // kind, x, delta or 0, weight, out, rows, size; eps
    if (!read_all(args, nargs - 1, a)) return nullptr;
    double eps = PyFloat_AsDouble(args[7]);
    if (eps == -1.0 && PyErr_Occurred()) return nullptr;
    a[0] ? norm<float>(a, static_cast<float>(eps)) : norm<uint16_t>(a, static_cast<float>(eps));
    Py_RETURN_NONE;
}

PyObject* silu_mul(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    size_t a[5];  // kind, gate_up, out, rows, size
    if (!read_all(args, nargs, a)) return nullptr;
    if (a[0])
        selected.load()->float32.silu_mul(at<float>(a[1]), at<float>(a[2]), a[3], a[4]);
    else
        selected.load()->bfloat16.silu_mul(at<uint16_t>(a[1]), at<uint16_t>(a[2]), a[3], a[4]);
    Py_RETURN_NONE;
}

PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    size_t a[19];
    if (!read_all(args, nargs - 1, a)) return nullptr;
    double eps = PyFloat_AsDouble(args[19]);
    if (eps == -1.0 && PyErr_Occurred()) return nullptr;
    if (a[4] > outrider::MAX_DIM) return PyErr_Format(PyExc_ValueError, "heads of %zu numbers", a[4]);
    outrider::Attention job;
    job.rows = a[1], job.heads = a[2], job.kv_heads = a[3], job.dim = a[4], job.block = a[5];
    job.projected = at<const void>(a[6]), job.turns = at<const float>(a[7]), job.norm = at<const float>(a[8]);
    job.slots = at<const int64_t>(a[9]), job.pool = at<float>(a[10]);
    job.tables = at<const int64_t>(a[11]), job.table_starts = at<const int64_t>(a[12]);
    job.first = at<const int64_t>(a[13]), job.seen = at<const int64_t>(a[14]);
    job.nodes = at<const int64_t>(a[15]), job.node_starts = at<const int64_t>(a[16]);
    job.out = at<void>(a[17]), job.eps = static_cast<float>(eps);
    size_t threads = a[18];
    bool enough = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        a[0] ? outrider::attention<float>(*selected.load(), job, threads)
             : outrider::attention<uint16_t>(*selected.load(), job, threads);
    } catch (const std::bad_alloc&) {
        enough = false;
    }
    Py_END_ALLOW_THREADS
    if (!enough) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

template <class F>
PyCFunction function(F* of) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(of));
}

PyMethodDef methods[] = {
    {"rms_norm", function(rms_norm), METH_FASTCALL, "See kernels/pointwise.py."},
    {"silu_mul", function(silu_mul), METH_FASTCALL, "See kernels/pointwise.py."},
    {"attend", function(attend), METH_FASTCALL, "See kernels/path_attention.py."},
    SELECTING_METHODS,
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_layers", "What lies between a decoder's linear layers.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__layers(void) {
    select_fastest();
    return PyModule_Create(&module);
}
