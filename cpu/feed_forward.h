// The second half of a layer, norm(x + y) with y = relu(x W1' + b1) W2' + b2, and its gradient,
// block by block of rows, so that what lies between the products stays in the caches.
//
// Products are of words (words.h). Sums, the norm and the gradients of x and of all parameters are
// float32. D is the width of x, a multiple of LANES, F that of the hidden units, a multiple of PANEL.

#pragma once

#include "common.h"
#include "dropout.h"
#include "norm.h"
#include "words.h"

namespace feed_forward {

constexpr int64_t BLOCK = ROWS_PER_BLOCK;
constexpr int COLUMNS = 4;  // of a tile of a weight's gradient, which divides all widths

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

// matrix (A, stride) += a^T b for COLUMNS columns of a and V vectors of b, both by column with
// `rows` words in a column; in a, those of the next row are `step` further.
template <int V, class Word>
[[gnu::noinline]] void outer(const Word* a, int64_t step, const Word* b, int64_t rows,
                             float* matrix, int64_t stride) {
    constexpr int R = COLUMNS;
    Vector sums[R][V];
    for (int r = 0; r < R; r++) read(matrix + r * stride, sums[r]);
    for (int64_t i = 0; i < rows; i++, a += step, b += V * LANES) {
        Vector columns[V];
        read(b, columns);
        add_products(sums, a, 1, columns);
    }
    for (int r = 0; r < R; r++) store_row(matrix + r * stride, sums[r]);
}

// x and its width D, the width F of the hidden units, and the transposed weights (D, F) and (F, D);
// what the gradient needs: unless they are null, the hidden units by column in panels, those of one
// block after the other, and x + y and its moments.
template <class Word, class X>
struct Forward {
    const X* x;
    const Columns<Word>& weight1;
    const float* bias1;
    const Columns<Word>& weight2;
    const float *bias2, *norm_weight, *norm_bias;
    X* outputs;
    Word* hidden;
    X* sums;
    float *means, *inverses;
    Dropout hidden_dropout, dropout;  // of the hidden units and of y
    int64_t D, F;

    static constexpr int64_t NUMBERS = ::NUMBERS<Word>, PANEL_WORDS = PANEL / NUMBERS;

    // The n rows from `first` on.
    void block(int64_t first, int64_t n) const {
        Buffer<Word> inputs(n * D / NUMBERS), buffer(n * F / NUMBERS);
        Buffer<float> y(n * D);
        const Word* rows = as_words(x + first * D, n, D, inputs.data());
        Word* kept = hidden ? hidden + first / NUMBERS * F : nullptr;
        Word* units = kept && NUMBERS == 1 ? kept : buffer.data();  // in panels by row
        for (int64_t c = 0; c < F; c += PANEL) {
            Word* panel = units + c * n / NUMBERS;
            each_rows(n, [&](int64_t r, auto R) {
                write_units<R>(rows + r * D / NUMBERS, (first + r) * F, c, panel + r * PANEL_WORDS);
            });
            if (kept && NUMBERS > 1)
                order_by_column(panel, PANEL_WORDS, n, PANEL, kept + c * words_of<Word>(n));
        }
        each_panel(D, [&](int64_t d, auto V) {
            each_rows(n, [&](int64_t r, auto R) {
                write_outputs<R, V>(units + r * PANEL_WORDS, n, d, y.data() + r * D + d);
            });
        });
        add_and_normalise(first, n, y.data());
    }

    // R rows of the panel of hidden units from column c on; `place` is that of the first row.
    template <int R>
    [[gnu::noinline]] void write_units(const Word* rows, int64_t place, int64_t c,
                                       Word* units) const {
        constexpr int V = VECTORS;
        Vector sums[R][V];
        for (int i = 0; i < R; i++) read(bias1 + c, sums[i]);
        accumulate(sums, rows, D / NUMBERS, weight1[c], D / NUMBERS);
        for (int i = 0; i < R; i++) {
            for (int v = 0; v < V; v++) sums[i][v] = sums[i][v] < 0.f ? 0.f : sums[i][v];
            if (hidden_dropout.keys) hidden_dropout.drop(sums[i], place + i * F + c);
            store_row(units + i * PANEL_WORDS, sums[i]);
        }
    }

    // R rows of y, in V vectors from column d on.
    template <int R, int V>
    [[gnu::noinline]] void write_outputs(const Word* units, int64_t n, int64_t d, float* y) const {
        Vector sums[R][V];
        for (int i = 0; i < R; i++) read(bias2 + d, sums[i]);
        for (int64_t c = 0; c < F; c += PANEL)
            accumulate(sums, units + c * n / NUMBERS, PANEL_WORDS,
                       weight2[d] + c * V * LANES / NUMBERS, PANEL_WORDS);
        for (int i = 0; i < R; i++) store_row(y + i * D, sums[i]);
    }

    void add_and_normalise(int64_t first, int64_t n, float* y) const {
        std::vector<float> row(D);
        std::vector<X> unkept(D);
        for (int64_t r = first; r < first + n; r++, y += D) {
            X* sum = sums ? sums + r * D : unkept.data();
            if (dropout.keys) dropout.drop(y, y, r * D, D);
            Moments moments = norm_row(y, x + r * D, norm_weight, norm_bias, sum, outputs + r * D,
                                       row.data(), D);
            if (sums) means[r] = moments.mean, inverses[r] = moments.inverse;
        }
    }
};

// The weights are transposed: (D, F) and (F, D). With keys there is dropout of the hidden units, and
// of y, in images with `size` numbers in x.
template <class Word, class X>
void forward(const X* x, const float* weight1, const float* bias1, const float* weight2,
             const float* bias2, const float* norm_weight, const float* norm_bias, X* outputs,
             Word* hidden, X* sums, float* means, float* inverses, const uint32_t* hidden_keys,
             const uint32_t* keys, int64_t rows, int64_t D, int64_t F, int64_t size,
             int64_t hidden_threshold, float hidden_scale, int64_t threshold, float scale,
             int64_t threads) {
    Columns<Word> columns1(weight1, D, F), columns2(weight2, F, D);
    Forward<Word, X> pass{x, columns1, bias1, columns2, bias2, norm_weight, norm_bias,
                          outputs, hidden, sums, means, inverses,
                          {hidden_keys, size / D * F, hidden_threshold, hidden_scale},
                          {keys, size, threshold, scale}, D, F};
    run_tasks((rows + BLOCK - 1) / BLOCK, threads, [&](int64_t task) {
        pass.block(task * BLOCK, std::min(BLOCK, rows - task * BLOCK));
    });
}

// What the gradients are computed from, as in `Forward`, and the weights (F, D) and (D, F).
template <class Word>
struct Given {
    const float* x;
    const Word* hidden;
    const float *sums, *means, *inverses, *gradients;
    const Columns<Word>& weight1;
    const Columns<Word>& weight2;
    const float* norm_weight;
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
template <class Word>
class Backward {
    static constexpr int64_t NUMBERS = ::NUMBERS<Word>, PANEL_WORDS = PANEL / NUMBERS;

    const Given<Word> given;
    const int64_t D = given.D, F = given.F;
    Buffer<float> y{BLOCK * D}, row{2 * D};  // `y`: its gradient
    Buffer<Word> words{BLOCK * D / NUMBERS};
    // The gradient in front of the relu, in panels by row; a panel of it by column.
    Buffer<Word> masked{BLOCK * F / NUMBERS}, panel{BLOCK * PANEL_WORDS};
    Columns<Word> inputs{BLOCK, D}, gradients{BLOCK, D};  // x, the gradient of y

   public:
    explicit Backward(const Given<Word>& given) : given(given) {}

    // That of the n rows from `first` on.
    void block(int64_t first, int64_t n, const Gradients& to) {
        inputs.fill(as_words(given.x + first * D, n, D, words.data()), n);
        norm_backward(first, n, to);
        add_rows(y.data(), n, D, to.bias2);
        const Word* rows = as_words(y.data(), n, D, words.data());
        gradients.fill(rows, n);
        std::fill_n(to.bias1, F, 0.f);
        for (int64_t c = 0; c < F; c += PANEL) {
            const Word* units = given.hidden + first / NUMBERS * F + c * words_of<Word>(n);
            Word* target = masked.data() + c * n / NUMBERS;
            each_rows(n, [&](int64_t r, auto R) {
                mask<R>(rows + r * D / NUMBERS, r, c, units, target, to.bias1 + c);
            });
            add_outer(c, by_column(target, n), units, to);
        }
        each_panel(D, [&](int64_t d, auto V) {
            each_rows(n, [&](int64_t r, auto R) {
                add_inputs<R, V>(r, n, d, to.x + (first + r) * D + d);
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

    // The gradient in front of the relu of R rows, from row r on, and of a panel of hidden units,
    // from column c on: to `target`, and added over the rows to `sums`.
    template <int R>
    [[gnu::noinline]] void mask(const Word* rows, int64_t r, int64_t c, const Word* units,
                                Word* target, float* sums) {
        constexpr int V = VECTORS;
        Vector results[R][V] = {}, totals[V];
        accumulate(results, rows, D / NUMBERS, given.weight2[c], D / NUMBERS);
        read(sums, totals);
        const Vector zero = {};
        for (int i = 0; i < R; i++) {
            Vector columns[V];
            read(units + (r + i) / NUMBERS * PANEL, columns);
            for (int v = 0; v < V; v++) {
                Vector unit = numbers_of_row<Word>(columns[v], r + i);
                // NaN is not 0.
                results[i][v] = unit <= 0.f ? zero : results[i][v] * given.factor;
                totals[v] += results[i][v];
            }
            store_row(target + (r + i) * PANEL_WORDS, results[i]);
        }
        store_row(sums, totals);
    }

    // A panel of the gradient in front of the relu by column.
    const Word* by_column(const Word* rows, int64_t n) {
        if (NUMBERS == 1) return rows;
        order_by_column(rows, PANEL_WORDS, n, PANEL, panel.data());
        return panel.data();
    }

    // Adds the gradients of the weights from and to a panel of hidden units.
    void add_outer(int64_t c, const Word* columns, const Word* units, const Gradients& to) {
        each_panel(D, [&](int64_t d, auto V) {
            const int64_t width = V * LANES;
            for (int64_t o = 0; o < width; o += COLUMNS)
                outer<VECTORS>(gradients[d] + o, width, units, gradients.rows,
                               to.weight2 + (d + o) * F + c, F);
            for (int64_t o = 0; o < PANEL; o += COLUMNS)
                outer<V>(columns + o, PANEL, inputs[d], inputs.rows,
                         to.weight1 + (c + o) * D + d, D);
        });
    }

    // Adds the gradient of R rows of x from the products, in the panel from column d on.
    template <int R, int V>
    [[gnu::noinline]] void add_inputs(int64_t r, int64_t n, int64_t d, float* target) {
        Vector rows[R][V];
        for (int i = 0; i < R; i++) read(target + i * D, rows[i]);
        for (int64_t c = 0; c < F; c += PANEL)
            accumulate(rows, masked.data() + c * n / NUMBERS + r * PANEL_WORDS, PANEL_WORDS,
                       given.weight1[d] + c * V * LANES / NUMBERS, PANEL_WORDS);
        for (int i = 0; i < R; i++) store_row(target + i * D, rows[i]);
    }
};

// Each of `parts` tasks adds up the gradients of the weights of its blocks: (parts, F, D) and
// (parts, D, F). Those of the biases and of the norm are those of each block: (blocks, F),
// (blocks, D) and (blocks, 2, D).
template <class Word>
void backward(const float* x, const Word* hidden, const float* sums, const float* means,
              const float* inverses, const float* gradients, const float* weight1,
              const float* weight2, const float* norm_weight, float* d_x, float* d_weights1,
              float* d_weights2, float* d_biases1, float* d_biases2, float* d_norms,
              const uint32_t* keys, int64_t rows, int64_t D, int64_t F, float factor, int64_t size,
              int64_t threshold, float scale, int64_t parts) {
    Columns<Word> columns1(weight1, F, D), columns2(weight2, D, F);
    Given<Word> given{x, hidden, sums, means, inverses, gradients, columns1, columns2,
                      norm_weight, {keys, size, threshold, scale}, factor, D, F};
    int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    run_tasks(parts, parts, [&](int64_t part) {
        Backward<Word> backward(given);
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
