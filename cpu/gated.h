// Gated linear attention and the gated delta rule of layers/gated.py on CPUs: over a sequence, with
// the gradient, as in `gated_chunked`, and for one position, as in `gated_recurrent`. The names are
// those of layers/gated.py. Further compile-time constants, set by Python: DELTA (1: the delta rule), LENGTH_EPSILON, OUTPUT_SIZE,
// and KEPT_EVERY, the positions between two states that are kept for the gradient.

#pragma once

#include <memory>

#include "common.h"

namespace gated {

// Positions that go together: few, since the work on pairs of positions grows with them, but a whole
// vector of the widest.
constexpr int CHUNK = 16;
// Chunks between two states that are kept for the gradient.
constexpr int BLOCK = KEPT_EVERY / CHUNK;
// How many sums of a product are kept in registers.
constexpr int REGISTERS = LANES == 16 ? 16 : 8;

typedef float Row[SIZE];
typedef float Pairs[CHUNK];

// The largest power of two that divides n, at most `most`.
constexpr int divisor(int n, int most) { return std::min(n & -n, most); }

// Vectors of W numbers.
template <int W>
struct Vectors {
    typedef float Floats __attribute__((vector_size(4 * W), aligned(4), may_alias));
    typedef int32_t Integers __attribute__((vector_size(4 * W)));
};

// out (I, J) = kept * out + a b, where b is (K, J) and element (i, k) of a is
// a[i * row + k * column].
template <int I, int J, int K>
inline void multiply_add(float* __restrict out, const float* __restrict a, int row, int column,
                         const float* __restrict b, float kept = 1) {
    constexpr int W = divisor(J, LANES), V = divisor(J / W, 2), R = divisor(I, REGISTERS / V);
    typedef typename Vectors<W>::Floats Vector;
    for (int i = 0; i < I; i += R)
        for (int j = 0; j < J; j += V * W) {
            Vector sums[R][V];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int v = 0; v < V; v++)
                    sums[r][v] = kept * *(Vector*)(out + (i + r) * J + j + v * W);
            for (int k = 0; k < K; k++) {
                const Vector* line = (const Vector*)(b + k * J + j);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                    for (int v = 0; v < V; v++) sums[r][v] += a[(i + r) * row + k * column] * line[v];
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) *(Vector*)(out + (i + r) * J + j + v * W) = sums[r][v];
        }
}

// A block of W rows and columns, transposed by exchanging ever larger parts of pairs of rows.
template <int W>
inline void transpose_block(const float* from, int from_stride, float* to, int to_stride) {
#ifdef __clang__  // which has no shuffle by a vector
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) to[j * to_stride + i] = from[i * from_stride + j];
#else
    typedef typename Vectors<W>::Floats Vector;
    Vector rows[W];
    for (int i = 0; i < W; i++) rows[i] = *(const Vector*)(from + i * from_stride);
#pragma GCC unroll 4
    for (int size = 1; size < W; size *= 2) {
        typename Vectors<W>::Integers first, second;
        for (int j = 0; j < W; j++) {
            first[j] = j & size ? W + j - size : j;
            second[j] = j & size ? W + j : j + size;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            if (i & size) continue;
            Vector upper = rows[i], lower = rows[i + size];
            rows[i] = __builtin_shuffle(upper, lower, first);
            rows[i + size] = __builtin_shuffle(upper, lower, second);
        }
    }
    for (int i = 0; i < W; i++) *(Vector*)(to + i * to_stride) = rows[i];
#endif
}

// to (J, I) = from (I, J) transposed.
template <int I, int J>
inline void transpose(const float* from, float* to) {
    constexpr int W = std::min(divisor(I, LANES), divisor(J, LANES));
    for (int i = 0; i < I; i += W)
        for (int j = 0; j < J; j += W) transpose_block<W>(from + i * J + j, J, to + j * I + i, I);
}

// to = factors[t] * from for rows t; `to` may be `from`.
inline void scale_rows(Row* to, const float* factors, const Row* from) {
    for (int t = 0; t < CHUNK; t++) {
        float factor = factors[t];
#pragma omp simd
        for (int e = 0; e < SIZE; e++) to[t][e] = factor * from[t][e];
    }
}

inline void subtract(float* __restrict row, float factor, const float* __restrict other) {
    for (int m = 0; m < SIZE; m++) row[m] -= factor * other[m];
}

inline float sigmoid(float x) {
    float e = exponential(x > 0 ? -x : x);
    return (x > 0 ? 1 : e) / (1 + e);
}

// log(a) = -softplus(decay). With e = exp(-|decay|), log(1 + e) is 2 artanh(e / (2 + e)), whose
// series ends here where its terms are below the precision of a float.
inline float log_decay(float decay) {
    float e = exponential(decay > 0 ? -decay : decay), z = e / (2 + e), y = z * z, sum = 1.f / 15;
    sum = sum * y + 1.f / 13;
    sum = sum * y + 1.f / 11;
    sum = sum * y + 1.f / 9;
    sum = sum * y + 1.f / 7;
    sum = sum * y + 1.f / 5;
    sum = sum * y + 1.f / 3;
    sum = sum * y + 1;
    return -(decay > 0 ? decay : 0) - 2 * z * sum;
}

inline float length(const float* row) { return std::sqrt(dot(row, row) + float(LENGTH_EPSILON)); }

// What a head's output is multiplied by.
inline float output_scale(const float* row) {
    return float(OUTPUT_SIZE) / std::sqrt(dot(row, row) / SIZE + float(LENGTH_EPSILON));
}

// One position and head; S (E, M) is updated in place.
template <class Output>
inline void step(const float* q, const float* k, const float* v, float decay, float beta, float* S,
                 Output* out) {
    float key[SIZE], row[SIZE], a = std::exp(log_decay(decay));
    float inverse = 1 / length(k);
    for (int e = 0; e < SIZE; e++) key[e] = inverse * k[e];
    RowVector sums[COUNT] = {};
    for (int e = 0; DELTA && e < SIZE; e++)
        for (int i = 0; i < COUNT; i++) sums[i] += key[e] * ((RowVector*)(S + e * SIZE))[i];
    memcpy(row, sums, sizeof row);
    beta = sigmoid(beta);
    for (int m = 0; m < SIZE; m++) row[m] = beta * (v[m] - a * row[m]);
    RowVector added[COUNT];
    memcpy(added, row, sizeof row);
    memset(sums, 0, sizeof sums);
    for (int e = 0; e < SIZE; e++) {
        RowVector* line = (RowVector*)(S + e * SIZE);
        for (int i = 0; i < COUNT; i++) {
            line[i] = a * line[i] + key[e] * added[i];
            sums[i] += q[e] * line[i];
        }
    }
    memcpy(row, sums, sizeof row);
    float scale = output_scale(row);
    for (int m = 0; m < SIZE; m++) store(out + m, scale * row[m]);
}

// `projected` (N, L, 3HE + 2H): queries, keys and values of all heads, their decays, their betas.
struct Shape {
    int64_t images, length, heads;

    int64_t width() const { return heads * SIZE; }  // of a position's output
    int64_t stride() const { return 3 * width() + 2 * heads; }
    int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
    int64_t blocks() const { return (chunks() + BLOCK - 1) / BLOCK; }
};

// Where one head of one image is in `projected`, in the outputs and in the scales (N, L, H).
struct Head {
    int64_t queries, decays, outputs, scales;
    Shape shape;

    Head(int64_t task, Shape shape) : shape(shape) {
        int64_t image = task / shape.heads, head = task % shape.heads, first = image * shape.length;
        queries = first * shape.stride() + head * SIZE;
        decays = first * shape.stride() + 3 * shape.width() + head;
        outputs = first * shape.width() + head * SIZE;
        scales = first * shape.heads + head;
    }
};

// Asks for the rows of a head's queries, keys and values at a position before they are needed.
template <class T>
inline void prefetch(const T* query, int64_t width) {
    for (int part = 0; part < 3; part++, query += width) {
        for (size_t e = 0; e < SIZE; e += 64 / sizeof(T)) __builtin_prefetch(query + e);
        __builtin_prefetch(query + SIZE - 1);
    }
}

// What the equations need of the positions of a chunk, and their products. Positions after the last
// one of the sequence are zero and change nothing.
struct Chunk {
    int64_t first;
    int count;
    alignas(64) Row q[CHUNK], k[CHUNK], v[CHUNK];
    float inverse_lengths[CHUNK], beta[CHUNK], a[CHUNK];
    float since_start[CHUNK], until_end[CHUNK], kept;  // products of decays
    // Of positions t and s <= t: the decay between them, the matrix of the equations for u (s < t),
    // and the weight of u_s in the output of t.
    Pairs decay[CHUNK], system[CHUNK], weights[CHUNK];
    // The rows that are added to the state, also times the decay until the chunk's end, and the
    // state before.
    Row u[CHUNK], scaled_u[CHUNK], S[SIZE];

    template <class T>
    void load_positions(const T* projected, Head head, int64_t index) {
        Shape shape = head.shape;
        first = index * CHUNK;
        count = std::min<int64_t>(CHUNK, shape.length - first);
        float decays[CHUNK] = {}, logs[CHUNK], sums[CHUNK], sum = 0;
        memset(beta, 0, sizeof beta);
        for (int t = 0; t < count; t++) {
            int64_t at = (first + t) * shape.stride();
            load_position(projected + head.queries + at, shape.width(), t);
            if (first + CHUNK + t < shape.length)
                prefetch(projected + head.queries + at + CHUNK * shape.stride(), shape.width());
            decays[t] = load(projected[head.decays + at]);
            beta[t] = load(projected[head.decays + at + shape.heads]);
        }
        for (int t = count; t < CHUNK; t++) clear_position(t);
        for (int t = 0; t < CHUNK; t++) {
            beta[t] = sigmoid(beta[t]);
            a[t] = sigmoid(-decays[t]);
            logs[t] = log_decay(decays[t]);
        }
        for (int t = 0; t < CHUNK; t++) sums[t] = sum += t < count ? logs[t] : 0;
        for (int t = 0; t < CHUNK; t++) since_start[t] = exponential(sums[t]);
        for (int t = 0; t < CHUNK; t++) until_end[t] = exponential(sum - sums[t]);
        for (int t = 0; t < CHUNK; t++) {
            for (int s = 0; s < CHUNK; s++) {
                float difference = sums[t] - sums[s];
                decay[t][s] = exponential(difference > 0 ? 0 : difference);
            }
            std::fill(decay[t] + t + 1, decay[t] + CHUNK, 0.f);
        }
        kept = since_start[CHUNK - 1];
        multiply_pairs();
    }

    template <class T>
    void load_position(const T* query, int64_t width, int t) {
        load_row(query, q[t]);
        load_row(query + width, k[t]);
        load_row(query + 2 * width, v[t]);
        inverse_lengths[t] = 1 / length(k[t]);
        for (int e = 0; e < SIZE; e++) k[t][e] *= inverse_lengths[t];
    }

    // A key of zeros changes no state.
    void clear_position(int t) {
        for (Row* rows : {q, k, v}) std::fill_n(rows[t], SIZE, 0.f);
    }

    void multiply_pairs() {
        alignas(64) float transposed[SIZE][CHUNK];
        transpose<CHUNK, SIZE>(k[0], transposed[0]);
        memset(weights, 0, sizeof weights);
        multiply_add<CHUNK, CHUNK, SIZE>(weights[0], q[0], SIZE, 1, transposed[0]);
        scale_pairs(weights, nullptr);
        if (!DELTA) return;
        memset(system, 0, sizeof system);
        multiply_add<CHUNK, CHUNK, SIZE>(system[0], k[0], SIZE, 1, transposed[0]);
        scale_pairs(system, beta);
    }

    // Multiplies those of t and s <= t by the decay between them; the others become 0. With factors
    // of t, which belong to the equations for u, those of t and t become 0 too.
    void scale_pairs(Pairs* __restrict pairs, const float* factors) const {
        for (int t = 0; t < CHUNK; t++) {
            float factor = factors ? factors[t] : 1;
            for (int s = 0; s < CHUNK; s++) pairs[t][s] *= factor * decay[t][s];
            if (factors) pairs[t][t] = 0;
        }
    }

    // The rows u that are added to the state S (E, M), which then is that of the chunk's end.
    void update(Row* S) {
        alignas(64) Row read[CHUNK] = {};
        if (DELTA) multiply_add<CHUNK, SIZE, SIZE>(read[0], k[0], SIZE, 1, S[0]);
        for (int t = 0; t < CHUNK; t++)
            for (int m = 0; m < SIZE; m++)
                u[t][m] = beta[t] * (v[t][m] - since_start[t] * read[t][m]);
        for (int s = 0; DELTA && s < CHUNK; s++)
            for (int t = s + 1; t < CHUNK; t++) subtract(u[t], system[t][s], u[s]);
        scale_rows(scaled_u, until_end, u);
        multiply_add<SIZE, SIZE, CHUNK>(S[0], k[0], 1, SIZE, scaled_u[0], kept);
    }
};

// The outputs of one head; the state S (E, M) becomes that after the last position. Where they are
// not null, `scales` gets the factors of the outputs, and `states` (blocks, E, M) the
// state before each block.
template <class T>
void forward_head(const T* projected, T* out, float* scales, float* states, Row* S, Head head) {
    auto chunk = std::make_unique<Chunk>();
    Shape shape = head.shape;
    for (int64_t i = 0; i < shape.chunks(); i++) {
        if (states && i % BLOCK == 0)
            memcpy(states + i / BLOCK * SIZE * SIZE, S, sizeof(Row[SIZE]));
        chunk->load_positions(projected, head, i);
        alignas(64) Row sums[CHUNK] = {};
        multiply_add<CHUNK, SIZE, SIZE>(sums[0], chunk->q[0], SIZE, 1, S[0]);
        scale_rows(sums, chunk->since_start, sums);
        chunk->update(S);
        multiply_add<CHUNK, SIZE, CHUNK>(sums[0], chunk->weights[0], CHUNK, 1, chunk->u[0]);
        for (int t = 0; t < chunk->count; t++) {
            int64_t position = chunk->first + t;
            float scale = output_scale(sums[t]);
            if (scales) scales[head.scales + position * shape.heads] = scale;
            T* target = out + head.outputs + position * shape.width();
            for (int m = 0; m < SIZE; m++) store(target + m, scale * sums[t][m]);
        }
    }
}

// The gradient of one head, from the last block to the first: forward through the chunks of a block
// from the state before it, which was kept, and then back through them.
template <class T>
struct Backward {
    const T *projected, *out, *g;
    const float *scales, *states;
    T* gradients;
    Head head;
    Chunk chunks[BLOCK];
    alignas(64) Row S[SIZE];       // the state after a chunk
    alignas(64) Row G[SIZE] = {};  // the gradient of the state after a chunk
    alignas(64) Row g_out[CHUNK], g_u[CHUNK];
    // The gradients of q, of k where it is read, and of k where it is written to the state.
    Row g_q[CHUNK], g_read[CHUNK], g_written[CHUNK];
    Row transposed_S[SIZE], transposed_G[SIZE];
    float minus_beta[CHUNK], transposed_u[SIZE][CHUNK];

    void run() {
        int64_t n = head.shape.chunks();
        for (int64_t block = (n - 1) / BLOCK; block >= 0; block--) {
            int64_t first = block * BLOCK, count = std::min<int64_t>(BLOCK, n - first);
            memcpy(S, states + block * SIZE * SIZE, sizeof S);
            for (int64_t i = 0; i < count; i++) {
                chunks[i].load_positions(projected, head, first + i);
                memcpy(chunks[i].S, S, sizeof S);
                chunks[i].update(S);
            }
            for (int64_t i = count - 1; i >= 0; i--) {
                back(chunks[i]);
                memcpy(S, chunks[i].S, sizeof S);
            }
        }
    }

    void back(const Chunk& chunk) {
        load_gradients(chunk);
        transpose<SIZE, SIZE>(chunk.S[0], transposed_S[0]);
        transpose<SIZE, SIZE>(G[0], transposed_G[0]);
        transpose<CHUNK, SIZE>(chunk.u[0], transposed_u[0]);
        float at_end = 0;  // the gradient of the logarithm of the decay until the chunk's end
        for (int e = 0; e < SIZE; e++) at_end += dot(G[e], S[e]);
        for (int t = 0; t < CHUNK; t++) minus_beta[t] = -chunk.beta[t];
        solve(chunk);
        gradients_of_pairs(chunk);
        gradients_of_state(chunk);
        write_gradients(chunk, at_end);
    }

    // The gradients of the outputs before they were normalised.
    void load_gradients(const Chunk& chunk) {
        Shape shape = head.shape;
        memset(g_out, 0, sizeof g_out);
        for (int t = 0; t < chunk.count; t++) {
            int64_t position = chunk.first + t, at = head.outputs + position * shape.width();
            float scale = scales[head.scales + position * shape.heads], output[SIZE], row[SIZE];
            load_row(out + at, output);
            load_row(g + at, row);
            float mean = dot(output, row) / (SIZE * float(OUTPUT_SIZE) * float(OUTPUT_SIZE));
            for (int m = 0; m < SIZE; m++) g_out[t][m] = scale * (row[m] - mean * output[m]);
        }
    }

    // The gradients of u, and from them, through the equations for u, those of their right sides.
    void solve(const Chunk& chunk) {
        memset(g_u, 0, sizeof g_u);
        multiply_add<CHUNK, SIZE, SIZE>(g_u[0], chunk.k[0], SIZE, 1, G[0]);
        scale_rows(g_u, chunk.until_end, g_u);
        multiply_add<CHUNK, SIZE, CHUNK>(g_u[0], chunk.weights[0], 1, CHUNK, g_out[0]);
        for (int t = CHUNK - 1; DELTA && t > 0; t--)
            for (int s = 0; s < t; s++) subtract(g_u[s], chunk.system[t][s], g_u[t]);
    }

    // What q and k get from the products of pairs.
    void gradients_of_pairs(const Chunk& chunk) {
        alignas(64) Pairs weights[CHUNK] = {}, system[CHUNK] = {};
        memset(g_q, 0, sizeof g_q);
        memset(g_read, 0, sizeof g_read);
        memset(g_written, 0, sizeof g_written);
        multiply_add<CHUNK, CHUNK, SIZE>(weights[0], g_out[0], SIZE, 1, transposed_u[0]);
        chunk.scale_pairs(weights, nullptr);
        multiply_add<CHUNK, SIZE, CHUNK>(g_q[0], weights[0], CHUNK, 1, chunk.k[0]);
        multiply_add<CHUNK, SIZE, CHUNK>(g_written[0], weights[0], 1, CHUNK, chunk.q[0]);
        if (!DELTA) return;
        multiply_add<CHUNK, CHUNK, SIZE>(system[0], g_u[0], SIZE, 1, transposed_u[0]);
        chunk.scale_pairs(system, minus_beta);
        multiply_add<CHUNK, SIZE, CHUNK>(g_read[0], system[0], CHUNK, 1, chunk.k[0]);
        multiply_add<CHUNK, SIZE, CHUNK>(g_written[0], system[0], 1, CHUNK, chunk.k[0]);
    }

    // What q and k get from the state before the chunk and from that after it; G becomes the
    // gradient of the one before.
    void gradients_of_state(const Chunk& chunk) {
        alignas(64) Row from_out[CHUNK], from_read[CHUNK];  // the gradients of S^T q and S^T k
        scale_rows(from_out, chunk.since_start, g_out);
        multiply_add<CHUNK, SIZE, SIZE>(g_q[0], from_out[0], SIZE, 1, transposed_S[0]);
        multiply_add<CHUNK, SIZE, SIZE>(g_written[0], chunk.scaled_u[0], SIZE, 1, transposed_G[0]);
        multiply_add<SIZE, SIZE, CHUNK>(G[0], chunk.q[0], 1, SIZE, from_out[0], chunk.kept);
        if (!DELTA) return;
        scale_rows(from_read, minus_beta, g_u);
        scale_rows(from_read, chunk.since_start, from_read);
        multiply_add<CHUNK, SIZE, SIZE>(g_read[0], from_read[0], SIZE, 1, transposed_S[0]);
        multiply_add<SIZE, SIZE, CHUNK>(G[0], chunk.k[0], 1, SIZE, from_read[0]);
    }

    // A decay between s and t multiplies q_t or the read k_t, and divides the written k_s: the
    // gradient of its logarithm is the sum of q g_q + k g_read - k g_written from t on.
    void write_gradients(const Chunk& chunk, float sum) {
        for (int t = chunk.count - 1; t >= 0; t--) {
            float read = dot(chunk.k[t], g_read[t]), written = dot(chunk.k[t], g_written[t]);
            sum += dot(chunk.q[t], g_q[t]) + read - written;
            write_position(chunk, t, read + written);
            int64_t at = (chunk.first + t) * head.shape.stride();
            T* gates = gradients + head.decays + at;
            store(gates, sum * (chunk.a[t] - 1));
            store(gates + head.shape.heads, dot(chunk.u[t], g_u[t]) * (1 - chunk.beta[t]));
        }
    }

    // The gradients of a position's query, key and value; `along` is the product of k and its
    // gradient, the part of it that the key's unit length removes.
    void write_position(const Chunk& chunk, int t, float along) {
        int64_t width = head.shape.width();
        T* query = gradients + head.queries + (chunk.first + t) * head.shape.stride();
        float inverse = chunk.inverse_lengths[t], beta = chunk.beta[t];
        for (int e = 0; e < SIZE; e++) store(query + e, g_q[t][e]);
        for (int e = 0; e < SIZE; e++) {
            float gradient = g_read[t][e] + g_written[t][e] - along * chunk.k[t][e];
            store(query + width + e, inverse * gradient);
        }
        for (int m = 0; m < SIZE; m++) store(query + 2 * width + m, beta * g_u[t][m]);
    }
};

// Updates S (N, H, E, M); if it is null, the state starts at zero. `scales` (N, L, H) and `states`
// (N, H, blocks, E, M) are for the gradient, or null.
template <class T>
void forward(const T* projected, T* out, float* scales, float* states, float* S,
                   int64_t images, int64_t length, int64_t heads, int64_t threads) {
    Shape shape{images, length, heads};
    run_tasks(images * heads, threads, [&](int64_t task) {
        std::vector<float> state(SIZE * SIZE);
        float* own = S ? S + task * SIZE * SIZE : state.data();
        float* kept = states ? states + task * shape.blocks() * SIZE * SIZE : nullptr;
        forward_head(projected, out, scales, kept, (Row*)own, Head(task, shape));
    });
}

template <class T>
void backward(const T* projected, const T* out, const float* scales, const float* states,
                    const T* g, T* gradients, int64_t images, int64_t length, int64_t heads,
                    int64_t threads) {
    Shape shape{images, length, heads};
    run_tasks(images * heads, threads, [&](int64_t task) {
        const float* kept = states + task * shape.blocks() * SIZE * SIZE;
        Head head(task, shape);
        auto pass = std::unique_ptr<Backward<T>>(
            new Backward<T>{projected, out, g, scales, kept, gradients, head});
        pass->run();
    });
}

}  // namespace gated
