// What the Python modules of kernels share: arguments that are addresses, to keep a call below a
// microsecond, and the choice of an instruction set. Included after PATHS was defined.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <cstddef>
#include <cstring>

namespace {

using outrider::Path;
using outrider::PATHS;

std::atomic<const Path*> selected{nullptr};

// Arguments as addresses and sizes; negative numbers are refused by Python itself.
template <size_t N>
bool read_all(PyObject* const* args, Py_ssize_t given, size_t (&into)[N]) {
    if (given != static_cast<Py_ssize_t>(N)) {
        PyErr_Format(PyExc_TypeError, "%zu arguments expected, %zd given", N, given);
        return false;
    }
    for (size_t i = 0; i < N; i++) {
        into[i] = PyLong_AsSize_t(args[i]);
        if (into[i] == static_cast<size_t>(-1) && PyErr_Occurred()) return false;
    }
    return true;
}

void select_fastest() {
    for (const Path& path : PATHS)
        if (path.usable()) {
            selected = &path;
            return;
        }
}

PyObject* paths(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const Path& path : PATHS)
        if (names && path.usable()) {
            PyObject* name = PyUnicode_FromString(path.name);
            if (!name || PyList_Append(names, name)) Py_CLEAR(names);
            Py_XDECREF(name);
        }
    return names;
}

PyObject* select_path(PyObject*, PyObject* name) {
    const char* wanted = PyUnicode_AsUTF8(name);
    if (!wanted) return nullptr;
    for (const Path& path : PATHS)
        if (!std::strcmp(path.name, wanted) && path.usable()) {
            selected = &path;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "this processor has no path %s", wanted);
}

PyObject* selected_path(PyObject*, PyObject*) { return PyUnicode_FromString(selected.load()->name); }

}  // namespace

#define SELECTING_METHODS                                                                                     \
    {"paths", paths, METH_NOARGS, "Names of the instruction sets that this processor has, fastest first."},   \
        {"select", select_path, METH_O, "What is made from now on computes with this instruction set."},                   \
        {"selected", selected_path, METH_NOARGS, "The instruction set in use."}
