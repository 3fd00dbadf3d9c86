// The recurrent sampler with causal linear attention as one loop over the bytes, for processors:
// what ImageTransformer.step and mixture.sample compute, without a visit to Python.
//
// recurrence.py compiles this file with the sizes of a model as constants: LAYERS, HEADS, SIZE (of
// a head's queries, keys and values), MIXTURES, and BF16: with 1 the operands of the matrix
// products are bfloat16, with 0 float32; everything else, the sums too, is float32. Loops over
// constant sizes are left to the compiler's vectoriser; only the matrix product says how it uses
// registers.

#include <atomic>
#include <cmath>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "processor.h"

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;  // of 32 registers, ROWS * VECTORS hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;  // of 16
#else
constexpr int LANES = 4, VECTORS = 4;  // of 32 on ARM
#endif
constexpr int ROWS = 6, PANEL = LANES * VECTORS;
// With fewer rows a thread shares them with another, and each reads a part of the weights.
constexpr int ROWS_PER_TEAM = 8;
constexpr int D = HEADS * SIZE;

constexpr int padded(int n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Widths of the rows that the products write: whole panels.
constexpr int QKV = padded(3 * D), F = padded(4 * D), Y = padded(std::max(D, 3 * MIXTURES));

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if BF16
typedef BFloat16 Operand;
#else
typedef float Operand;
#endif

// Weights packed for `multiply`: PANEL outputs side by side, input after input
// (bfloat16: pair after pair of inputs).
struct Linear {
    const Operand* weight;  // (panels, inputs, PANEL) or (panels, inputs / 2, PANEL, 2)
    const float* bias;      // (panels * PANEL)
};

struct Norm {
    const float *weight, *bias;  // (D)
};

struct Layer {
    Linear qkv, out;
    Norm norm1;
    Linear linear1, linear2;
    Norm norm2;
};

struct Model {
    Layer layers[LAYERS];
    Norm norm;
    Linear predictor;
    const float *values, *positions;  // embeddings: (256, D / 2), (length - 1, D / 2)
};

struct State {
    float *S, *Z;  // (N, HEADS, SIZE, SIZE), (N, HEADS, SIZE), contiguous
};

// sums += a * b over all inputs, for R rows and one panel.
template <int R, int INPUTS>
inline void accumulate(Vector (&sums)[R][VECTORS], const Operand* a, int stride,
                       const Operand* b) {
#if BF16
    for (int i = 0; i < INPUTS; i += 2, b += 2 * PANEL) {
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            uint32_t pair;
            memcpy(&pair, a + r * stride + i, 4);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                Bits weights = *(const Bits*)(b + 2 * v * LANES);
#ifdef __AVX512BF16__
                sums[r][v] = (Vector)_mm512_dpbf16_ps(
                    (__m512)sums[r][v], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weights);
#else
                uint32_t low = pair << 16, high = pair & 0xffff0000;
                float first, second;
                memcpy(&first, &low, 4);
                memcpy(&second, &high, 4);
                sums[r][v] += first * (Vector)(weights << 16);
                sums[r][v] += second * (Vector)(weights & 0xffff0000);
#endif
            }
        }
    }
#else
    for (int i = 0; i < INPUTS; i++, b += PANEL) {
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] += a[r * stride + i] * *(const Vector*)(b + v * LANES);
    }
#endif
}

template <int R, int INPUTS, bool RELU, class Output>
void tile(const Operand* a, int stride, const Operand* b, const float* bias, Output* outputs,
          int width) {
    Vector sums[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = *(const Vector*)(bias + v * LANES);
    accumulate<R, INPUTS>(sums, a, stride, b);
    for (int r = 0; r < R; r++) {
        float row[PANEL];
        memcpy(row, sums[r], sizeof row);
        for (int j = 0; j < PANEL; j++)
            store(outputs + r * width + j, RELU ? std::max(row[j], 0.f) : row[j]);
    }
}

// Threads that work on the same rows and wait for each other after every product.
struct Team {
    int64_t first, last;  // rows
    int size;
    std::atomic<int> waiting{0}, round{0};

    void wait() {
        if (size == 1) return;
        int now = round.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1) == size - 1) {
            waiting.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > 4000) std::this_thread::yield();
    }
};

// The buffers of one team: a row an image.
struct Buffers {
    std::vector<float> x, qkv, y;
    std::vector<Operand> input, attended, hidden;

    explicit Buffers(size_t rows)
        : x(rows * D), qkv(rows * QKV), y(rows * Y), input(rows * D), attended(rows * D),
          hidden(rows * F) {}
};

// What `member` of a team does of `tasks`: a range.
struct Share {
    int64_t first, last;
    Share(int64_t tasks, int member, int size)
        : first(tasks * member / size), last(tasks * (member + 1) / size) {}
};

// outputs (rows, padded(OUTPUTS)) = inputs (rows, stride) * weights + bias.
template <int INPUTS, int OUTPUTS, bool RELU, class Output>
void multiply(const Operand* inputs, int stride, Linear linear, Output* outputs, int width,
              int64_t rows, Share panels) {
    for (int64_t p = panels.first; p < panels.last; p++) {
        const Operand* weight = linear.weight + p * INPUTS * PANEL;
        const float* bias = linear.bias + p * PANEL;
        for (int64_t r = 0; r < rows; r += ROWS) {
            auto run = [&](auto count) {
                tile<count.value, INPUTS, RELU>(inputs + r * stride, stride, weight, bias,
                                                outputs + r * width + p * PANEL, width);
            };
            switch (std::min<int64_t>(ROWS, rows - r)) {
                case 1: run(std::integral_constant<int, 1>()); break;
                case 2: run(std::integral_constant<int, 2>()); break;
                case 3: run(std::integral_constant<int, 3>()); break;
                case 4: run(std::integral_constant<int, 4>()); break;
                case 5: run(std::integral_constant<int, 5>()); break;
                default: run(std::integral_constant<int, 6>());
            }
        }
    }
}

// attention.linear_recurrent for one image and one head.
inline void attend(const float* qkv, float* S, float* Z, Operand* output) {
    float q[1][SIZE], k[1][SIZE], sums[1][SIZE] = {};
    features(qkv, q[0]);
    features(qkv + D, k[0]);
    update<1>(S, k, (const float(*)[SIZE])(qkv + 2 * D), q, sums);
    for (int e = 0; e < SIZE; e++) Z[e] += k[0][e];
    float scale = 1 / (dot(q[0], Z) + EPSILON);
    for (int m = 0; m < SIZE; m++) store(output + m, sums[0][m] * scale);
}

// x = norm(x + y), and as the operand of the next product.
inline void normalise(float* x, const float* y, Norm norm, Operand* output) {
    float mean = 0, variance = 0;
    if (y)
        for (int d = 0; d < D; d++) x[d] += y[d];
#pragma omp simd reduction(+ : mean)
    for (int d = 0; d < D; d++) mean += x[d];
    mean /= D;
#pragma omp simd reduction(+ : variance)
    for (int d = 0; d < D; d++) variance += (x[d] - mean) * (x[d] - mean);
    float scale = 1 / std::sqrt(variance / D + 1e-5f);
    for (int d = 0; d < D; d++) {
        x[d] = (x[d] - mean) * scale * norm.weight[d] + norm.bias[d];
        store(output + d, x[d]);
    }
}

// mixture.sample for one image; -1 where a parameter is not finite.
inline int draw(const float* parameters, const float* noise, float temperature) {
    const float *logits = parameters, *means = logits + MIXTURES, *scales = means + MIXTURES;
    float largest = *std::max_element(logits, logits + MIXTURES), total = 0, sums[MIXTURES];
    for (int k = 0; k < MIXTURES; k++)
        sums[k] = total += std::exp((logits[k] - largest) / temperature);
    int k = 0;
    while (k < MIXTURES - 1 && noise[0] >= sums[k] / total) k++;
    float scale = std::exp(std::max(scales[k], -7.f)) * temperature;
    if (!std::isfinite(total + means[k] + scale)) return -1;
    float x = means[k] + scale * (std::log(noise[1]) - std::log1p(-noise[1]));
    return int(std::rint(std::min(std::max((x + 1) * 127.5f, 0.f), 255.f)));
}

struct Job {
    const Model* model;
    const State* states;
    int64_t* images;     // (N, length)
    const float* noise;  // (N, length, 2)
    float* parameters;   // (N, 3 MIXTURES), those of the last byte drawn, or null
    int64_t length;
    int first, last;  // the positions to read; each draws the byte after it
    float temperature;
    std::atomic<int64_t> failed;  // the first byte that could not be drawn, or -1
};

// The whole of `job` for a team's rows, as its `member`.
void work(Job& job, Team& team, Buffers& b, int member) {
    const Model& model = *job.model;
    int64_t n = team.last - team.first;
    Share rows(n, member, team.size);
    auto panels = [&](int outputs) { return Share(padded(outputs) / PANEL, member, team.size); };

    for (int position = job.first; position < job.last; position++) {
        for (int64_t r = rows.first; r < rows.last; r++) {
            int64_t value = job.images[(team.first + r) * job.length + position];
            float* x = &b.x[r * D];
            memcpy(x, model.values + value * (D / 2), D / 2 * 4);
            memcpy(x + D / 2, model.positions + int64_t(position) * (D / 2), D / 2 * 4);
            for (int d = 0; d < D; d++) store(&b.input[r * D + d], x[d]);
        }
        team.wait();
        for (int l = 0; l < LAYERS; l++) {
            const Layer& layer = model.layers[l];
            multiply<D, 3 * D, false>(b.input.data(), D, layer.qkv, b.qkv.data(), QKV, n,
                                      panels(3 * D));
            team.wait();
            Share heads(n * HEADS, member, team.size);
            for (int64_t i = heads.first; i < heads.last; i++) {
                int64_t r = i / HEADS, h = i % HEADS, head = team.first * HEADS + i;
                attend(&b.qkv[r * QKV + h * SIZE], job.states[l].S + head * SIZE * SIZE,
                       job.states[l].Z + head * SIZE, &b.attended[r * D + h * SIZE]);
            }
            team.wait();
            multiply<D, D, false>(b.attended.data(), D, layer.out, b.y.data(), Y, n, panels(D));
            team.wait();
            for (int64_t r = rows.first; r < rows.last; r++)
                normalise(&b.x[r * D], &b.y[r * Y], layer.norm1, &b.input[r * D]);
            team.wait();
            multiply<D, 4 * D, true>(b.input.data(), D, layer.linear1, b.hidden.data(), F, n,
                                     panels(4 * D));
            team.wait();
            multiply<4 * D, D, false>(b.hidden.data(), F, layer.linear2, b.y.data(), Y, n,
                                      panels(D));
            team.wait();
            for (int64_t r = rows.first; r < rows.last; r++) {
                normalise(&b.x[r * D], &b.y[r * Y], layer.norm2, &b.input[r * D]);
                if (l == LAYERS - 1) normalise(&b.x[r * D], nullptr, model.norm, &b.input[r * D]);
            }
            team.wait();
        }
        multiply<D, 3 * MIXTURES, false>(b.input.data(), D, model.predictor, b.y.data(), Y, n,
                                         panels(3 * MIXTURES));
        team.wait();
        for (int64_t r = rows.first; r < rows.last; r++) {
            if (job.parameters && position + 1 == job.last)
                memcpy(job.parameters + (team.first + r) * 3 * MIXTURES, &b.y[r * Y],
                       3 * MIXTURES * 4);
            int64_t next = (team.first + r) * job.length + position + 1;
            int value = draw(&b.y[r * Y], job.noise + 2 * next, job.temperature);
            job.images[next] = std::max(value, 0);
            if (value < 0 && job.failed < 0) job.failed = position + 1;
        }
    }
}

extern "C" int panel() { return PANEL; }

// Reads bytes `first` to `last` - 1 of each image and draws the byte after each. Returns -1, or a
// byte whose distribution was not finite.
extern "C" int64_t sample(const Model* model, const State* states, int64_t* images,
                       const float* noise, float* parameters, int64_t n, int64_t length,
                       int64_t first, int64_t last, float temperature, int64_t threads) {
    Job job{model, states, images, noise, parameters, length, int(first), int(last), temperature,
            {-1}};
    int n_teams = std::max<int64_t>(1, std::min(threads, n / ROWS_PER_TEAM));
    std::vector<Team> teams(n_teams);
    std::vector<Buffers> buffers;
    std::vector<std::thread> workers;
    for (int t = 0; t < n_teams; t++) {
        Share rows(n, t, n_teams), members(threads, t, n_teams);
        teams[t].first = rows.first;
        teams[t].last = rows.last;
        teams[t].size = members.last - members.first;
        buffers.emplace_back(rows.last - rows.first);
    }
    for (int t = 0; t < n_teams; t++)
        for (int member = !t; member < teams[t].size; member++)
            workers.emplace_back(work, std::ref(job), std::ref(teams[t]), std::ref(buffers[t]),
                                 member);
    work(job, teams[0], buffers[0], 0);  // the calling thread is a worker too
    for (auto& worker : workers) worker.join();
    return job.failed;
}
