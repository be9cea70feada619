// A decoder's step in one call: the same kernels in the same order as call by call, so the same bits.
// Included by binding.hpp, into its namespace.

struct Layer {
    const void* input_norm;  // [hidden], in the type of rows, as is post_norm
    const outrider::Linear* qkv;
    const float* qk_norm;  // [heads + kv_heads][dim], or nothing
    const outrider::Linear* output;
    const void* post_norm;
    const outrider::Linear *gate_up, *down;
};

// What comes before the layers and behind them; embedding and norm in the type of rows.
struct Ends {
    const void* embedding;  // [tokens][hidden]
    size_t tokens;
    const void* norm;
    const outrider::Linear* head;
};

// Tokens go in, one for each row; logits [count][vocabulary] of some rows come out. rows: which these are, or
// nothing where they are the ones from `first` on.
struct Step {
    const int64_t* tokens;
    const int64_t* rows;
    size_t first, count;
    void* logits;

    size_t wanted(size_t i) const { return rows ? static_cast<size_t>(rows[i]) : first + i; }
};

struct Stack {
    const outrider::LayerCalls* calls;
    size_t kind;
    float eps;
    Ends ends;
    std::vector<Layer> layers;

    size_t hidden() const { return layers[0].qkv->ins; }
    size_t number_bytes() const { return kind ? sizeof(float) : sizeof(uint16_t); }
    size_t row_bytes() const { return hidden() * number_bytes(); }

    bool fits(const outrider::Attention& a) const {
        for (const Layer& each : layers)
            if (each.qkv->outs != (a.heads + 2 * a.kv_heads) * a.dim || each.output->ins != a.heads * a.dim) return false;
        return a.dim <= outrider::MAX_DIM;
    }

    bool knows(const int64_t* tokens, size_t count) const {
        return std::all_of(tokens, tokens + count, [this](int64_t t) { return t >= 0 && size_t(t) < ends.tokens; });
    }

    // The pools of layers lie behind one another, so many numbers apart.
    void run(outrider::Attention a, const Step& step, size_t apart, size_t threads) const {
        static thread_local std::vector<float> rows, added, normed, heads, attended, both, inner;  // for either type
        rows.resize(a.rows * hidden());
        added.resize(a.rows * hidden());
        normed.resize(std::max(a.rows, step.count) * hidden());
        char *x = reinterpret_cast<char*>(rows.data()), *add = reinterpret_cast<char*>(added.data());
        for (size_t r = 0; r < a.rows; r++)
            std::memcpy(x + r * row_bytes(), part(ends.embedding, static_cast<size_t>(step.tokens[r])), row_bytes());
        const void* left = nullptr;
        a.eps = eps;
        for (size_t l = 0; l < layers.size(); l++) {
            const Layer& layer = layers[l];
            heads.resize(a.rows * layer.qkv->outs);
            attended.resize(a.rows * layer.output->ins);
            both.resize(a.rows * layer.gate_up->outs);
            inner.resize(a.rows * layer.down->ins);
            calls->rms_norm(kind, x, left, layer.input_norm, normed.data(), a.rows, hidden(), eps);
            (*layer.qkv)(normed.data(), heads.data(), a.rows, threads);
            a.projected = heads.data(), a.norm = layer.qk_norm, a.out = attended.data();
            calls->attend(kind, a, threads);
            fetch(layer.post_norm);
            (*layer.output)(attended.data(), add, a.rows, threads);
            calls->rms_norm(kind, x, add, layer.post_norm, normed.data(), a.rows, hidden(), eps);
            (*layer.gate_up)(normed.data(), both.data(), a.rows, threads);
            calls->silu_mul(kind, both.data(), inner.data(), a.rows, layer.down->ins);
            fetch(l + 1 < layers.size() ? layers[l + 1].input_norm : ends.norm);
            (*layer.down)(inner.data(), add, a.rows, threads);
            left = add;
            a.pool = static_cast<char*>(a.pool) + apart * number_bytes();
        }
        char* out = reinterpret_cast<char*>(normed.data());
        for (size_t i = 0; i < step.count; i++, out += row_bytes()) {
            const size_t at = step.wanted(i) * row_bytes();
            calls->rms_norm(kind, x + at, add + at, ends.norm, out, 1, hidden(), eps);
        }
        (*ends.head)(normed.data(), step.logits, step.count, threads);
    }

  private:
    // Weights that a norm will want when the linear layer before it has gone through memory.
    void fetch(const void* norm) const {
        for (size_t at = 0; at < row_bytes(); at += 64) __builtin_prefetch(static_cast<const char*>(norm) + at);
    }
    const char* part(const void* table, size_t row) const { return static_cast<const char*>(table) + row * row_bytes(); }
};

struct StackObject {
    PyObject_HEAD
    vectorcallfunc call;
    Stack* stack;
    PyObject* held;  // what it was made of: the packed weights
};

PyObject* stack_call(PyObject* self, PyObject* const* args, size_t nargs, PyObject*) {
    constexpr Py_ssize_t OWN = outrider::ATTENTION_ARGUMENTS;
    size_t a[8];  // pool, numbers between the pools of layers, then Step, and threads
    if (PyVectorcall_NARGS(nargs) != OWN + 8) return PyErr_Format(PyExc_TypeError, "%zd arguments expected", OWN + 8);
    outrider::Attention job{};
    if (!outrider::read_attention(args, job) || !read_all(args + OWN, 8, a)) return nullptr;
    const Stack& stack = *reinterpret_cast<StackObject*>(self)->stack;
    if (!stack.fits(job)) return PyErr_Format(PyExc_ValueError, "heads that are not those of the layers");
    job.pool = reinterpret_cast<void*>(a[0]);
    const Step step{reinterpret_cast<const int64_t*>(a[2]), reinterpret_cast<const int64_t*>(a[3]), a[4], a[5],
                    reinterpret_cast<void*>(a[6])};
    if (!stack.knows(step.tokens, job.rows)) return PyErr_Format(PyExc_IndexError, "a token that has no embedding");
    bool enough = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        stack.run(job, step, a[1], a[7]);
    } catch (const std::bad_alloc&) {
        enough = false;
    }
    Py_END_ALLOW_THREADS
    if (!enough) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

const outrider::Linear* linear_of(PyObject* packed) { return reinterpret_cast<PackedObject*>(packed)->linear; }

bool read_layer(PyObject* from, Layer& into) {
    unsigned long long input_norm, qk_norm, post_norm;
    PyObject *qkv, *output, *gate_up, *down;
    if (!PyArg_ParseTuple(from, "KO!KO!KO!O!", &input_norm, &packed_type, &qkv, &qk_norm, &packed_type, &output,
                          &post_norm, &packed_type, &gate_up, &packed_type, &down))
        return false;
    into = {reinterpret_cast<const void*>(input_norm), linear_of(qkv), reinterpret_cast<const float*>(qk_norm),
            linear_of(output), reinterpret_cast<const void*>(post_norm), linear_of(gate_up), linear_of(down)};
    return true;
}

// Whether layers and head take and give rows of one size and kind.
bool belong_together(const Stack& stack) {
    if (stack.layers.empty()) return false;
    const outrider::Linear& head = *stack.ends.head;
    if (static_cast<size_t>(head.kind) != stack.kind || head.ins != stack.hidden()) return false;
    for (const Layer& each : stack.layers) {
        for (const outrider::Linear* w : {each.qkv, each.output, each.gate_up, each.down})
            if (static_cast<size_t>(w->kind) != stack.kind) return false;
        if (each.qkv->ins != stack.hidden() || each.output->outs != stack.hidden() || each.down->outs != stack.hidden() ||
            each.gate_up->ins != stack.hidden() || each.gate_up->outs != 2 * each.down->ins)
            return false;
    }
    return true;
}

PyObject* stack_new(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *lent, *layers, *head;
    unsigned long long kind, embedding, tokens, norm;
    float eps;
    if (!PyArg_ParseTuple(args, "OKfO!(KKKO!)", &lent, &kind, &eps, &PyTuple_Type, &layers, &embedding, &tokens, &norm,
                          &packed_type, &head))
        return nullptr;
    const void* calls = PyCapsule_GetPointer(lent, outrider::LayerCalls::NAME);
    if (!calls) return nullptr;
    PyObject* object = type->tp_alloc(type, 0);
    if (!object) return nullptr;
    auto* made = reinterpret_cast<StackObject*>(object);
    made->call = stack_call;
    made->held = Py_NewRef(args);
    bool read = true;
    try {
        const Ends ends{reinterpret_cast<const void*>(embedding), static_cast<size_t>(tokens),
                        reinterpret_cast<const void*>(norm), linear_of(head)};
        made->stack = new Stack{static_cast<const outrider::LayerCalls*>(calls), static_cast<size_t>(kind), eps, ends, {}};
        made->stack->layers.resize(PyTuple_GET_SIZE(layers));
    } catch (const std::bad_alloc&) {
        Py_DECREF(object);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; read && i < PyTuple_GET_SIZE(layers); i++)
        read = read_layer(PyTuple_GET_ITEM(layers, i), made->stack->layers[i]);
    if (read && belong_together(*made->stack)) return object;
    if (read) PyErr_SetString(PyExc_ValueError, "the weights are not those of one decoder's layers");
    Py_DECREF(object);
    return nullptr;
}

void stack_dealloc(PyObject* self) {
    auto* stack = reinterpret_cast<StackObject*>(self);
    delete stack->stack;
    Py_XDECREF(stack->held);
    Py_TYPE(self)->tp_free(self);
}

PyTypeObject stack_type = [] {
    PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
    type.tp_name = "outrider.kernels.native._linear.Stack";
    type.tp_doc = "Stack(calls, kind, eps, layers, ends): see kernels/layer_stack.py.";
    type.tp_basicsize = sizeof(StackObject);
    type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
    type.tp_new = stack_new;
    type.tp_dealloc = stack_dealloc;
    type.tp_call = PyVectorcall_Call;
    type.tp_vectorcall_offset = offsetof(StackObject, call);
    return type;
}();
