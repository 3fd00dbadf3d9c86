// Causal linear attention and its gradient, the norm of a residual sum, and dropout, for
// processors: attention.linear_quadratic as the recurrence it is, models.ResidualNorm and
// dropout.keep_mask, each in one pass over the memory.
//
// kernels.py compiles this file with SIZE, the size of a head's queries, keys and values. Rows are
// float32 or bfloat16; everything between reading and writing a row is float32.

#include <atomic>
#include <cmath>
#include <thread>
#include <type_traits>
#include <vector>

#include "processor.h"

// Calls run(task) for every task, on so many threads: with g++ on those that torch's own products
// use, which otherwise would keep the processors busy for a while, waiting for more.
template <class Run>
void in_parallel(int64_t tasks, int threads, Run run) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) run(task);
#else
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(task);
    };
    std::vector<std::thread> workers;
    for (int64_t t = 1; t < std::min<int64_t>(threads, tasks); t++) workers.emplace_back(work);
    work();
    for (auto& worker : workers) worker.join();
#endif
}

template <class T>
inline void read(const T* x, float* row) {
    for (int m = 0; m < SIZE; m++) row[m] = load(x[m]);
}

// The derivative of the feature map is 1 where phi > 1, and phi elsewhere.
template <class T>
inline void write_gradient(const float* gradient, const float* phi, T* target) {
    for (int e = 0; e < SIZE; e++) store(target + e, gradient[e] * std::min(phi[e], 1.f));
}

struct Shape {
    int64_t images, length, heads, row;  // `row` numbers from one position's queries to the next
};

// Calls run(first, N) for groups of N positions, in order; N is a std::integral_constant.
template <class Run>
void in_groups(int64_t length, Run run) {
    int64_t first = 0;
    for (; first + TOGETHER <= length; first += TOGETHER)
        run(first, std::integral_constant<int, TOGETHER>());
    for (; first < length; first++) run(first, std::integral_constant<int, 1>());
}

// Outputs of one image and head; S and Z are the sums before, and after, its positions.
template <class T>
void attend(const T* q, const T* k, const T* v, T* out, Matrix& S, float* Z, Shape shape) {
    int64_t width = shape.heads * SIZE;
    in_groups(shape.length, [&](int64_t first, auto N) {
        float phi_q[N][SIZE], phi_k[N][SIZE], value[N][SIZE], sums[N][SIZE] = {};
        for (int n = 0; n < N; n++) {
            int64_t at = (first + n) * shape.row;
            features(q + at, phi_q[n]);
            features(k + at, phi_k[n]);
            read(v + at, value[n]);
        }
        update<N>(S[0], phi_k, value, phi_q, sums);
        for (int n = 0; n < N; n++) {
            for (int e = 0; e < SIZE; e++) Z[e] += phi_k[n][e];
            float scale = 1 / (dot(phi_q[n], Z) + EPSILON);
            for (int m = 0; m < SIZE; m++) store(out + (first + n) * width + m, sums[n][m] * scale);
        }
    });
}

// Gradients of one image and head. With g the gradient of out = S^T q / d and d = q.Z:
// dq = (S g - (out.g) Z) / d over the sums before a position, and dk = R v + W, dv = R^T k over
// those after it, R the sum of q g^T / d and W the sum of -q (out.g) / d.
template <class T>
void attend_backward(const T* q, const T* k, const T* v, const T* g, T* dq, T* dk, T* dv,
                     Shape shape) {
    int64_t width = shape.heads * SIZE;
    std::vector<float> scales(shape.length), projections(shape.length);
    Matrix S = {}, R = {}, transposed = {};  // S here is (M, E)
    float Z[SIZE] = {}, W[SIZE] = {};
    in_groups(shape.length, [&](int64_t first, auto N) {
        float phi_q[N][SIZE], phi_k[N][SIZE], value[N][SIZE], gradient[N][SIZE];
        float sums[N][SIZE] = {};
        for (int n = 0; n < N; n++) {
            int64_t i = first + n;
            features(q + i * shape.row, phi_q[n]);
            features(k + i * shape.row, phi_k[n]);
            read(v + i * shape.row, value[n]);
            read(g + i * width, gradient[n]);
        }
        update<N>(S[0], value, phi_k, gradient, sums);
        for (int n = 0; n < N; n++) {
            int64_t i = first + n;
            for (int e = 0; e < SIZE; e++) Z[e] += phi_k[n][e];
            float scale = scales[i] = 1 / (dot(phi_q[n], Z) + EPSILON);
            float projection = projections[i] = dot(phi_q[n], sums[n]) * scale;  // out.g
            for (int e = 0; e < SIZE; e++)
                sums[n][e] = (sums[n][e] - projection * Z[e]) * scale;
            write_gradient(sums[n], phi_q[n], dq + i * shape.row);
        }
    });
    in_groups(shape.length, [&](int64_t first, auto N) {  // from the last position to the first
        float phi_q[N][SIZE], phi_k[N][SIZE], value[N][SIZE], gradient[N][SIZE];
        float keys[N][SIZE], values[N][SIZE] = {};
        for (int n = 0; n < N; n++) {
            int64_t i = shape.length - 1 - first - n;
            features(q + i * shape.row, phi_q[n]);
            features(k + i * shape.row, phi_k[n]);
            read(v + i * shape.row, value[n]);
            read(g + i * width, gradient[n]);
            for (int e = 0; e < SIZE; e++) phi_q[n][e] *= scales[i];
            for (int e = 0; e < SIZE; e++) keys[n][e] = W[e] -= phi_q[n][e] * projections[i];
        }
        update<N>(transposed[0], gradient, phi_q, value, keys);
        update<N>(R[0], phi_q, gradient, phi_k, values);
        for (int n = 0; n < N; n++) {
            int64_t at = (shape.length - 1 - first - n) * shape.row;
            write_gradient(keys[n], phi_k[n], dk + at);
            for (int m = 0; m < SIZE; m++) store(dv + at + m, values[n][m]);
        }
    });
}

// All images and heads; queries, keys and values are (N, L, 3, H, E). S (N, H, E, M) and
// Z (N, H, E) may be null: sums from nothing.
template <class T>
void forward(const T* together, T* out, float* S, float* Z, Shape shape, int threads) {
    int64_t width = shape.heads * SIZE;
    in_parallel(shape.images * shape.heads, threads, [&](int64_t task) {
        int64_t n = task / shape.heads, head = task % shape.heads * SIZE;
        const T* q = together + n * shape.length * shape.row + head;
        T* to = out + n * shape.length * width + head;
        Matrix matrix = {};
        float sums[SIZE] = {};
        if (S) memcpy(matrix, S + task * SIZE * SIZE, sizeof matrix);
        if (Z) memcpy(sums, Z + task * SIZE, sizeof sums);
        attend(q, q + width, q + 2 * width, to, matrix, sums, shape);
        if (S) memcpy(S + task * SIZE * SIZE, matrix, sizeof matrix);
        if (Z) memcpy(Z + task * SIZE, sums, sizeof sums);
    });
}

template <class T>
void backward(const T* together, const T* g, T* gradients, Shape shape, int threads) {
    int64_t width = shape.heads * SIZE;
    in_parallel(shape.images * shape.heads, threads, [&](int64_t task) {
        int64_t n = task / shape.heads, head = task % shape.heads * SIZE;
        const T* q = together + n * shape.length * shape.row + head;
        T* dq = gradients + n * shape.length * shape.row + head;
        attend_backward(q, q + width, q + 2 * width, g + n * shape.length * width + head, dq,
                        dq + width, dq + 2 * width, shape);
    });
}

// A row of out = norm(x + y), and what the gradient needs: the sums x + y, their mean and the
// inverse of their deviation. `row` is room for the sums.
template <class X, class T>
void norm_row(const T* __restrict y, const X* __restrict x, const float* __restrict weight,
              const float* __restrict bias, X* __restrict sums, X* __restrict out, float* mean_out,
              float* inverse_out, float* __restrict row, int width, float epsilon) {
    float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int d = 0; d < width; d++) {
        float sum = load(x[d]) + load(y[d]);
        row[d] = sum;
        store(sums + d, sum);
        mean += sum;
    }
    mean /= width;
#pragma omp simd reduction(+ : variance)
    for (int d = 0; d < width; d++) variance += (row[d] - mean) * (row[d] - mean);
    float inverse = 1 / std::sqrt(variance / width + epsilon);
    for (int d = 0; d < width; d++) store(out + d, (row[d] - mean) * inverse * weight[d] + bias[d]);
    *mean_out = mean;
    *inverse_out = inverse;
}

template <class X, class T>
void norm(const T* y, const X* x, const float* weight, const float* bias, X* sums, X* out,
          float* means, float* inverses, int64_t rows, int64_t width, int threads, float epsilon) {
    constexpr int64_t PART = 64;
    in_parallel((rows + PART - 1) / PART, threads, [=](int64_t task) {
        std::vector<float> room(width);
        for (int64_t i = task * PART; i < std::min(rows, (task + 1) * PART); i++) {
            int64_t at = i * width;
            norm_row(y + at, x + at, weight, bias, sums + at, out + at, means + i, inverses + i,
                     room.data(), width, epsilon);
        }
    });
}

// dropout.keep_mask: a hash of a number and an image's two keys decides.
inline bool keep(uint32_t number, uint32_t first, uint32_t second, uint32_t threshold) {
    uint32_t x = number ^ first;
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

// y = x * scale where kept, else 0, from the image's number `start` on.
template <class T>
void drop_part(const T* __restrict x, T* __restrict y, uint32_t start, int count, uint32_t first,
               uint32_t second, Dropout dropout) {
    for (int i = 0; i < count; i++) {
        float factor = keep(start + i, first, second, dropout.threshold) ? dropout.scale : 0;
        store(y + i, load(x[i]) * factor);
    }
}

// `size` numbers of each image, with its keys (N, 2).
template <class T>
void drop(const T* x, T* y, const uint32_t* keys, int64_t images, int64_t size, Dropout dropout,
          int threads) {
    constexpr int64_t PART = 1 << 14;
    int64_t parts = (size + PART - 1) / PART;
    in_parallel(images * parts, threads, [=](int64_t task) {
        int64_t n = task / parts, start = task % parts * PART, at = n * size + start;
        int count = std::min(PART, size - start);
        drop_part(x + at, y + at, start, count, keys[2 * n], keys[2 * n + 1], dropout);
    });
}

#define FOR_EACH_TYPE(T, NAME)                                                                    \
    extern "C" void forward_##NAME(const T* together, T* out, float* S, float* Z, int64_t images, \
                                   int64_t length, int64_t heads, int64_t threads) {              \
        forward(together, out, S, Z, {images, length, heads, 3 * heads * SIZE}, threads);         \
    }                                                                                             \
    extern "C" void backward_##NAME(const T* together, const T* g, T* gradients, int64_t images,  \
                                    int64_t length, int64_t heads, int64_t threads) {             \
        backward(together, g, gradients, {images, length, heads, 3 * heads * SIZE}, threads);     \
    }                                                                                             \
    extern "C" void drop_##NAME(const T* x, T* y, const uint32_t* keys, int64_t images,           \
                                int64_t size, int64_t threshold, int64_t threads, float scale) {  \
        drop(x, y, keys, images, size, {uint32_t(threshold), scale}, threads);                    \
    }
FOR_EACH_TYPE(float, float32)
FOR_EACH_TYPE(BFloat16, bfloat16)
#define FOR_EACH_PAIR_OF_TYPES(X, T, NAMES)                                                       \
    extern "C" void norm_##NAMES(const T* y, const X* x, const float* weight, const float* bias,  \
                                 X* sums, X* out, float* means, float* inverses, int64_t rows,    \
                                 int64_t width, int64_t threads, float epsilon) {                 \
        norm(y, x, weight, bias, sums, out, means, inverses, rows, width, threads, epsilon);      \
    }
FOR_EACH_PAIR_OF_TYPES(float, float, float32_float32)
FOR_EACH_PAIR_OF_TYPES(float, BFloat16, float32_bfloat16)
FOR_EACH_PAIR_OF_TYPES(BFloat16, BFloat16, bfloat16_bfloat16)
