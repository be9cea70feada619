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

template <class T>
void guess_rows(const void* logits, size_t stride, size_t size, const std::vector<outrider::Stream>& streams,
                size_t count, int64_t* ids, double* shares) {
    const auto guess = selected.load()->kernels<T>().guess;
    const T* row = static_cast<const T*>(logits);
    for (const outrider::Stream& stream : streams) {
        guess(row, size, stream, count, ids, shares);
        row += stride, ids += count, shares += count;
    }
}

void* data_of(PyObject* array) { return PyArray_DATA(reinterpret_cast<PyArrayObject*>(array)); }

PyObject* guess(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    size_t a[5];  // kind, logits, from one row's to the next one's, how many of a row count, tokens wanted
    outrider::Numbers states, positions, noisy;
    if (nargs != 8) return PyErr_Format(PyExc_TypeError, "8 arguments expected, %zd given", nargs);
    if (!read_all(args, 5, a) || !states.read(args[5], NPY_UINT64) || !positions.read(args[6], NPY_INT64) ||
        !noisy.read(args[7], NPY_BOOL))
        return nullptr;
    if (states.size != positions.size || noisy.size != positions.size || !a[4] || a[4] > a[3] || a[3] > a[2])
        return PyErr_Format(PyExc_ValueError, "streams or sizes that do not belong together");
    npy_intp shape[] = {static_cast<npy_intp>(positions.size), static_cast<npy_intp>(a[4])};
    PyObject *ids = PyArray_SimpleNew(2, shape, NPY_INT64), *shares = PyArray_SimpleNew(2, shape, NPY_FLOAT64);
    bool enough = ids && shares;
    Py_BEGIN_ALLOW_THREADS
    try {
        std::vector<outrider::Stream> streams(static_cast<size_t>(positions.size));
        for (size_t row = 0; enough && row < streams.size(); row++)
            if (noisy.as<bool>()[row])
                streams[row] = outrider::Stream::at(states.as<uint64_t>()[row], positions.as<int64_t>()[row]);
        if (enough)
            (a[0] ? guess_rows<float> : guess_rows<uint16_t>)(at<const void>(a[1]), a[2], a[3], streams, a[4],
                                                              static_cast<int64_t*>(data_of(ids)),
                                                              static_cast<double*>(data_of(shares)));
    } catch (const std::bad_alloc&) {
        enough = false;
    }
    Py_END_ALLOW_THREADS
    if (enough) return Py_BuildValue("NN", ids, shares);
    Py_XDECREF(ids);
    Py_XDECREF(shares);
    return PyErr_NoMemory();
}

PyObject* draw(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    size_t a[3];  // values, tokens of a row, threads
    outrider::Numbers base, gamma, chosen;
    if (nargs != 6) return PyErr_Format(PyExc_TypeError, "6 arguments expected, %zd given", nargs);
    if (!read_all(args, 3, a) || !base.read(args[3], NPY_INT64) || !gamma.read(args[4], NPY_INT64) ||
        !chosen.read(args[5], NPY_INT64))
        return nullptr;
    const int64_t *from = chosen.as<int64_t>(), *end = from + chosen.size;
    const bool there = std::all_of(from, end, [&](int64_t stream) { return stream >= 0 && stream < base.size; });
    if (!there || base.size != gamma.size || !a[1])
        return PyErr_Format(PyExc_ValueError, "streams or sizes that do not belong together");
    npy_intp shape[] = {static_cast<npy_intp>(chosen.size)};
    PyObject* tokens = PyArray_SimpleNew(1, shape, NPY_INT64);
    bool enough = tokens;
    Py_BEGIN_ALLOW_THREADS
    try {
        std::vector<outrider::Stream> streams;
        for (const int64_t* each = from; enough && each < end; each++)
            streams.push_back({base.as<uint64_t>()[*each], gamma.as<uint64_t>()[*each]});
        if (enough)
            outrider::draw(*selected.load(), at<const float>(a[0]), a[1], streams, a[2], static_cast<int64_t*>(data_of(tokens)));
    } catch (const std::bad_alloc&) {
        enough = false;
    }
    Py_END_ALLOW_THREADS
    if (enough) return tokens;
    Py_XDECREF(tokens);
    return PyErr_NoMemory();
}

template <class F>
PyCFunction function(F* of) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(of));
}

PyMethodDef methods[] = {
    {"rms_norm", function(rms_norm), METH_FASTCALL, "See kernels/pointwise.py."},
    {"silu_mul", function(silu_mul), METH_FASTCALL, "See kernels/pointwise.py."},
    {"attend", function(attend), METH_FASTCALL, "See kernels/path_attention.py."},
    {"guess", function(guess), METH_FASTCALL, "See kernels/guesses.py."},
    {"draw", function(draw), METH_FASTCALL, "See kernels/gumbel.py."},
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
