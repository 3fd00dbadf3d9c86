// Operations of training and evaluation on CPUs: causal linear attention and its gradient
// (linear_quadratic of layers/attention.py, computed as a recurrence), the layer norm of a residual
// sum and the short convolution (add_norm, short_convolution of layers/ops.py), and dropout
// (keep_mask of layers/dropout.py).
//
// Tensors are float32 or bfloat16; everything between reading and writing a row is float32. The
// compile-time constants are those of common.h.

#include <memory>

#include "common.h"
#include "gated.h"

// Positions per call of `update`: as many as keep their rows in registers.
#ifdef __AVX512F__
constexpr int GROUP = std::max(1, std::min(4, 8 / COUNT));
#else
constexpr int GROUP = 1;
#endif

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
    for (int e = 0; e < SIZE; e++) store(target + e, gradient[e] * std::min(phi[e], 1.f));
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

    template <int N>
    void load_position(int64_t i, int n, Positions<N>& at) {
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
        for (int n = 0; n < N; n++) load_position(first + n, n, at);
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
            load_position(i, n, at);
            for (int e = 0; e < SIZE; e++) at.phi_q[n][e] *= inverses[i];
            for (int e = 0; e < SIZE; e++) keys[n][e] = W[e] -= at.phi_q[n][e] * products[i];
        }
        update<N>(transposed[0], at.gradient, at.phi_q, at.value, keys);
        update<N>(R[0], at.phi_q, at.gradient, at.phi_k, values);
        for (int n = 0; n < N; n++) {
            int64_t start = (shape.length - 1 - first - n) * shape.stride();
            write_gradient(keys[n], at.phi_k[n], gradients.k + start);
            for (int m = 0; m < SIZE; m++) store(gradients.v + start + m, values[n][m]);
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
        FOR_EACH_TYPE(gated::forward),
        FOR_EACH_TYPE(gated::backward),
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
