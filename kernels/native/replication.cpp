// The Python module of what a target does with the growth that drafters send: hundreds of messages
// between two steps, each of a few nodes, so that what Python does for each is the price.
//
// Everything in a message comes from another process: its arrays are checked for type and length
// here, their values in grafting.hpp.

#define PY_SSIZE_T_CLEAN
#include "reading.hpp"

#include "grafting.hpp"

#include <new>

namespace {

using namespace outrider;

// Arrays that have the lengths and types which the reference gives them.
struct Grafter {
    PyObject_HEAD
    PyTypeObject* message;
    PyObject* arrays;  // what the pointers below point into
    Slot first_id, base_length, parents, tokens, scores;
    Tree tree;
    Window window;
    int64_t vocab_size;
};

enum class Outcome { done, declined, failed };

// Room that all calls share: they come one at a time, under Python's lock.
Scratch scratch;

// Appends the nodes of a message, if it is the next; the last that was is noted.
Outcome take(Grafter& grafter, PyObject* message, int64_t& next_id, PyObject*& last) {
    int64_t first_id, base;
    if (!require(message, grafter.message) || !grafter.first_id.read(message, first_id) ||
        !grafter.base_length.read(message, base))
        return Outcome::failed;
    if (first_id > next_id) return Outcome::declined;
    if (first_id < next_id) return Outcome::done;
    Numbers parents, tokens, scores;
    PyObject *of_parents = grafter.parents.in(message), *of_tokens = grafter.tokens.in(message),
             *of_scores = grafter.scores.in(message);
    if (!of_parents || !of_tokens || !of_scores || !parents.read(of_parents, NPY_INT64) ||
        !tokens.read(of_tokens, NPY_INT64) || !scores.read(of_scores, NPY_FLOAT32))
        return Outcome::failed;
    if (parents.size != tokens.size || scores.size != tokens.size) {
        PyErr_Format(PyExc_ValueError, "%zd parents, %zd tokens and %zd scores differ",
                     static_cast<Py_ssize_t>(parents.size), static_cast<Py_ssize_t>(tokens.size),
                     static_cast<Py_ssize_t>(scores.size));
        return Outcome::failed;
    }
    for (int64_t i = 0; i < tokens.size; i++)
        scratch.arrived.push_back({parents.as<int64_t>()[i], tokens.as<int64_t>()[i], base, scores.as<float>()[i],
                                   NO_POSITION, NOWHERE, GONE});
    next_id += tokens.size;
    last = message;
    return Outcome::done;
}

PyObject* grafter_place(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Grafter& grafter = *reinterpret_cast<Grafter*>(self);
    if (count != 7 || !PyList_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "place(messages, next_id, num_free, next_birth, text, births, positions)");
        return nullptr;
    }
    int64_t numbers[3];
    for (int i = 0; i < 3; i++) {
        numbers[i] = PyLong_AsLongLong(args[1 + i]);
        if (numbers[i] == -1 && PyErr_Occurred()) return nullptr;
    }
    auto [first, num_free, next_birth] = numbers;
    Numbers ids, births, positions;
    if (!ids.read(args[4], NPY_INT64) || !births.read(args[5], NPY_INT64) || !positions.read(args[6], NPY_INT64))
        return nullptr;
    if (births.size != positions.size || first < 0 || num_free < 0 || num_free > grafter.tree.capacity) {
        PyErr_SetString(PyExc_ValueError, "numbers are out of range, or births and positions differ");
        return nullptr;
    }
    Text text{ids.as<int64_t>(), ids.size, births.as<int64_t>(), positions.as<int64_t>(), births.size};
    Tree& tree = grafter.tree;
    tree.num_free = num_free;
    tree.next_birth = next_birth;
    try {
        scratch.arrived.clear();
        int64_t next_id = first, stale = 0;
        PyObject* last = Py_None;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); i++) {
            Outcome outcome = take(grafter, PyList_GET_ITEM(args[0], i), next_id, last);
            if (outcome == Outcome::failed) return nullptr;
            if (outcome == Outcome::declined) Py_RETURN_NONE;
        }
        if (!Grafting(tree, grafter.window, text, scratch).place(first, grafter.vocab_size, stale)) Py_RETURN_NONE;
        return Py_BuildValue("LLLLO", static_cast<long long>(next_id - first), static_cast<long long>(stale),
                             static_cast<long long>(tree.num_free), static_cast<long long>(tree.next_birth), last);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

PyObject* grafter_new(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *message, *arrays[11];
    long long vocab_size, max_depth;
    double smallest;
    if (!PyArg_ParseTuple(args, "O!(OOOOOOOO)(OOO)LLd", &PyType_Type, &message, &arrays[0], &arrays[1], &arrays[2],
                          &arrays[3], &arrays[4], &arrays[5], &arrays[6], &arrays[7], &arrays[8], &arrays[9],
                          &arrays[10], &vocab_size, &max_depth, &smallest))
        return nullptr;
    // The free list has no entry for the root.
    constexpr int FREE = 5, SCORES = 6, EXPANDED = 7, WINDOW = 8;
    Numbers numbers[11];
    for (int i = 0; i < 11; i++) {
        int dtype = i == SCORES ? NPY_FLOAT64 : i == EXPANDED ? NPY_BOOL : NPY_INT64;
        if (!numbers[i].read(arrays[i], dtype, true)) return nullptr;
        int64_t expected = i < WINDOW ? numbers[FREE > i ? 0 : FREE].size + (FREE > i ? 0 : i != FREE) : numbers[WINDOW].size;
        if (numbers[i].size != expected || (i == FREE && numbers[i].size != numbers[0].size - 1) || !expected) {
            PyErr_SetString(PyExc_ValueError, "the arrays' lengths do not fit each other");
            return nullptr;
        }
    }
    PyObject* object = type->tp_alloc(type, 0);
    if (!object) return nullptr;
    Grafter& g = *reinterpret_cast<Grafter*>(object);
    g.message = reinterpret_cast<PyTypeObject*>(Py_NewRef(message));
    g.arrays = Py_NewRef(args);
    g.vocab_size = vocab_size;
    int64_t* whole[11];
    for (int i = 0; i < 11; i++) whole[i] = static_cast<int64_t*>(numbers[i].data);
    g.tree = {numbers[FREE].size, max_depth, smallest, whole[0], whole[1], whole[2], whole[3], whole[4], whole[FREE],
              static_cast<double*>(numbers[SCORES].data), static_cast<uint8_t*>(numbers[EXPANDED].data), 0, 0};
    g.window = {numbers[WINDOW].size, whole[WINDOW], whole[WINDOW + 1], whole[WINDOW + 2]};
    if (g.first_id.find(g.message, "first_id") && g.base_length.find(g.message, "base_length") &&
        g.parents.find(g.message, "parents") && g.tokens.find(g.message, "tokens") && g.scores.find(g.message, "scores"))
        return object;
    Py_DECREF(object);
    return nullptr;
}

void grafter_dealloc(PyObject* self) {
    Py_XDECREF(reinterpret_cast<Grafter*>(self)->message);
    Py_XDECREF(reinterpret_cast<Grafter*>(self)->arrays);
    Py_TYPE(self)->tp_free(self);
}

// Sums over messages.
struct Tallier {
    PyObject_HEAD
    PyTypeObject *received, *growth;
    Slot event, num_bytes;
    Slot session, generation, seen_commit, base_length, first_id, parents, tokens, scores;
    Slot final, draft_steps, draft_rows, draft_seconds, sent_at;

    PyObject* growth_at(PyObject* list, Py_ssize_t index) const {
        PyObject* received = PyList_GET_ITEM(list, index);
        PyObject* found = Py_IS_TYPE(received, this->received) ? event.value(received) : nullptr;
        return found && Py_IS_TYPE(found, growth) ? found : nullptr;
    }
};

constexpr Py_ssize_t NEAR = 3, FAR = 8, FARTHER = 16;  // messages ahead

// Growth by sessions, in order, up to the first event that is something else.
PyObject* tallier_by_session(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    const Tallier& t = *reinterpret_cast<Tallier*>(self);
    if (nargs != 2 || !PyList_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "by_session(arrived, start)");
        return nullptr;
    }
    Py_ssize_t at = PyLong_AsSsize_t(args[1]), count = PyList_GET_SIZE(args[0]);
    if (at < 0) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "start is %zd", at);
    PyObject* grown = PyDict_New();
    for (; grown && at < count && at < PyList_GET_SIZE(args[0]); at++) {
        if (at + FARTHER < count) prefetch(PyList_GET_ITEM(args[0], at + FARTHER), 64);
        if (at + FAR < count)
            if (PyObject* next = PyList_GET_ITEM(args[0], at + FAR); Py_IS_TYPE(next, t.received)) t.event.prefetch(next, 136);
        PyObject *growth = t.growth_at(args[0], at), *session = growth ? t.session.value(growth) : nullptr;
        if (!session) break;
        PyObject* arrived = PyDict_GetItemWithError(grown, session);
        if (!arrived && !PyErr_Occurred() && (arrived = PyList_New(0))) {
            int failed = PyDict_SetItem(grown, session, arrived);
            Py_DECREF(arrived);
            if (failed) arrived = nullptr;
        }
        if (!arrived || PyList_Append(arrived, PyList_GET_ITEM(args[0], at))) Py_CLEAR(grown);
    }
    return grown ? Py_BuildValue("Nn", grown, at) : nullptr;
}

PyObject* tallier_tally(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Tallier& t = *reinterpret_cast<Tallier*>(self);
    if (count != 3 || !PyList_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "tally(arrived, generation, sequence)");
        return nullptr;
    }
    int64_t wanted = PyLong_AsLongLong(args[1]), sequence = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred()) return nullptr;
    PyObject* messages = PyList_New(0);
    if (!messages) return nullptr;
    int64_t nodes = 0, bytes = 0, steps = 0, rows = 0, stale_messages = 0, stale_nodes = 0, seen = 0;
    int64_t round_steps = 0;
    double seconds = 0, round_seconds = 0, latest = -Py_HUGE_VAL;
    bool ended = false;
    const Py_ssize_t length = PyList_GET_SIZE(args[0]);
    for (Py_ssize_t i = 0; i < length && i < PyList_GET_SIZE(args[0]); i++) {
        if (PyObject* next = i + FAR < length ? t.growth_at(args[0], i + FAR) : nullptr) {
            for (const Slot* each : {&t.parents, &t.tokens, &t.scores}) each->prefetch(next, sizeof(PyArrayObject_fields));
            for (const Slot* each : {&t.draft_seconds, &t.sent_at, &t.first_id, &t.base_length}) each->prefetch(next);
        }
        if (PyObject* next = i + NEAR < length ? t.growth_at(args[0], i + NEAR) : nullptr)
            for (const Slot* each : {&t.parents, &t.tokens, &t.scores}) prefetch_numbers(each->value(next));
        PyObject* received = PyList_GET_ITEM(args[0], i);
        PyObject* growth = require(received, t.received) ? t.event.in(received) : nullptr;
        int64_t generation, seen_commit, its_bytes, its_steps, its_rows;
        double its_seconds, sent_at;
        bool final;
        PyObject* tokens = growth && require(growth, t.growth) ? t.tokens.in(growth) : nullptr;
        Py_ssize_t its_nodes = tokens ? PyObject_Size(tokens) : -1;
        if (its_nodes < 0 || !t.generation.read(growth, generation)) goto failed;
        if (generation != wanted) {
            stale_messages++;
            stale_nodes += its_nodes;
            continue;
        }
        if (!t.num_bytes.read(received, its_bytes) || !t.seen_commit.read(growth, seen_commit) ||
            !t.draft_steps.read(growth, its_steps) || !t.draft_rows.read(growth, its_rows) ||
            !t.draft_seconds.read(growth, its_seconds) || !t.sent_at.read(growth, sent_at) ||
            !t.final.read(growth, final) || PyList_Append(messages, growth))
            goto failed;
        nodes += its_nodes;
        bytes += its_bytes;
        steps += its_steps;
        rows += its_rows;
        seconds += its_seconds;
        seen = std::max(seen, seen_commit);
        latest = std::max(latest, sent_at);
        if (seen_commit != sequence) continue;
        round_steps += its_steps;
        round_seconds += its_seconds;
        ended = final;
    }
    using wide = long long;
    return Py_BuildValue("NLLLLdLdLdNLL", messages, static_cast<wide>(nodes), static_cast<wide>(bytes),
                         static_cast<wide>(steps), static_cast<wide>(rows), seconds, static_cast<wide>(seen), latest,
                         static_cast<wide>(round_steps), round_seconds, PyBool_FromLong(ended),
                         static_cast<wide>(stale_messages), static_cast<wide>(stale_nodes));
failed:
    Py_DECREF(messages);
    return nullptr;
}

PyObject* tallier_between(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Tallier& t = *reinterpret_cast<Tallier*>(self);
    if (count != 3 || !PyList_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "seconds_between(messages, began, ended)");
        return nullptr;
    }
    double began = PyFloat_AsDouble(args[1]), ended = PyFloat_AsDouble(args[2]), total = 0;
    if (PyErr_Occurred()) return nullptr;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); i++) {
        PyObject* growth = PyList_GET_ITEM(args[0], i);
        double sent_at, seconds;
        if (!require(growth, t.growth) || !t.sent_at.read(growth, sent_at) || !t.draft_seconds.read(growth, seconds))
            return nullptr;
        if (began <= sent_at && sent_at <= ended) total += seconds;
    }
    return PyFloat_FromDouble(total);
}

PyObject* tallier_new(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *received, *growth;
    if (!PyArg_ParseTuple(args, "O!O!", &PyType_Type, &received, &PyType_Type, &growth)) return nullptr;
    PyObject* object = type->tp_alloc(type, 0);
    if (!object) return nullptr;
    Tallier& t = *reinterpret_cast<Tallier*>(object);
    t.received = reinterpret_cast<PyTypeObject*>(Py_NewRef(received));
    t.growth = reinterpret_cast<PyTypeObject*>(Py_NewRef(growth));
    if (t.event.find(t.received, "event") && t.num_bytes.find(t.received, "num_bytes") &&
        t.session.find(t.growth, "session") && t.base_length.find(t.growth, "base_length") &&
        t.first_id.find(t.growth, "first_id") && t.parents.find(t.growth, "parents") &&
        t.scores.find(t.growth, "scores") && t.generation.find(t.growth, "generation") && t.seen_commit.find(t.growth, "seen_commit") &&
        t.tokens.find(t.growth, "tokens") && t.final.find(t.growth, "final") &&
        t.draft_steps.find(t.growth, "draft_steps") && t.draft_rows.find(t.growth, "draft_rows") &&
        t.draft_seconds.find(t.growth, "draft_seconds") && t.sent_at.find(t.growth, "sent_at"))
        return object;
    Py_DECREF(object);
    return nullptr;
}

void tallier_dealloc(PyObject* self) {
    Py_XDECREF(reinterpret_cast<Tallier*>(self)->received);
    Py_XDECREF(reinterpret_cast<Tallier*>(self)->growth);
    Py_TYPE(self)->tp_free(self);
}

template <class F>
PyCFunction fast(F function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef grafter_methods[] = {
    {"place", fast(grafter_place), METH_FASTCALL,
     "place(messages, next_id, num_free, next_birth, text, births, positions): new nodes, stale ones, num_free "
     "and next_birth afterwards, and the last new message; or None, and nothing has changed."},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef tallier_methods[] = {
    {"by_session", fast(tallier_by_session), METH_FASTCALL,
     "by_session(arrived, start): growth by sessions, and the index of the first event that is none."},
    {"tally", fast(tallier_tally), METH_FASTCALL, "tally(arrived, generation, sequence): the fields of a Batch."},
    {"seconds_between", fast(tallier_between), METH_FASTCALL,
     "seconds_between(messages, began, ended): draft_seconds of what was sent meanwhile."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject type_of(const char* name, size_t size, newfunc make, destructor drop, PyMethodDef* methods) {
    PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
    type.tp_name = name;
    type.tp_basicsize = static_cast<Py_ssize_t>(size);
    type.tp_flags = Py_TPFLAGS_DEFAULT;
    type.tp_new = make;
    type.tp_dealloc = drop;
    type.tp_methods = methods;
    return type;
}

PyTypeObject grafter_type = type_of("outrider.kernels.native._replication.Grafter", sizeof(Grafter), grafter_new,
                                    grafter_dealloc, grafter_methods);
PyTypeObject tallier_type = type_of("outrider.kernels.native._replication.Tallier", sizeof(Tallier), tallier_new,
                                    tallier_dealloc, tallier_methods);

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_replication", "Taking in what drafters have grown.", -1, nullptr,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__replication(void) {
    import_array();
    if (PyType_Ready(&grafter_type) || PyType_Ready(&tallier_type)) return nullptr;
    PyObject* created = PyModule_Create(&module);
    if (created && (PyModule_AddObjectRef(created, "Grafter", reinterpret_cast<PyObject*>(&grafter_type)) ||
                    PyModule_AddObjectRef(created, "Tallier", reinterpret_cast<PyObject*>(&tallier_type))))
        Py_CLEAR(created);
    return created;
}
