// The Python module: functions that are called with addresses.

#include "attention_arguments.hpp"
#include "layer_calls.hpp"

namespace {

template <class T>
T* at(size_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void norm_rows(void* x, const void* add, const void* weight, void* out, size_t rows, size_t size, float eps) {
    selected.load()->kernels<T>().rms_norm(static_cast<T*>(x), static_cast<const T*>(add), static_cast<const T*>(weight),
                                           static_cast<T*>(out), rows, size, eps);
}

template <class T>
void activate_rows(const void* gate_up, void* out, size_t rows, size_t size) {
    selected.load()->kernels<T>().silu_mul(static_cast<const T*>(gate_up), static_cast<T*>(out), rows, size);
}

const outrider::LayerCalls calls = {
    [](size_t kind, void* x, const void* add, const void* weight, void* out, size_t rows, size_t size, float eps) {
        (kind ? norm_rows<float> : norm_rows<uint16_t>)(x, add, weight, out, rows, size, eps);
    },
    [](size_t kind, const void* gate_up, void* out, size_t rows, size_t size) {
        (kind ? activate_rows<float> : activate_rows<uint16_t>)(gate_up, out, rows, size);
    },
    [](size_t kind, const outrider::Attention& job, size_t threads) {
        (kind ? outrider::attention<float> : outrider::attention<uint16_t>)(*selected.load(), job, threads);
    },
};

PyObject* rms_norm(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    size_t a[7];  // kind, x, delta or 0, weight, out, rows, size; eps
    if (!read_all(args, nargs - 1, a)) return nullptr;
    double eps = PyFloat_AsDouble(args[7]);
    if (eps == -1.0 && PyErr_Occurred()) return nullptr;
    calls.rms_norm(a[0], at<void>(a[1]), at<void>(a[2]), at<void>(a[3]), at<void>(a[4]), a[5], a[6],
                   static_cast<float>(eps));
    Py_RETURN_NONE;
}

PyObject* silu_mul(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    size_t a[5];  // kind, gate_up, out, rows, size
    if (!read_all(args, nargs, a)) return nullptr;
    calls.silu_mul(a[0], at<void>(a[1]), at<void>(a[2]), a[3], a[4]);
    Py_RETURN_NONE;
}

PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    constexpr Py_ssize_t OWN = outrider::ATTENTION_ARGUMENTS;
    size_t a[6];  // kind, heads, norm or 0, pool, out, threads; eps
    if (nargs != OWN + 7) return PyErr_Format(PyExc_TypeError, "%zd arguments expected, %zd given", OWN + 7, nargs);
    outrider::Attention job{};
    if (!outrider::read_attention(args, job) || !read_all(args + OWN, 6, a)) return nullptr;
    double eps = PyFloat_AsDouble(args[OWN + 6]);
    if (eps == -1.0 && PyErr_Occurred()) return nullptr;
    if (job.dim > outrider::MAX_DIM) return PyErr_Format(PyExc_ValueError, "heads of %zu numbers", job.dim);
    job.projected = at<const void>(a[1]), job.norm = at<const float>(a[2]), job.pool = at<void>(a[3]);
    job.out = at<void>(a[4]), job.eps = static_cast<float>(eps);
    bool enough = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        calls.attend(a[0], job, a[5]);
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
    import_array();
    select_fastest();
    PyObject* created = PyModule_Create(&module);
    PyObject* lent = created ? PyCapsule_New(const_cast<outrider::LayerCalls*>(&calls),
                                             outrider::LayerCalls::NAME, nullptr)
                             : nullptr;
    if (created && (!lent || PyModule_AddObjectRef(created, "calls", lent))) Py_CLEAR(created);
    Py_XDECREF(lent);
    return created;
}
