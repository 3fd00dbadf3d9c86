// What ops.cpp and sampler.cpp share: threads, the layer norm and the step of linear attention.
//
// Compile-time constants, set by Python: SIZE, the size of a head's queries, keys and values, and
// ATTENTION_EPSILON and NORM_EPSILON, which keep two divisions finite.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <future>
#include <mutex>
#include <thread>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "exports.h"
#include "numbers.h"

// `run_threads` without OpenMP.
template <class Run>
void run_own_threads(int n, const Run& run) {
    std::promise<bool> all_started;
    std::shared_future<bool> start = all_started.get_future();
    std::vector<std::thread> threads;
    auto finish = [&](bool started) {
        all_started.set_value(started);
        if (started) run(0);
        for (auto& thread : threads) thread.join();
    };
    try {
        threads.reserve(n);
        for (int i = 1; i < n; i++)
            threads.emplace_back([&run, start, i] {
                if (start.get()) run(i);
            });
    } catch (...) {
        finish(false);
        throw;
    }
    finish(true);
}

// Calls run(0), ..., run(n - 1), each in a thread of its own, the first in the calling thread. All
// run at the same time, so they may wait for each other; none does if one cannot be started. With
// OpenMP these are the threads of torch's own operations, which spin for a while after each operation
// and would slow down any others.
template <class Run>
void run_threads(int n, const Run& run) {
#ifdef _OPENMP
    std::atomic<bool> all_started{true};
#pragma omp parallel num_threads(n)
    if (omp_get_num_threads() == n) run(omp_get_thread_num());
    else all_started = false;  // OMP_THREAD_LIMIT is less, for example
    if (all_started) return;
#endif
    run_own_threads(n, run);
}

// The first exception of several threads, which none of them may let out.
class Failure {
    std::mutex mutex;
    std::exception_ptr first;

   public:
    template <class Run>
    void guard(const Run& run) {
        try {
            run();
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            if (!first) first = std::current_exception();
        }
    }
    void raise() const {
        if (first) std::rethrow_exception(first);
    }
};

// Calls run(task) for every task, in any order, on `threads` threads, the same ones.
template <class Run>
void run_tasks(int64_t tasks, int threads, const Run& run) {
    Failure failure;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) failure.guard([&] { run(task); });
#else
    std::atomic<int64_t> next{0};
    run_threads(std::min<int64_t>(threads, tasks), [&](int) {
        failure.guard([&] {
            for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(task);
        });
    });
#endif
    failure.raise();
}

struct Moments {
    float mean, inverse;  // 1 / the standard deviation
};

// The layer norm of the row read(0), ..., read(width - 1): calls write(d, value) for every d. `row`
// is a buffer, so that `read` is called once for every d. Both functions are passed by
// value: through a reference the compiler would load what they captured again for every d.
template <class Read, class Write>
inline Moments normalise(Read read, float* __restrict row, const float* __restrict weight,
                         const float* __restrict bias, int width, Write write) {
    const float share = 1.f / width;
    for (int d = 0; d < width; d++) row[d] = read(d);
    float mean = sum(row, width) * share;
    for (int d = 0; d < width; d++) row[d] -= mean;
    float inverse = 1 / std::sqrt(dot(row, row, width) * share + float(NORM_EPSILON));
    for (int d = 0; d < width; d++) write(d, row[d] * inverse * weight[d] + bias[d]);
    return {mean, inverse};
}

// exp(x) for x <= 0 (of a larger x, any number): 2^n e^r with |r| <= log(2) / 2, and for e^r the
// polynomial of degree 5 that is 1 at 0 and has the least relative error, 1e-7. The rounding of
// log(2) and of r adds up to 3e-7 towards -87 (without fused multiply-adds 4e-6). Of NaN it is NaN,
// whatever n is then. Adding 1.5 * 2^23 rounds to a whole number, n + 127, which is then in the
// lowest bits: those of the exponent of 2^n, once they are shifted.
inline float exponential(float x) {
    x = x < -87 ? -87 : x;  // std::max would keep the loops from being vectorised
    constexpr float SHIFT = 0x1.8p23f + 127;
    float shifted = x * 1.44269504f + SHIFT, n = shifted - SHIFT;
    float r = x - n * 0.69314718f;
    float e = 0.00829031f;
    e = e * r + 0.04189798f;
    e = e * r + 0.16667637f;
    e = e * r + 0.49999149f;
    e = e * r + 0.99999971f;
    e = e * r + 1.f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits <<= 23;
    float power;
    memcpy(&power, &bits, 4);
    return e * power;
}

inline float sigmoid(float x) {
    float e = exponential(x > 0 ? -x : x);
    return (x > 0 ? 1 : e) / (1 + e);
}

// phi(x) = elu(x) + 1 of a row, without a branch. NaN stays NaN.
template <class T>
inline void features(const T* x, float* phi) {
    for (int e = 0; e < SIZE; e++) {
        float value = load(x[e]), negative = exponential(value);
        phi[e] = value > 0 ? value + 1 : negative;
    }
}

inline float dot(const float* a, const float* b) { return dot(a, b, SIZE); }

// A row of SIZE numbers is COUNT vectors, the widest that divide it evenly.
constexpr int WIDTH = std::min(LANES, SIZE & -SIZE), COUNT = SIZE / WIDTH;
typedef Floats<WIDTH>::Vector RowVector;

template <class T>
inline void load_row(const T* x, float* row) {
    for (int m = 0; m < SIZE; m++) row[m] = load(x[m]);
}

// Copies whole vectors: g++ would copy halves, and the next load of a vector would wait for both.
inline void load_row(const float* x, float* row) {
    for (int i = 0; i < COUNT; i++) ((RowVector*)row)[i] = ((const RowVector*)x)[i];
}

// `update` in the C vectors from `first` on of every row of the matrix. Those of `row` and `sums`
// are copied one by one, since a block that was copied would stay in memory.
template <int N, int C, class Before, class After>
inline void update_columns(int first, float* __restrict matrix, const float (*x)[SIZE],
                           const float (*row)[SIZE], const float (*y)[SIZE], float (*sums)[SIZE],
                           Before before, After after) {
    RowVector rows[N][C], totals[N][C];
    for (int n = 0; n < N; n++)
        for (int i = 0; i < C; i++) {
            rows[n][i] = ((const RowVector*)row[n])[first + i];
            totals[n][i] = ((const RowVector*)sums[n])[first + i];
        }
    for (int a = 0; a < SIZE; a++) {
        RowVector* line = (RowVector*)(matrix + a * SIZE) + first;
#pragma GCC unroll 64
        for (int i = 0; i < C; i++) {
            RowVector changed = line[i];
#pragma GCC unroll 64
            for (int n = 0; n < N; n++) {
                changed = before(changed, n) + x[n][a] * rows[n][i];
                totals[n][i] += y[n][a] * changed;
            }
            line[i] = after(changed);
        }
    }
    for (int n = 0; n < N; n++)
        for (int i = 0; i < C; i++) ((RowVector*)sums[n])[first + i] = totals[n][i];
}

// For N positions, one after the other: adds the outer product of x and row to the matrix
// (SIZE, SIZE), and then y * matrix to sums. The matrix is read and written once for all of them; its
// numbers become before(numbers, n) ahead of position n and after(numbers) at the end. Eight sums at a
// time: CPUs begin two additions in each of the four cycles that one takes.
template <int N, class Before, class After>
inline void update(float* matrix, const float (*x)[SIZE], const float (*row)[SIZE],
                   const float (*y)[SIZE], float (*sums)[SIZE], Before before, After after) {
    constexpr int C = std::min(COUNT, 8 / N), REST = COUNT % C;
    for (int first = 0; first < COUNT - REST; first += C)
        update_columns<N, C>(first, matrix, x, row, y, sums, before, after);
    if constexpr (REST) update_columns<N, REST>(COUNT - REST, matrix, x, row, y, sums, before, after);
}

template <int N>
inline void update(float* matrix, const float (*x)[SIZE], const float (*row)[SIZE],
                   const float (*y)[SIZE], float (*sums)[SIZE]) {
    auto keep = [](RowVector numbers, auto...) { return numbers; };
    update<N>(matrix, x, row, y, sums, keep, keep);
}

// Adds a position's features of the key to Z, and returns 1 / the denominator of its output.
inline float normalizer(const float* phi_q, const float* phi_k, float* Z) {
    for (int e = 0; e < SIZE; e++) Z[e] += phi_k[e];
    return 1 / (dot(phi_q, Z) + float(ATTENTION_EPSILON));
}

// linear_recurrent of layers/attention.py for one head and N positions, one after the other; the
// state S (E, M) and Z (E) is updated in place. The strides are from one position to the next.
template <int N, class T, class Output>
inline void attend(const T* q, const T* k, const T* v, int64_t stride, float* S, float* Z,
                   Output* out, int64_t out_stride) {
    float phi_q[N][SIZE], phi_k[N][SIZE], value[N][SIZE], sums[N][SIZE] = {};
    for (int n = 0; n < N; n++) {
        features(q + n * stride, phi_q[n]);
        features(k + n * stride, phi_k[n]);
        load_row(v + n * stride, value[n]);
    }
    update<N>(S, phi_k, value, phi_q, sums);
    for (int n = 0; n < N; n++) {
        float scale = normalizer(phi_q[n], phi_k[n], Z);
        for (int m = 0; m < SIZE; m++) sums[n][m] *= scale;
        store(out + n * out_stride, sums[n], SIZE);
    }
}
