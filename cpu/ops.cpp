// Operations of training and evaluation on CPUs: attention (attention.h, gated_attention.h), the
// layer norm of a residual sum and the short convolution (add_norm, short_convolution of
// layers/ops.py), dropout (dropout.h), the second half of a layer (feed_forward.h), the loss
// (mixture.h), and what the gradient of a linear layer needs besides products.
//
// Tensors are float32 or bfloat16; everything between reading and writing a row is float32. The
// compile-time constants are those of the headers.

#include "attention.h"
#include "dropout.h"
#include "feed_forward.h"
#include "gated_attention.h"
#include "mixture.h"
#include "norm.h"

// A sum over all rows consists of those of the tasks, in their order, so that it does not depend on
// the number of threads.
constexpr int64_t TASK = ROWS_PER_TASK;

// Calls run(task, first row, last row) for each task of a number of rows.
template <class Run>
void run_row_tasks(int64_t rows, int threads, const Run& run) {
    run_tasks((rows + TASK - 1) / TASK, threads, [&](int64_t task) {
        run(task, task * TASK, std::min(rows, (task + 1) * TASK));
    });
}

// Dropout in place.
template <class T>
void drop(T* x, const uint32_t* keys, int64_t images, int64_t size, int64_t threshold, float scale,
          int64_t threads) {
    Dropout dropout{keys, size, threshold, scale};
    constexpr int64_t PART = 1 << 14;
    int64_t parts = (size + PART - 1) / PART;
    run_tasks(images * parts, threads, [=](int64_t task) {
        int64_t part = task % parts * PART, start = task / parts * size + part;
        dropout.drop(x + start, x + start, start, std::min(PART, size - part));
    });
}

// With dropout of y if there are keys, of images with `size` elements each.
template <class X, class T>
void norm(const T* y, const X* x, const float* weight, const float* bias, X* sums, X* out,
          float* means, float* inverses, const uint32_t* keys, int64_t rows, int64_t width,
          int64_t size, int64_t threshold, float scale, int64_t threads) {
    Dropout dropout{keys, size, threshold, scale};
    run_row_tasks(rows, threads, [=](int64_t, int64_t first, int64_t last) {
        std::vector<float> row(width), dropped(width);
        for (int64_t i = first; i < last; i++) {
            int64_t at = i * width;
            auto add_and_normalise = [&](const auto* y) {
                return norm_row(y, x + at, weight, bias, sums + at, out + at, row.data(), width);
            };
            if (keys) dropout.drop(y + at, dropped.data(), at, width);
            Moments moments = keys ? add_and_normalise(dropped.data()) : add_and_normalise(y + at);
            means[i] = moments.mean;
            inverses[i] = moments.inverse;
        }
    });
}

// The gradients of x and of y, which are equal but for their types and the dropout of y, and for
// each task those of weight and bias, `parameters` (tasks, 2, width).
template <class X, class T>
void norm_backward(const X* g, const X* sums, const float* means, const float* inverses,
                   const float* weight, X* d_x, T* d_y, float* parameters, const uint32_t* keys,
                   int64_t rows, int64_t width, int64_t size, int64_t threshold, float scale,
                   int64_t threads) {
    Dropout dropout{keys, size, threshold, scale};
    run_row_tasks(rows, threads, [=](int64_t task, int64_t first, int64_t last) {
        std::vector<float> normed(width), scaled(width);
        float *d_weight = parameters + task * 2 * width, *d_bias = d_weight + width;
        std::fill_n(d_weight, 2 * width, 0.f);
        for (int64_t i = first; i < last; i++) {
            int64_t at = i * width;
            norm_row_backward(g + at, sums + at, {means[i], inverses[i]}, weight, d_x + at,
                              d_y + at, d_weight, d_bias, normed.data(), scaled.data(), width);
            if (keys) dropout.drop(d_y + at, d_y + at, at, width);
        }
    });
}

// The gradient of a bias: the sums of the rows of g (rows, width), for each task (tasks, width).
template <class T>
void bias_backward(const T* g, float* sums, int64_t rows, int64_t width, int64_t threads) {
    run_row_tasks(rows, threads, [=](int64_t task, int64_t first, int64_t last) {
        float* __restrict sum = sums + task * width;
        std::fill_n(sum, width, 0.f);
        for (int64_t i = first; i < last; i++)
            for (int64_t d = 0; d < width; d++) sum[d] += load(g[i * width + d]);
    });
}

// The same behind a relu, and dropout that multiplied by `scale`, with these `outputs`: `masked` is
// g * scale where they are positive, else 0.
template <class T>
void relu_backward(const T* g, const T* outputs, T* masked, float* sums, float scale, int64_t rows,
                   int64_t width, int64_t threads) {
    run_row_tasks(rows, threads, [=](int64_t task, int64_t first, int64_t last) {
        float *__restrict sum = sums + task * width, factor = scale;
        std::fill_n(sum, width, 0.f);
        for (int64_t i = first; i < last; i++) {
            const T *__restrict row = g + i * width, *__restrict output = outputs + i * width;
            T* __restrict target = masked + i * width;
            for (int64_t d = 0; d < width; d++) {
                float value = load(output[d]) <= 0 ? 0 : factor * load(row[d]);  // NaN is no 0
                sum[d] += value;
                store(target + d, value);
            }
        }
    });
}

// Where the short convolution of sequences (length, width) looks: `taps` positions before.
struct Taps {
    const int64_t* offsets;
    int64_t length, width, taps;

    int64_t size() const { return length * width; }  // of an image
};

// target += factors * source for a row of `width` numbers.
template <class S, class T>
inline void add_product(float* __restrict target, const S* __restrict factors,
                        const T* __restrict source, int64_t width) {
    for (int64_t d = 0; d < width; d++) target[d] += load(factors[d]) * load(source[d]);
}

// One image: y_i = x_i + the sum of weight_k x_(i - offset_k).
template <class T>
void convolve_image(const T* x, const float* weight, T* y, Taps taps) {
    std::vector<float> row(taps.width);
    for (int64_t i = 0; i < taps.length; i++) {
        for (int64_t d = 0; d < taps.width; d++) row[d] = load(x[i * taps.width + d]);
        for (int64_t k = 0; k < taps.taps; k++)
            if (int64_t from = i - taps.offsets[k]; from >= 0)
                add_product(row.data(), weight + k * taps.width, x + from * taps.width,
                            taps.width);
        store(y + i * taps.width, row.data(), taps.width);
    }
}

// The gradients of one image: of x_i that of y_i and the sum of weight_k times those of
// y_(i + offset_k), and of weight_k the sum of x_i times those of y_(i + offset_k).
template <class T>
void convolve_image_backward(const T* x, const float* weight, const T* g, T* inputs,
                             float* weights, Taps taps) {
    std::vector<float> row(taps.width);
    std::fill_n(weights, taps.taps * taps.width, 0.f);
    for (int64_t i = 0; i < taps.length; i++) {
        for (int64_t d = 0; d < taps.width; d++) row[d] = load(g[i * taps.width + d]);
        for (int64_t k = 0; k < taps.taps; k++) {
            int64_t to = i + taps.offsets[k];
            if (to >= taps.length) continue;
            const T* later = g + to * taps.width;
            add_product(row.data(), weight + k * taps.width, later, taps.width);
            add_product(weights + k * taps.width, x + i * taps.width, later, taps.width);
        }
        store(inputs + i * taps.width, row.data(), taps.width);
    }
}

template <class T>
void convolve(const T* x, const float* weight, const int64_t* offsets, T* y, int64_t images,
              int64_t length, int64_t width, int64_t n_taps, int64_t threads) {
    Taps taps{offsets, length, width, n_taps};
    run_tasks(images, threads, [=](int64_t n) {
        convolve_image(x + n * taps.size(), weight, y + n * taps.size(), taps);
    });
}

// `weights` (N, taps, width) are those of each image, to be summed.
template <class T>
void convolve_backward(const T* x, const float* weight, const int64_t* offsets, const T* g,
                       T* inputs, float* weights, int64_t images, int64_t length, int64_t width,
                       int64_t n_taps, int64_t threads) {
    Taps taps{offsets, length, width, n_taps};
    run_tasks(images, threads, [=](int64_t n) {
        int64_t at = n * taps.size();
        convolve_image_backward(x + at, weight, g + at, inputs + at,
                                weights + n * taps.taps * taps.width, taps);
    });
}

// Log-probabilities (rows,) of the bytes `values` (rows,) with parameters (rows, 3K), and their
// gradients (rows, 3K) unless that is null.
template <class T>
void log_prob(const T* parameters, const uint8_t* values, float* log_probs, float* gradients,
              int64_t rows, int64_t K, int64_t threads) {
    run_row_tasks(rows, threads, [=](int64_t, int64_t first, int64_t last) {
        Components components(parameters + first * 3 * K, values + first, last - first, K);
        components.log_prob(log_probs + first, gradients ? gradients + first * 3 * K : nullptr);
    });
}

#define FOR_EACH_TYPE(FUNCTION) \
    exported<FUNCTION<float>>(#FUNCTION "_float32"), \
    exported<FUNCTION<BFloat16>>(#FUNCTION "_bfloat16")

extern "C" const Export* exports() {
    static const Export table[] = {
        FOR_EACH_TYPE(forward),
        FOR_EACH_TYPE(backward),
        FOR_EACH_TYPE(gated_forward),
        FOR_EACH_TYPE(gated_backward),
        FOR_EACH_TYPE(convolve),
        FOR_EACH_TYPE(convolve_backward),
        FOR_EACH_TYPE(drop),
        FOR_EACH_TYPE(log_prob),
        exported<feed_forward::forward<float, float>>("feed_forward_block_float32_float32"),
        exported<feed_forward::backward<float>>("feed_forward_block_backward_float32"),
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
        exported<feed_forward::forward<Pair, float>>("feed_forward_block_bfloat16_float32"),
        exported<feed_forward::forward<Pair, BFloat16>>("feed_forward_block_bfloat16_bfloat16"),
        exported<feed_forward::backward<Pair>>("feed_forward_block_backward_bfloat16"),
#endif
        FOR_EACH_TYPE(bias_backward),
        FOR_EACH_TYPE(relu_backward),
        // Named by the types of x and y.
        exported<norm_backward<float, float>>("norm_backward_float32_float32"),
        exported<norm_backward<float, BFloat16>>("norm_backward_float32_bfloat16"),
        exported<norm_backward<BFloat16, BFloat16>>("norm_backward_bfloat16_bfloat16"),
        exported<norm<float, float>>("norm_float32_float32"),
        exported<norm<float, BFloat16>>("norm_float32_bfloat16"),
        exported<norm<BFloat16, BFloat16>>("norm_bfloat16_bfloat16"),
        {},
    };
    return table;
}
