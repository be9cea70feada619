// The Python module: packed weights that are called with addresses.

#include "attention_arguments.hpp"
#include "layer_calls.hpp"

namespace {

struct PackedObject {
    PyObject_HEAD
    vectorcallfunc call;
    outrider::Linear* linear;
};

PyObject* packed_call(PyObject* self, PyObject* const* args, size_t nargs, PyObject*) {
    size_t a[4];  // x, y, rows, threads
    if (!read_all(args, PyVectorcall_NARGS(nargs), a)) return nullptr;
    const outrider::Linear& linear = *reinterpret_cast<PackedObject*>(self)->linear;
    bool enough = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        linear(reinterpret_cast<const void*>(a[0]), reinterpret_cast<void*>(a[1]), a[2], a[3]);
    } catch (const std::bad_alloc&) {
        enough = false;
    }
    Py_END_ALLOW_THREADS
    if (!enough) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject* packed_new(PyTypeObject* type, PyObject* args, PyObject*) {
    size_t a[6];  // weights, kind, outs, ins, bias or 0, scales of weights of eight bits or 0
    if (!read_all(&PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), a)) return nullptr;
    if (a[1] > 1) return PyErr_Format(PyExc_ValueError, "unknown kind %zu", a[1]);
    PyObject* object = type->tp_alloc(type, 0);
    if (!object) return nullptr;
    auto* packed = reinterpret_cast<PackedObject*>(object);
    packed->call = packed_call;
    Py_BEGIN_ALLOW_THREADS
    try {
        packed->linear = new outrider::Linear(*selected.load(), static_cast<outrider::Kind>(a[1]),
                                              reinterpret_cast<const void*>(a[0]), a[2], a[3],
                                              reinterpret_cast<const float*>(a[4]), reinterpret_cast<const float*>(a[5]));
    } catch (const std::bad_alloc&) {
    }
    Py_END_ALLOW_THREADS
    if (packed->linear) return object;
    Py_DECREF(object);
    return PyErr_NoMemory();
}

void packed_dealloc(PyObject* self) {
    delete reinterpret_cast<PackedObject*>(self)->linear;
    Py_TYPE(self)->tp_free(self);
}

PyObject* packed_nbytes(PyObject* self, void*) {
    return PyLong_FromSize_t(reinterpret_cast<PackedObject*>(self)->linear->bytes());
}

PyGetSetDef packed_attributes[] = {
    {"nbytes", packed_nbytes, nullptr, "Bytes that a call reads of the weights.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyTypeObject packed_type = [] {
    PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
    type.tp_name = "outrider.kernels.native._linear.Packed";
    type.tp_doc = "Packed(weights, kind, outs, ins, bias, scales): weights in the kernels' layout; called as (x, y, rows, threads).";
    type.tp_basicsize = sizeof(PackedObject);
    type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
    type.tp_getset = packed_attributes;
    type.tp_new = packed_new;
    type.tp_dealloc = packed_dealloc;
    type.tp_call = PyVectorcall_Call;
    type.tp_vectorcall_offset = offsetof(PackedObject, call);
    return type;
}();

#include "stack.hpp"

PyObject* threaded(PyObject*, PyObject*) { return PyBool_FromLong(static_cast<bool>(outrider::OpenMP::get())); }

PyMethodDef methods[] = {
    SELECTING_METHODS,
    {"threaded", threaded, METH_NOARGS, "Whether an OpenMP runtime was found; without one a call is not split."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_linear", "Linear layers for few rows.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__linear(void) {
    import_array();
    select_fastest();
    PyObject* created = PyModule_Create(&module);
    if (created && (PyModule_AddType(created, &packed_type) || PyModule_AddType(created, &stack_type))) Py_CLEAR(created);
    return created;
}
