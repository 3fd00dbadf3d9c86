// The layer norm of a residual sum, and its gradient, for one row.

#pragma once

#include "common.h"

// One row of out = norm(x + y). The gradient needs `sums`, x + y, and the moments; `row` is a
// buffer for the sums in float32.
template <class X, class T>
Moments norm_row(const T* __restrict y, const X* __restrict x, const float* weight,
                 const float* bias, X* __restrict sums, X* __restrict out, float* __restrict row,
                 int width) {
    auto add = [=](int d) {
        float sum = load(x[d]) + load(y[d]);
        store(sums + d, sum);
        return sum;
    };
    auto write = [=](int d, float value) { store(out + d, value); };
    return normalise(add, row, weight, bias, width, write);
}

// The gradients of one row. `normed` and `scaled` are buffers; those of weight and bias are added
// to `d_weight` and `d_bias`.
template <class X, class T>
void norm_row_backward(const X* __restrict g, const X* __restrict sums, Moments moments,
                       const float* __restrict weight, X* __restrict d_x, T* __restrict d_y,
                       float* __restrict d_weight, float* __restrict d_bias,
                       float* __restrict normed, float* __restrict scaled, int width) {
    for (int d = 0; d < width; d++) {
        float gradient = load(g[d]);
        normed[d] = (load(sums[d]) - moments.mean) * moments.inverse;
        scaled[d] = gradient * weight[d];
        d_weight[d] += gradient * normed[d];
        d_bias[d] += gradient;
    }
    float mean = sum(scaled, width) / width, slope = dot(scaled, normed, width) / width;
    for (int d = 0; d < width; d++)
        scaled[d] = (scaled[d] - mean - normed[d] * slope) * moments.inverse;
    store(d_x, scaled, width);
    store(d_y, scaled, width);
}
