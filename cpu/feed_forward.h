// The second half of a layer in float32, norm(x + y) with y = relu(x W1' + b1) W2' + b2, and its
// gradient, block by block of rows, so that what lies between the products stays in the caches.
//
// D is the width of x, a multiple of LANES, F that of the hidden units, a multiple of PANEL. In a
// block, the columns of a tensor may lie in panels: for each panel all rows, so that the rows of a
// panel are next to each other.

#pragma once

#include "common.h"
#include "dropout.h"
#include "norm.h"
#include "tile.h"

namespace feed_forward {

constexpr int64_t BLOCK = ROWS_PER_BLOCK;
constexpr int COLUMNS = 4;  // of a tile of a weight's gradient, which divides all widths

// Floats from the beginning of a cache line on: a vector in two lines takes twice as long.
class Buffer {
    std::vector<float> numbers;

   public:
    explicit Buffer(int64_t size) : numbers(size + 16) {}
    float* data() { return (float*)(((uintptr_t)numbers.data() + 63) / 64 * 64); }
};

// sums = the sum of all rows (rows, width).
inline void add_rows(const float* source, int64_t rows, int64_t width, float* __restrict sums) {
    std::fill_n(sums, width, 0.f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < width; d++) sums[d] += source[r * width + d];
}

// Calls run(first row, R) for tiles of R rows. (Of few sizes, for the sake of the compilation.)
template <class Run>
inline void each_rows(int64_t rows, const Run& run) {
    int64_t r = 0;
    for (; r <= rows - ROWS; r += ROWS) run(r, std::integral_constant<int, ROWS>());
    for (; r < rows; r++) run(r, std::integral_constant<int, 1>());
}

// Calls run(first column, V) for each panel of V vectors.
template <class Run>
inline void each_panel(int64_t width, const Run& run) {
    for (int64_t c = 0; c < width; c += PANEL) {
        int64_t vectors = std::min<int64_t>(PANEL, width - c) / LANES;
        with_constant<VECTORS>(vectors, [&](auto V) { run(c, V); });
    }
}

// A matrix (inputs, outputs), or if transposed (outputs, inputs), with its outputs in panels.
inline void pack(const float* matrix, int64_t inputs, int64_t outputs, bool transposed,
                 float* packed) {
    int64_t row = transposed ? 1 : outputs, column = transposed ? inputs : 1;
    each_panel(outputs, [&](int64_t c, auto V) {
        for (int64_t i = 0; i < inputs; i++)
            for (int64_t j = 0; j < V * LANES; j++)
                *packed++ = matrix[i * row + (c + j) * column];
    });
}

// R rows: outputs = start + inputs * weight over n inputs, with a relu if RELU. The strides are from
// one row to the next.
template <int R, int V, bool RELU>
[[gnu::noinline]] void product(const float* inputs, int64_t stride, const float* weight, int64_t n,
                               const float* start, int64_t start_stride, float* outputs,
                               int64_t out_stride) {
    Vector sums[R][V];
    for (int r = 0; r < R; r++) read(start + r * start_stride, sums[r]);
    accumulate(sums, inputs, stride, weight, n);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            Vector sum = sums[r][v];
            if (RELU) sum = sum < 0.f ? 0.f : sum;
            ((Vector*)(outputs + r * out_stride))[v] = sum;
        }
}

// matrix (A, stride) += a^T b for COLUMNS columns of a, whose rows are `step` apart, and V vectors
// of b.
template <int V>
[[gnu::noinline]] void outer(const float* a, int64_t step, const float* b, int64_t rows,
                             float* matrix, int64_t stride) {
    constexpr int R = COLUMNS;
    Vector sums[R][V];
    for (int r = 0; r < R; r++) read(matrix + r * stride, sums[r]);
    for (int64_t i = 0; i < rows; i++, a += step, b += V * LANES) {
        Vector columns[V];
        read(b, columns);
        add_products(sums, a, 1, columns);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) ((Vector*)(matrix + r * stride))[v] = sums[r][v];
}

// A tensor (rows, width) in panels.
class Panels {
    Buffer numbers;
    const int64_t width;

   public:
    int64_t rows = 0;

    Panels(int64_t most, int64_t width) : numbers(most * width), width(width) {}

    // The panel that begins at column c.
    float* operator[](int64_t c) { return numbers.data() + c * rows; }

    void copy(const float* source) {
        each_panel(width, [&](int64_t c, auto V) {
            Vector* panel = (Vector*)(*this)[c];
            for (int64_t r = 0; r < rows; r++)
                for (int v = 0; v < V; v++)
                    panel[r * V + v] = ((const Vector*)(source + r * width + c))[v];
        });
    }

    // sums += R rows from r on, times a packed weight (width, V vectors).
    template <int R, int V>
    void accumulate_rows(Vector (&sums)[R][V], int64_t r, const float* weight) {
        for (int64_t c = 0; c < width; c += PANEL) {
            int64_t n = std::min<int64_t>(PANEL, width - c);
            accumulate(sums, (*this)[c] + r * n, n, weight + c * V * LANES, n);
        }
    }
};

// Inputs, the weights (F, D) and (D, F), packed, and what the gradient needs: unless they are null,
// the hidden units in panels, those of one block after the other, and x + y and its moments.
struct Forward {
    const float *x, *weight1, *bias1, *weight2, *bias2, *norm_weight, *norm_bias;
    float *outputs, *hidden, *sums, *means, *inverses;
    Dropout hidden_dropout, dropout;  // of the hidden units and of y
    int64_t D, F;

    // The n rows from `first` on.
    void block(int64_t first, int64_t n) const {
        Buffer panel(hidden ? 0 : n * PANEL), y(n * D);
        for (int64_t c = 0; c < F; c += PANEL) {
            float* units = hidden ? hidden + first * F + c * n : panel.data();
            write_units(first, n, c, units);
            add_outputs(c, n, units, y.data());
        }
        add_and_normalise(first, n, y.data());
    }

    // The panel of hidden units from column c on.
    void write_units(int64_t first, int64_t n, int64_t c, float* units) const {
        each_rows(n, [&](int64_t r, auto R) {
            product<R, VECTORS, true>(x + (first + r) * D, D, weight1 + c * D, D, bias1 + c, 0,
                                      units + r * PANEL, PANEL);
        });
        if (!hidden_dropout.keys) return;
        for (int64_t r = 0; r < n; r++, units += PANEL)
            hidden_dropout.drop(units, units, (first + r) * F + c, PANEL);
    }

    // y = bias, or y so far, + a panel of hidden units * weight.
    void add_outputs(int64_t c, int64_t n, const float* units, float* y) const {
        each_panel(D, [&](int64_t d, auto V) {
            const float* weight = weight2 + d * F + c * V * LANES;
            each_rows(n, [&](int64_t r, auto R) {
                float* target = y + r * D + d;
                product<R, V, false>(units + r * PANEL, PANEL, weight, PANEL, c ? target : bias2 + d,
                                     c ? D : 0, target, D);
            });
        });
    }

    void add_and_normalise(int64_t first, int64_t n, float* y) const {
        Buffer row(2 * D);
        for (int64_t r = first; r < first + n; r++, y += D) {
            float* sum = sums ? sums + r * D : row.data() + D;
            if (dropout.keys) dropout.drop(y, y, r * D, D);
            Moments moments = norm_row(y, x + r * D, norm_weight, norm_bias, sum, outputs + r * D,
                                       row.data(), D);
            if (sums) means[r] = moments.mean, inverses[r] = moments.inverse;
        }
    }
};

// With keys there is dropout of the hidden units, and of y, in images with `size` numbers in x.
inline void forward(const float* x, const float* weight1, const float* bias1, const float* weight2,
                    const float* bias2, const float* norm_weight, const float* norm_bias,
                    float* outputs, float* hidden, float* sums, float* means, float* inverses,
                    const uint32_t* hidden_keys, const uint32_t* keys, int64_t rows, int64_t D,
                    int64_t F, int64_t size, int64_t hidden_threshold, float hidden_scale,
                    int64_t threshold, float scale, int64_t threads) {
    Buffer packed1(D * F), packed2(D * F);
    pack(weight1, D, F, true, packed1.data());
    pack(weight2, F, D, true, packed2.data());
    Forward pass{x, packed1.data(), bias1, packed2.data(), bias2, norm_weight, norm_bias,
                 outputs, hidden, sums, means, inverses,
                 {hidden_keys, size / D * F, hidden_threshold, hidden_scale},
                 {keys, size, threshold, scale}, D, F};
    run_tasks((rows + BLOCK - 1) / BLOCK, threads, [&](int64_t task) {
        pass.block(task * BLOCK, std::min(BLOCK, rows - task * BLOCK));
    });
}

// What the gradients are computed from, as in `Forward`; the weights are packed for the gradients.
struct Given {
    const float *x, *hidden, *sums, *means, *inverses, *gradients;
    const float *packed1, *packed2, *norm_weight;
    Dropout dropout;  // of y
    float factor;     // of the dropout of hidden units
    int64_t D, F;
};

// Where the gradients go: of x (rows, D), of the weights (F, D) and (D, F), to which those of each
// block are added, and those of a block: of the biases (F) and (D), of the norm (2, D).
struct Gradients {
    float *x, *weight1, *weight2, *bias1, *bias2, *norm;
};

// One block of rows after the other.
class Backward {
    const Given given;
    const int64_t D = given.D, F = given.F;
    Panels inputs{BLOCK, D};                      // x
    Buffer y{BLOCK * D}, row{2 * D};              // `y`: its gradient
    Panels gradients{BLOCK, D}, masked{BLOCK, F};  // the same; the gradient in front of the relu

   public:
    explicit Backward(const Given& given) : given(given) {}

    // That of the n rows from `first` on.
    void block(int64_t first, int64_t n, const Gradients& to) {
        inputs.rows = gradients.rows = masked.rows = n;
        inputs.copy(given.x + first * D);
        norm_backward(first, n, to);
        gradients.copy(y.data());
        add_rows(y.data(), n, D, to.bias2);
        std::fill_n(to.bias1, F, 0.f);
        for (int64_t c = 0; c < F; c += PANEL) {
            const float* units = given.hidden + first * F + c * n;
            each_rows(n, [&](int64_t r, auto R) {
                mask<R>(r, c, units + r * PANEL, to.bias1 + c);
            });
            add_outer(c, n, units, to);
        }
        each_panel(D, [&](int64_t d, auto V) {
            each_rows(n, [&](int64_t r, auto R) {
                add_inputs<R, V>(r, d, to.x + (first + r) * D + d);
            });
        });
    }

   private:
    // The gradient through the norm: of y, and of x without what it has from the products.
    void norm_backward(int64_t first, int64_t n, const Gradients& to) {
        std::fill_n(to.norm, 2 * D, 0.f);
        for (int64_t r = 0; r < n; r++) {
            int64_t i = first + r, at = i * D;
            float* d_y = y.data() + r * D;
            norm_row_backward(given.gradients + at, given.sums + at,
                              {given.means[i], given.inverses[i]}, given.norm_weight, to.x + at, d_y,
                              to.norm, to.norm + D, row.data(), row.data() + D, D);
            if (given.dropout.keys) given.dropout.drop(d_y, d_y, at, D);
        }
    }

    // The gradient in front of the relu of R rows and of a panel of hidden units, from column c on,
    // whose sums over the rows are added to `sums`.
    template <int R>
    [[gnu::noinline]] void mask(int64_t r, int64_t c, const float* units, float* sums) {
        constexpr int V = VECTORS;
        Vector rows[R][V] = {}, totals[V];
        gradients.accumulate_rows(rows, r, given.packed2 + c * D);
        read(sums, totals);
        const Vector *unit = (const Vector*)units, zero = {};
        Vector* target = (Vector*)masked[c] + r * V;
        for (int i = 0; i < R; i++)
            for (int v = 0; v < V; v++) {
                // NaN is not 0.
                Vector row = unit[i * V + v] <= 0.f ? zero : rows[i][v] * given.factor;
                target[i * V + v] = row;
                totals[v] += row;
            }
        for (int v = 0; v < V; v++) ((Vector*)sums)[v] = totals[v];
    }

    // Adds the gradients of the weights from and to a panel of hidden units.
    void add_outer(int64_t c, int64_t n, const float* units, const Gradients& to) {
        each_panel(D, [&](int64_t d, auto V) {
            const int64_t width = V * LANES;
            for (int64_t o = 0; o < width; o += COLUMNS)
                outer<VECTORS>(gradients[d] + o, width, units, n, to.weight2 + (d + o) * F + c, F);
            for (int64_t o = 0; o < PANEL; o += COLUMNS)
                outer<V>(masked[c] + o, PANEL, inputs[d], n, to.weight1 + (c + o) * D + d, D);
        });
    }

    // Adds the gradient of R rows of x from the products, in the panel from column d on.
    template <int R, int V>
    [[gnu::noinline]] void add_inputs(int64_t r, int64_t d, float* target) {
        Vector rows[R][V];
        for (int i = 0; i < R; i++) read(target + i * D, rows[i]);
        masked.accumulate_rows(rows, r, given.packed1 + d * F);
        for (int i = 0; i < R; i++)
            for (int v = 0; v < V; v++) ((Vector*)(target + i * D))[v] = rows[i][v];
    }
};

// Each of `parts` tasks adds up the gradients of the weights of its blocks: (parts, F, D) and
// (parts, D, F). Those of the biases and of the norm are those of each block: (blocks, F),
// (blocks, D) and (blocks, 2, D).
inline void backward(const float* x, const float* hidden, const float* sums, const float* means,
                     const float* inverses, const float* gradients, const float* weight1,
                     const float* weight2, const float* norm_weight, float* d_x, float* d_weights1,
                     float* d_weights2, float* d_biases1, float* d_biases2, float* d_norms,
                     const uint32_t* keys, int64_t rows, int64_t D, int64_t F, float factor,
                     int64_t size, int64_t threshold, float scale, int64_t parts) {
    Buffer packed1(D * F), packed2(D * F);
    pack(weight1, F, D, false, packed1.data());
    pack(weight2, D, F, false, packed2.data());
    Given given{x, hidden, sums, means, inverses, gradients, packed1.data(), packed2.data(),
                norm_weight, {keys, size, threshold, scale}, factor, D, F};
    int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    run_tasks(parts, parts, [&](int64_t part) {
        Backward backward(given);
        float *weight1 = d_weights1 + part * D * F, *weight2 = d_weights2 + part * D * F;
        std::fill_n(weight1, D * F, 0.f);
        std::fill_n(weight2, D * F, 0.f);
        for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++)
            backward.block(b * BLOCK, std::min(BLOCK, rows - b * BLOCK),
                           {d_x, weight1, weight2, d_biases1 + b * F, d_biases2 + b * D,
                            d_norms + b * 2 * D});
    });
}

}  // namespace feed_forward
