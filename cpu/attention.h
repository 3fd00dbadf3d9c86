// Causal linear attention and its gradient (linear_quadratic of layers/attention.py), computed as
// recurrences, one image and one head after the other.

#pragma once

#include <memory>

#include "common.h"

// Positions per call of `update`. The more, the fewer registers are left for each; with 16 registers,
// small matrices gain nothing.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int GROUP = 4;
#else
constexpr int GROUP = SIZE < 32 ? 1 : 2;
#endif

// The rows of a head are too far apart for CPUs to foresee the next ones, so they are fetched into
// the cache this number of positions ahead.
constexpr int64_t PREFETCH_DISTANCE = 8;

// `row` may lie outside of the tensor: prefetching it then has no effect.
template <bool WRITE = false, class T>
inline void prefetch(const T* row) {
    for (int e = 0; e < SIZE; e += 64 / sizeof(T)) __builtin_prefetch(row + e, WRITE);
    __builtin_prefetch(row + SIZE - 1, WRITE);
}

struct Shape {
    int64_t images, length, heads;

    int64_t width() const { return heads * SIZE; }  // of a position's output
    int64_t stride() const { return 3 * width(); }  // from a position's queries to the next one's
};

// The queries, keys and values of one image and one head, or their gradients.
template <class T>
struct Head {
    T *q, *k, *v;

    // Head number `task` in qkv (N, L, 3, H, E).
    Head(T* qkv, int64_t task, Shape shape)
        : q(qkv + task / shape.heads * shape.length * shape.stride() + task % shape.heads * SIZE),
          k(q + shape.width()), v(k + shape.width()) {}

    void prefetch(int64_t row) const {
        for (const T* part : {q, k, v}) ::prefetch(part + row);
    }
};

// The output of head number `task` in out (N, L, H, E).
template <class T>
T* output(T* out, int64_t task, Shape shape) {
    return out + task / shape.heads * shape.length * shape.width() + task % shape.heads * SIZE;
}

// Calls run(first, N) for groups of N positions, from `first` on; N is a std::integral_constant.
template <class Run>
void in_groups(int64_t length, const Run& run) {
    int64_t first = 0;
    for (; first + GROUP <= length; first += GROUP)
        run(first, std::integral_constant<int, GROUP>());
    for (; first < length; first++) run(first, std::integral_constant<int, 1>());
}

// The state of one image and one head. Whatever has E^2 numbers is allocated on the heap: the stack
// of a thread may have no more than 512 kB.
struct State {
    alignas(64) float S[SIZE][SIZE] = {}, Z[SIZE] = {};
};

// Updates S (N, H, E, M) and Z (N, H, E); if they are null, the sums start at zero.
template <class T>
void forward(const T* qkv, T* out, float* S, float* Z, int64_t images, int64_t length,
             int64_t heads, int64_t threads) {
    Shape shape{images, length, heads};
    run_tasks(shape.images * shape.heads, threads, [&](int64_t task) {
        Head head(qkv, task, shape);
        T* target = output(out, task, shape);
        auto state = std::make_unique<State>();
        if (S) memcpy(state->S, S + task * SIZE * SIZE, sizeof state->S);
        if (Z) memcpy(state->Z, Z + task * SIZE, sizeof state->Z);
        in_groups(shape.length, [&](int64_t first, auto N) {
            int64_t at = first * shape.stride();
            for (int n = 0; n < N; n++)
                head.prefetch(at + (n + PREFETCH_DISTANCE) * shape.stride());
            attend<N>(head.q + at, head.k + at, head.v + at, shape.stride(), state->S[0],
                      state->Z, target + first * shape.width(), shape.width());
        });
        if (S) memcpy(S + task * SIZE * SIZE, state->S, sizeof state->S);
        if (Z) memcpy(Z + task * SIZE, state->Z, sizeof state->Z);
    });
}

// The derivative of the feature map is 1 where phi > 1, and phi elsewhere.
template <class T>
inline void write_gradient(const float* gradient, const float* phi, T* target) {
    float row[SIZE];
    for (int e = 0; e < SIZE; e++) row[e] = gradient[e] * std::min(phi[e], 1.f);
    store(target, row, SIZE);
}

// The inputs of the gradients at N positions.
template <int N>
struct Positions {
    float phi_q[N][SIZE], phi_k[N][SIZE], value[N][SIZE], gradient[N][SIZE];
};

// The gradients of one image and one head, with g the gradient of out = S^T q / d and d = q.Z.
// Those of the queries need sums over the positions up to their own, those of the keys and values
// sums over the positions from their own on. Here q and k are after the feature map.
template <class T>
struct Backward {
    Head<const T> head;
    const T* g;
    Head<T> gradients;
    Shape shape;
    std::vector<float> inverses, products;  // of each position: 1 / d, and out.g
    alignas(64) float S[SIZE][SIZE] = {}, Z[SIZE] = {};  // S here is (M, E)
    alignas(64) float R[SIZE][SIZE] = {}, transposed[SIZE][SIZE] = {}, W[SIZE] = {};

    Backward(const T* qkv, const T* g, T* gradients, int64_t task, Shape shape)
        : head(qkv, task, shape), g(output(g, task, shape)), gradients(gradients, task, shape),
          shape(shape), inverses(shape.length), products(shape.length) {}

    // The one `ahead` positions later, or earlier if negative, is fetched into the cache.
    template <int N>
    void load_position(int64_t i, int n, int64_t ahead, Positions<N>& at) {
        head.prefetch((i + ahead) * shape.stride());
        prefetch(g + (i + ahead) * shape.width());
        features(head.q + i * shape.stride(), at.phi_q[n]);
        features(head.k + i * shape.stride(), at.phi_k[n]);
        load_row(head.v + i * shape.stride(), at.value[n]);
        load_row(g + i * shape.width(), at.gradient[n]);
    }

    // From the first position to the last: dq = (S g - (out.g) Z) / d.
    template <int N>
    void queries(int64_t first) {
        Positions<N> at;
        float sums[N][SIZE] = {};
        for (int n = 0; n < N; n++) {
            prefetch<true>(gradients.q + (first + n + PREFETCH_DISTANCE) * shape.stride());
            load_position(first + n, n, PREFETCH_DISTANCE, at);
        }
        update<N>(S[0], at.value, at.phi_k, at.gradient, sums);
        for (int n = 0; n < N; n++) {
            int64_t i = first + n;
            float inverse = inverses[i] = normalizer(at.phi_q[n], at.phi_k[n], Z);
            float product = products[i] = dot(at.phi_q[n], sums[n]) * inverse;
            for (int e = 0; e < SIZE; e++) sums[n][e] = (sums[n][e] - product * Z[e]) * inverse;
            write_gradient(sums[n], at.phi_q[n], gradients.q + i * shape.stride());
        }
    }

    // From the last position to the first: dk = R v + W and dv = R^T k, with R the sum of q g^T / d
    // and W the sum of -q (out.g) / d.
    template <int N>
    void keys_and_values(int64_t first) {
        Positions<N> at;
        float keys[N][SIZE], values[N][SIZE] = {};
        for (int n = 0; n < N; n++) {
            int64_t i = shape.length - 1 - first - n;
            prefetch<true>(gradients.k + (i - PREFETCH_DISTANCE) * shape.stride());
            prefetch<true>(gradients.v + (i - PREFETCH_DISTANCE) * shape.stride());
            load_position(i, n, -PREFETCH_DISTANCE, at);
            for (int e = 0; e < SIZE; e++) at.phi_q[n][e] *= inverses[i];
            for (int e = 0; e < SIZE; e++) keys[n][e] = W[e] -= at.phi_q[n][e] * products[i];
        }
        update<N>(transposed[0], at.gradient, at.phi_q, at.value, keys);
        update<N>(R[0], at.phi_q, at.gradient, at.phi_k, values);
        for (int n = 0; n < N; n++) {
            int64_t start = (shape.length - 1 - first - n) * shape.stride();
            write_gradient(keys[n], at.phi_k[n], gradients.k + start);
            store(gradients.v + start, values[n], SIZE);
        }
    }
};

template <class T>
void backward(const T* qkv, const T* g, T* gradients, int64_t images, int64_t length,
              int64_t heads, int64_t threads) {
    Shape shape{images, length, heads};
    run_tasks(shape.images * shape.heads, threads, [&](int64_t task) {
        auto pass = std::make_unique<Backward<T>>(qkv, g, gradients, task, shape);
        in_groups(shape.length, [&](int64_t first, auto N) { pass->template queries<N>(first); });
        in_groups(shape.length,
                  [&](int64_t first, auto N) { pass->template keys_and_values<N>(first); });
    });
}
