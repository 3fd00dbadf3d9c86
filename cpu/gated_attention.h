// Gated linear attention of sequences and its gradient (gated_quadratic of layers/gated.py),
// computed as recurrences. `projected` (N, L, 4HE + 2H) holds the queries, keys, gates and values of
// all heads, their decays and their betas.

#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "gated.h"

// Where one head of one image is in `projected`, in the outputs (N, L, HE), and in the factors of
// the outputs (N, L, H).
struct GatedHead {
    int64_t queries, gates, decays, outputs, scales, stride;
    Shape shape;

    GatedHead(int64_t task, Shape shape)
        : stride(4 * shape.width() + 2 * shape.heads), shape(shape) {
        int64_t first = task / shape.heads * shape.length, head = task % shape.heads;
        queries = first * stride + head * SIZE;
        gates = queries + 2 * shape.width();
        decays = first * stride + 4 * shape.width() + head;
        outputs = first * shape.width() + head * SIZE;
        scales = first * shape.heads + head;
    }

    // Loads positions from `first` on, or back.
    template <int N, class T>
    void load(const T* projected, int64_t first, int direction, gated::Positions<N>& at) const {
        const T* row = projected + first * stride;
        for (int n = 0; n < N; n++)
            for (int part : {0, 1, 3})
                prefetch(row + queries + part * shape.width() +
                         direction * (n + PREFETCH_DISTANCE) * stride);
        at.load(row + queries, row + decays, direction * stride, shape.width(), shape.heads);
    }

    template <int N, class T>
    void load_gates(const T* projected, int64_t first, float (*gates)[SIZE]) const {
        const T* z = projected + first * stride + this->gates;
        for (int n = 0; n < N; n++) prefetch(z + (n + PREFETCH_DISTANCE) * stride);
        gated::load_gates<N>(z, stride, gates);
    }
};

// Updates S (N, H, E, M); if it is null, the state starts at zero. `scales` gets the factors of the
// outputs if it is not null.
template <class T>
void gated_forward(const T* projected, T* out, float* scales, float* S, int64_t images,
                   int64_t length, int64_t heads, int64_t threads) {
    Shape shape{images, length, heads};
    run_tasks(images * heads, threads, [&](int64_t task) {
        GatedHead head(task, shape);
        auto state = std::make_unique<State>();
        if (S) memcpy(state->S, S + task * SIZE * SIZE, sizeof state->S);
        in_groups(length, [&](int64_t first, auto N) {
            gated::Positions<N> at;
            float sums[N][SIZE], gates[N][SIZE];
            head.load(projected, first, 1, at);
            head.template load_gates<N>(projected, first, gates);
            gated::attend<N>(at, state->S[0], sums);
            for (int n = 0; n < N; n++) {
                float scale = gated::output_scale(sums[n]);
                if (scales) scales[head.scales + (first + n) * heads] = scale;
                T* target = out + head.outputs + (first + n) * shape.width();
                for (int m = 0; m < SIZE; m++) sums[n][m] *= gates[n][m] * scale;
                store(target, sums[n], SIZE);
            }
        });
        if (S) memcpy(S + task * SIZE * SIZE, state->S, sizeof state->S);
    });
}

// The gradients of one image and one head, with g that of S^T q: as `Backward`, the queries' from
// the first position to the last, the others' back. In between, g is where the gradients of the
// values will be.
template <class T>
struct GatedBackward {
    const T *projected, *out, *gradient;
    const float* scales;
    T* gradients;
    GatedHead head;
    std::vector<float> products;  // of each position: q.dq
    float later = 1, sum = 0;     // the decay of the position after; the gradient of log(a)
    alignas(64) float S[SIZE][SIZE] = {};  // (M, E)
    alignas(64) float R[SIZE][SIZE] = {}, transposed[SIZE][SIZE] = {};

    GatedBackward(const T* projected, const T* out, const float* scales, const T* gradient,
                  T* gradients, int64_t task, Shape shape)
        : projected(projected), out(out), gradient(gradient), scales(scales), gradients(gradients),
          head(task, shape), products(shape.length) {}

    // The gradient of the query (0), key (1), gate (2) or value (3) at a position; that at a
    // position some steps `ahead` is fetched.
    T* target(int64_t i, int part, int64_t ahead) const {
        T* row = gradients + head.queries + i * head.stride + part * head.shape.width();
        prefetch<true>(row + ahead * head.stride);
        return row;
    }

    // g of N positions, and the gradients of their gates. What was normalised is the output divided
    // by its gate, which is never 0.
    template <int N>
    void output_gradients(int64_t first, float (*g)[SIZE]) {
        float gates[N][SIZE];
        head.template load_gates<N>(projected, first, gates);
        for (int n = 0; n < N; n++) {
            int64_t i = first + n, at = head.outputs + i * head.shape.width();
            float output[SIZE], row[SIZE], scale = scales[head.scales + i * head.shape.heads];
            load_row(out + at, output);
            load_row(gradient + at, row);
            float mean = dot(output, row) / (SIZE * float(OUTPUT_RMS) * float(OUTPUT_RMS));
            T *d_z = target(i, 2, PREFETCH_DISTANCE), *kept = target(i, 3, PREFETCH_DISTANCE);
            for (int m = 0; m < SIZE; m++) {
                store(d_z + m, row[m] * output[m] * (1 - gates[n][m] / 2));
                store(kept + m, scale * (gates[n][m] * row[m] - mean * output[m] / gates[n][m]));
            }
            load_row(kept, g[n]);  // rounded, as in keys_and_values
        }
    }

    // dq = S g.
    template <int N>
    void queries(int64_t first) {
        gated::Positions<N> at;
        float g[N][SIZE], sums[N][SIZE] = {};
        head.load(projected, first, 1, at);
        output_gradients<N>(first, g);
        gated::decay_and_update<N>(S[0], at.v, at.added, g, sums, at.a);
        for (int n = 0; n < N; n++) {
            products[first + n] = dot(at.q[n], sums[n]);
            T* d_q = target(first + n, 0, PREFETCH_DISTANCE);
            store(d_q, sums[n], SIZE);
        }
    }

    // With R the sum of q g^T, decayed, over the positions from here on: that of beta k is R v, and
    // dv = R^T beta k. Positions are counted from the last one.
    template <int N>
    void keys_and_values(int64_t first) {
        gated::Positions<N> at;
        float g[N][SIZE], decays[N], keys[N][SIZE] = {}, values[N][SIZE] = {};
        int64_t start = head.shape.length - 1 - first;
        head.load(projected, start, -1, at);
        for (int n = 0; n < N; n++) {
            load_row(target(start - n, 3, -PREFETCH_DISTANCE), g[n]);
            decays[n] = later;
            later = at.a[n];
        }
        gated::decay_and_update<N>(transposed[0], g, at.q, at.v, keys, decays);
        gated::decay_and_update<N>(R[0], at.q, g, at.added, values, decays);
        for (int n = 0; n < N; n++)
            write_position(start - n, n, at, keys[n], values[n]);
    }

    // A decay multiplies the later q and divides the later beta k when both are measured from the
    // beginning: the gradient of its logarithm is the sum of q.dq - (beta k).d(beta k) from it on.
    template <int N>
    void write_position(int64_t i, int n, const gated::Positions<N>& at, const float* key,
                        const float* value) {
        float product = dot(at.k[n], key), a = at.a[n], beta = at.beta[n];
        float factor = beta * at.inverse_lengths[n];
        T *d_k = target(i, 1, -PREFETCH_DISTANCE), *d_v = target(i, 3, -PREFETCH_DISTANCE);
        for (int e = 0; e < SIZE; e++) store(d_k + e, factor * (key[e] - product * at.k[n][e]));
        store(d_v, value, SIZE);
        sum += products[i] - beta * product;
        T* gates = gradients + head.decays + i * head.stride;
        store(gates, sum * (a - 1));
        store(gates + head.shape.heads, product * beta * (1 - beta));
    }
};

template <class T>
void gated_backward(const T* projected, const T* out, const float* scales, const T* gradient,
                    T* gradients, int64_t images, int64_t length, int64_t heads,
                    int64_t threads) {
    Shape shape{images, length, heads};
    run_tasks(images * heads, threads, [&](int64_t task) {
        auto pass = std::make_unique<GatedBackward<T>>(projected, out, scales, gradient, gradients,
                                                       task, shape);
        in_groups(length, [&](int64_t first, auto N) { pass->template queries<N>(first); });
        in_groups(length, [&](int64_t first, auto N) { pass->template keys_and_values<N>(first); });
    });
}
