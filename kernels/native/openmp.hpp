// GNU OpenMP as PyTorch has loaded it, found by name: linked to, it might be loaded twice, and
// two pools of threads would fight for the processors.

#pragma once

#include <cstddef>

#include <dlfcn.h>

namespace outrider {

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*index)();
    int (*count)();

    OpenMP() {
        find(parallel, "GOMP_parallel");
        find(index, "omp_get_thread_num");
        find(count, "omp_get_num_threads");
    }
    explicit operator bool() const { return parallel && index && count; }
    static const OpenMP& get() {
        static const OpenMP found;
        return found;
    }

  private:
    template <class F>
    static void find(F& function, const char* name) {
        function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
    }
};

// Calls work(first, last) for parts of [0, count), on up to so many threads.
template <class Work>
static void in_parts(size_t count, size_t threads, const Work& work) {
    if (threads < 2 || !OpenMP::get()) return work(size_t{0}, count);
    struct Shared {
        const Work* work;
        size_t count;
    } shared{&work, count};
    OpenMP::get().parallel(
        [](void* given) {
            const Shared& s = *static_cast<Shared*>(given);
            size_t i = static_cast<size_t>(OpenMP::get().index()), n = static_cast<size_t>(OpenMP::get().count());
            (*s.work)(s.count * i / n, s.count * (i + 1) / n);
        },
        &shared, static_cast<unsigned>(threads), 0);
}

}  // namespace outrider
