// Gated linear attention on CPUs, `gated_quadratic` of layers/gated.py computed as a recurrence: one
// head and N positions, one after the other. The names are those of layers/gated.py.
//
// Further compile-time constants: LENGTH_EPSILON and OUTPUT_RMS.

#pragma once

#include "common.h"

namespace gated {

// What S^T q is multiplied by to have a root mean square of OUTPUT_RMS.
inline float output_scale(const float* sums) {
    return float(OUTPUT_RMS) / std::sqrt(dot(sums, sums) / SIZE + float(LENGTH_EPSILON));
}

// What multiplies the outputs of N positions; `step` is from one position to the next.
template <int N, class T>
inline void load_gates(const T* z, int64_t step, float (*gates)[SIZE]) {
    for (int n = 0; n < N; n++) load_row(z + n * step, gates[n]);
    // In one loop, so that the CPU overlaps the exponentials of several vectors.
    float* all = gates[0];
    for (int i = 0; i < N * SIZE; i++) all[i] = 2 * sigmoid(all[i]);
}

// What N positions read and write; `added` is beta k, and `a` the decay exp(-softplus(decay)).
template <int N>
struct Positions {
    float q[N][SIZE], k[N][SIZE], v[N][SIZE], added[N][SIZE];
    float inverse_lengths[N], a[N], beta[N];

    // `step` is from one position to the next. Keys, gates and values follow the queries after
    // `width` numbers each, betas the decays after `heads`.
    template <class T>
    void load(const T* query, const T* decay, int64_t step, int64_t width, int64_t heads) {
        for (int n = 0; n < N; n++) {
            load_row(query + n * step, q[n]);
            load_row(query + n * step + width, k[n]);
            load_row(query + n * step + 3 * width, v[n]);
            a[n] = -::load(decay[n * step]);
            beta[n] = ::load(decay[n * step + heads]);
            inverse_lengths[n] = dot(k[n], k[n]) + float(LENGTH_EPSILON);
        }
        for (int n = 0; n < N; n++) a[n] = sigmoid(a[n]);
        for (int n = 0; n < N; n++) beta[n] = sigmoid(beta[n]);
        for (int n = 0; n < N; n++) inverse_lengths[n] = 1 / std::sqrt(inverse_lengths[n]);
        for (int n = 0; n < N; n++)
            for (int e = 0; e < SIZE; e++) {
                k[n][e] *= inverse_lengths[n];
                added[n][e] = beta[n] * k[n][e];
            }
    }
};

// `update` with a matrix that each position multiplies by its decay first. Unless the decays are
// extreme, only their product multiplies it, at the end. Until then it is the matrix divided by the
// decays so far; so are the rows that are added, and the sums are multiplied by these decays.
template <int N>
inline void decay_and_update(float* matrix, const float (*x)[SIZE], const float (*row)[SIZE],
                             const float (*y)[SIZE], float (*sums)[SIZE], const float* decays) {
    auto keep = [](RowVector numbers, auto...) { return numbers; };
    float kept[N], rows[N][SIZE];
    for (int n = 0; n < N; n++) kept[n] = decays[n] * (n ? kept[n - 1] : 1);
    float all = kept[N - 1];
    if (N == 1 || !(all > 1e-20f)) {
        auto decay = [=](RowVector numbers, int n) { return numbers * decays[n]; };
        return update<N>(matrix, x, row, y, sums, decay, keep);
    }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < SIZE; m++) rows[n][m] = row[n][m] / kept[n];
    update<N>(matrix, x, rows, y, sums, keep, [=](RowVector numbers) { return numbers * all; });
    for (int n = 0; n < N; n++)
        for (int m = 0; m < SIZE; m++) sums[n][m] *= kept[n];
}

// S^T q of N positions; the state S (E, M) is updated in place.
template <int N>
inline void attend(const Positions<N>& at, float* S, float (*sums)[SIZE]) {
    memset(sums, 0, N * sizeof *sums);
    decay_and_update<N>(S, at.added, at.v, at.q, sums, at.a);
}

}  // namespace gated
