// Operations of training and evaluation on CPUs: attention (attention.h), the layer norm of a
// residual sum and the short convolution (add_norm, short_convolution of layers/ops.py), and dropout
// (keep_mask of layers/dropout.py).
//
// Tensors are float32 or bfloat16; everything between reading and writing a row is float32. The
// compile-time constants are those of the headers.

#include "attention.h"

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

template <class X, class T>
void norm(const T* y, const X* x, const float* weight, const float* bias, X* sums, X* out,
          float* means, float* inverses, int64_t rows, int64_t width, int64_t threads) {
    constexpr int64_t ROWS = 64;  // per task
    run_tasks((rows + ROWS - 1) / ROWS, threads, [=](int64_t task) {
        std::vector<float> row(width);
        for (int64_t i = task * ROWS; i < std::min(rows, (task + 1) * ROWS); i++) {
            int64_t at = i * width;
            Moments moments =
                norm_row(y + at, x + at, weight, bias, sums + at, out + at, row.data(), width);
            means[i] = moments.mean;
            inverses[i] = moments.inverse;
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
        for (int64_t d = 0; d < taps.width; d++) store(y + i * taps.width + d, row[d]);
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
        for (int64_t d = 0; d < taps.width; d++) store(inputs + i * taps.width + d, row[d]);
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

// keep_mask of layers/dropout.py: a hash of an element's index and its image's two keys.
inline bool keep(uint32_t place, uint32_t first, uint32_t second, uint32_t threshold) {
    uint32_t x = place ^ first;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = (x ^ (x >> 16)) + second;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return (x ^ (x >> 16)) >= threshold;
}

struct Dropout {
    uint32_t threshold;
    float scale;
};

// y = x * scale where kept, else 0, for `count` elements of an image from index `start` on.
template <class T>
void drop_part(const T* __restrict x, T* __restrict y, uint32_t start, int count,
               const uint32_t* keys, Dropout dropout) {
    uint32_t first = keys[0], second = keys[1];
    for (int i = 0; i < count; i++) {
        float factor = keep(start + i, first, second, dropout.threshold) ? dropout.scale : 0;
        store(y + i, load(x[i]) * factor);
    }
}

// Dropout of images with `size` elements each; keys (N, 2).
template <class T>
void drop(const T* x, T* y, const uint32_t* keys, int64_t images, int64_t size, int64_t threshold,
          float scale, int64_t threads) {
    Dropout dropout{uint32_t(threshold), scale};
    constexpr int64_t PART = 1 << 14;
    int64_t parts = (size + PART - 1) / PART;
    run_tasks(images * parts, threads, [=](int64_t task) {
        int64_t n = task / parts, start = task % parts * PART, at = n * size + start;
        drop_part(x + at, y + at, start, std::min(PART, size - start), keys + 2 * n, dropout);
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
        // Named by the types of x and y.
        exported<norm<float, float>>("norm_float32_float32"),
        exported<norm<float, BFloat16>>("norm_float32_bfloat16"),
        exported<norm<BFloat16, BFloat16>>("norm_bfloat16_bfloat16"),
        {},
    };
    return table;
}
