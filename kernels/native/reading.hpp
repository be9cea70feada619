// Reads Python objects from C++: NumPy's arrays, and dataclasses with slots by offset.
// A failed read leaves a Python error behind.

#pragma once

#include <Python.h>
#include <structmember.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

#include <cstddef>
#include <cstdint>

namespace outrider {

// The numbers of a one-dimensional array, while somebody holds the array.
struct Numbers {
    void* data = nullptr;
    int64_t size = 0;

    bool read(PyObject* from, int type, bool writable = false) {
        if (!PyArray_Check(from)) {
            PyErr_Format(PyExc_TypeError, "an array was expected, not a %s", Py_TYPE(from)->tp_name);
            return false;
        }
        auto* array = reinterpret_cast<PyArrayObject*>(from);
        int flags = writable ? NPY_ARRAY_CARRAY : NPY_ARRAY_CARRAY_RO;
        if (PyArray_NDIM(array) != 1 || PyArray_TYPE(array) != type || !PyArray_ISNOTSWAPPED(array) ||
            !PyArray_CHKFLAGS(array, flags)) {
            PyErr_Format(PyExc_TypeError, "an array of %R does not lie as it should", PyArray_DESCR(array));
            return false;
        }
        data = PyArray_DATA(array);
        size = PyArray_DIM(array, 0);
        return true;
    }
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

// Asks for memory before it is needed: a step begins with cold caches, and a message is spread over
// twenty lines of them.
inline void prefetch(const void* from, size_t bytes = 1) {
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// What a first look at an array leads to, once the object itself has come.
inline void prefetch_numbers(PyObject* from) {
    if (!from || !PyArray_Check(from)) return;
    auto* array = reinterpret_cast<PyArrayObject*>(from);
    prefetch(PyArray_DIMS(array));
    prefetch(PyArray_DATA(array));
}

// Where the instances of one class keep an attribute of its __slots__: a load instead of a lookup.
class Slot {
  public:
    bool find(PyTypeObject* type, const char* name) {
        PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name);
        if (!found) return false;
        const PyMemberDef* member =
            Py_IS_TYPE(found, &PyMemberDescr_Type) ? reinterpret_cast<PyMemberDescrObject*>(found)->d_member : nullptr;
        bool usable = member && member->type == T_OBJECT_EX;
        if (usable)
            offset = member->offset;
        else
            PyErr_Format(PyExc_TypeError, "%s.%s is no slot", type->tp_name, name);
        Py_DECREF(found);
        return usable;
    }
    void prefetch(PyObject* of, size_t bytes = 1) const { outrider::prefetch(value(of), bytes); }
    PyObject* value(PyObject* of) const {
        return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(of) + offset);
    }
    // Borrowed; `of` is an instance of the very class.
    PyObject* in(PyObject* of) const {
        PyObject* found = value(of);
        if (!found) PyErr_SetString(PyExc_AttributeError, "a slot is empty");
        return found;
    }
    bool read(PyObject* of, int64_t& into) const {
        PyObject* found = in(of);
        if (!found) return false;
        into = PyLong_AsLongLong(found);
        return into != -1 || !PyErr_Occurred();
    }
    bool read(PyObject* of, double& into) const {
        PyObject* found = in(of);
        if (!found) return false;
        into = PyFloat_AsDouble(found);
        return into != -1.0 || !PyErr_Occurred();
    }
    bool read(PyObject* of, bool& into) const {
        PyObject* found = in(of);
        int truth = found ? PyObject_IsTrue(found) : -1;
        into = truth > 0;
        return truth >= 0;
    }

  private:
    Py_ssize_t offset = 0;
};

inline bool require(PyObject* object, PyTypeObject* type) {
    if (Py_IS_TYPE(object, type)) return true;
    PyErr_Format(PyExc_TypeError, "a %s was expected, not a %s", type->tp_name, Py_TYPE(object)->tp_name);
    return false;
}

}  // namespace outrider
