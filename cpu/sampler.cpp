// The recurrent sampler on CPUs, with causal linear or gated linear attention, as one loop over the
// bytes: what ImageTransformer.step and sample of layers/mixture.py compute, without returning to
// Python after each byte.
//
// Compile-time constants, in addition to those of the headers: GATED (1: gated linear attention),
// LAYERS, HEADS, MIXTURES, MIN_LOG_SCALE, NEIGHBOURS (0: the model has none) and CHANNELS of
// layers/neighbours.py, and OFFSETS of layers/convolution.py in rising order (0: the model has none).
// With BF16 the operands of the matrix products and the last inputs of the layers are bfloat16;
// everything else, including the sums of the products, is float32. Loops over constant sizes are left
// to the compiler's vectoriser; only the products (product.h) and `update` of common.h lay out their
// registers explicitly.

#include <deque>
#include <iterator>
#include <limits>

#include "common.h"
#include "gated.h"
#include "product.h"

// Given bytes are read several positions at a time, so that the weights are read for this many rows.
constexpr int64_t ROWS_AT_ONCE = 64;
constexpr int D = HEADS * SIZE;
// What attention reads of a position: queries, keys and values, and if GATED the heads' decays and
// betas and the gates of the outputs.
constexpr int PROJECTED = GATED ? 4 * D + 2 * HEADS : 3 * D;
constexpr int offsets[] = {OFFSETS};
constexpr int TAPS = std::size(offsets), RECENT = offsets[TAPS - 1] + 1;

// With fewer images per thread, a team of threads shares its rows, and each reads a part of the
// weights. It pays sooner for weights that no cache holds, since all threads share the memory.
constexpr int IMAGES_PER_THREAD = WEIGHT_BYTES > 16 << 20 ? 8 : LARGE ? 4 : 1;
// Members of a team wait for each other five times a layer, for up to ten microseconds in all, in
// which one thread reads half a MB of weights.
constexpr bool TEAMS = WEIGHT_BYTES / LAYERS > 512 << 10;
// A thread draws its images in groups if the weights stay in its caches, so that the states of a group
// do, too: S of all layers is at most half as large as the weights in float32.
constexpr int64_t IMAGES_PER_GROUP = LARGE ? std::numeric_limits<int64_t>::max() : ROWS * HEADS;

// The following structs are laid out as Python fills them in: pointers, nothing else.

struct Norm {
    const float *weight, *bias;  // (D)
};

struct Layer {
    Linear<D, PROJECTED> projections;
    Linear<D, D> out;
    Norm norm1;
    Linear<D, 4 * D> linear1;
    Linear<4 * D, D> linear2;
    Norm norm2;
#if NEIGHBOURS
    const float* convolution;  // (TAPS, D)
#endif
};

struct Model {
    Layer layers[LAYERS];
    Norm norm;
    Linear<D, 3 * MIXTURES> predictor;
    const float *values, *positions;  // embeddings: (256, D / 2), (length - 1, D / 2)
    const int* table;                 // (length - 1, NEIGHBOURS); from here on if NEIGHBOURS > 0
    const float *projection, *prediction;  // (CHANNELS, NEIGHBOURS, D or 3 * MIXTURES)
};

struct State {
    float* S;  // (N, HEADS, SIZE, SIZE), contiguous
#if !GATED
    float* Z;  // (N, HEADS, SIZE)
#endif
#if NEIGHBOURS
    Stored* inputs;  // (RECENT, N, D): the layer's inputs at position p in row p mod RECENT
#endif
};

struct Job {
    const Model* model;
    const State* states;  // of each layer
    int64_t* images;      // (N, length)
    const float* noise;   // (N, length, 2), or null to read bytes and draw none
    float* parameters;    // (N, 3 * MIXTURES), those of the last byte drawn, or null
    int64_t n, length;    // images, and bytes of each
    int64_t first, last;  // the positions to read; the byte after each is drawn
    float temperature;
    std::atomic<int64_t> failed;  // the first byte that could not be drawn, or `length`
};

// Lets all of `size` threads through when the last of them has arrived. In a cache line of its own.
struct alignas(64) Barrier {
    const int size;
    std::atomic<int> waiting{0}, round{0};

    explicit Barrier(int size) : size(size) {}

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

// One row for each image of a team, and for each position that is read at a time.
template <class T, int ROW>
struct Rows {
    Buffer<T> numbers;
    explicit Rows(int64_t n) : numbers(n * ROW) {}
    T* operator[](int64_t r) { return numbers.data() + r * ROW; }
};

// Threads that work on the same n images, from `first` on, and wait for each other where one reads
// what another has written. Outputs of a product are padded to whole vectors.
struct Team {
    int64_t first, n, positions;  // how many positions are read at a time
    Barrier barrier;
    Rows<Operand, D> attended;
    Rows<float, padded(PROJECTED)> projected;
    Rows<Operand, padded(4 * D)> hidden;
    Rows<float, padded(D)> y;  // outputs of attention or of the feed-forward network
    Rows<float, padded(3 * MIXTURES)> parameters;
#if NEIGHBOURS
    Rows<float, D> convolved;  // of several positions
#endif

    Team(int64_t first, int64_t n, int64_t positions, int size)
        : first(first), n(n), positions(positions), barrier(size), attended(n * positions),
          projected(n * positions), hidden(n * positions), y(n * positions), parameters(n)
#if NEIGHBOURS
          , convolved(positions > 1 ? n * positions : 0)
#endif
    {}
};

// sample of layers/mixture.py for one image; -1 if a parameter is not finite.
inline int draw(const float* parameters, const float* noise, float temperature) {
    for (int i = 0; i < 3 * MIXTURES; i++)
        if (!std::isfinite(parameters[i])) return -1;
    const float *logits = parameters, *means = logits + MIXTURES, *log_scales = means + MIXTURES;
    float largest = *std::max_element(logits, logits + MIXTURES), total = 0, sums[MIXTURES];
    for (int k = 0; k < MIXTURES; k++)
        sums[k] = total += std::exp((logits[k] - largest) / temperature);
    int k = 0;
    while (k < MIXTURES - 1 && noise[0] >= sums[k] / total) k++;
    float scale = std::exp(std::max(log_scales[k], float(MIN_LOG_SCALE))) * temperature;
    scale = std::min(scale, std::numeric_limits<float>::max());  // infinity times 0 is nan
    float x = means[k] + scale * (std::log(noise[1]) - std::log1p(-noise[1]));
    return int(std::rint(std::min(std::max(0.f, (x + 1) * 127.5f), 255.f)));
}

// One thread of a team. Of the products and of attention each member does a share. What takes less
// time than waiting for another thread (embeddings, norms, convolutions of one position), each
// member computes for all rows.
struct Member {
    Job& job;
    Team& team;
    const int number;
    // What is being read: row p * team.n + i is that of image i at `position` + p.
    int64_t position = 0, positions = 0;
    Rows<float, D> x;
    Rows<Operand, D> input;  // x as the operand of a product

    Member(Job& job, Team& team, int number)
        : job(job), team(team), number(number), x(team.n * team.positions),
          input(team.n * team.positions) {}

    int64_t rows() const { return positions * team.n; }

    // Calls run(task) for this member's share of the tasks.
    template <class Run>
    void each(int64_t tasks, const Run& run) {
        int64_t size = team.barrier.size, last = tasks * (number + 1) / size;
        for (int64_t task = tasks * number / size; task < last; task++) run(task);
    }

    // The same, then waits until the team has done all tasks.
    template <class Run>
    void share(int64_t tasks, const Run& run) {
        each(tasks, run);
        team.barrier.wait();
    }

    template <bool RELU = false, int INPUTS, int OUTPUTS, int STRIDE, class Output, int OUT_STRIDE>
    void multiply(Rows<Operand, STRIDE>& inputs, const Linear<INPUTS, OUTPUTS>& linear,
                  Rows<Output, OUT_STRIDE>& outputs) {
        share(linear.PANELS, [&](int64_t p) {
            linear.template multiply<RELU, STRIDE, OUT_STRIDE>(p, inputs[0], rows(), outputs[0]);
        });
    }

    // The embeddings of the byte and of its position, side by side.
    void embed() {
        for (int64_t r = 0; r < rows(); r++) {
            int64_t i = r % team.n, place = position + r / team.n;
            int64_t value = job.images[(team.first + i) * job.length + place];
            std::copy_n(job.model->values + value * (D / 2), D / 2, x[r]);
            std::copy_n(job.model->positions + place * (D / 2), D / 2, x[r] + D / 2);
            add_neighbours<D>(i, place, job.model->projection, x[r]);
            write_input(r);
        }
    }

    void write_input(int64_t r) { store(input[r], x[r], D); }

    // Adds the linear map of the known bytes around the byte after `place` of image i to a row.
    template <int WIDTH>
    void add_neighbours(int64_t i, int64_t place, const float* weights, float* row) {
        const int64_t* image = job.images + (team.first + i) * job.length;
        weights += (place + 1) % CHANNELS * NEIGHBOURS * WIDTH;
        for (int k = 0; k < NEIGHBOURS; k++, weights += WIDTH) {
            int neighbour = job.model->table[place * NEIGHBOURS + k];
            if (neighbour < 0) continue;
            float value = (image[neighbour] - 128) / 128.f;
            for (int d = 0; d < WIDTH; d++) row[d] += value * weights[d];
        }
    }

#if NEIGHBOURS
    // The short convolution of a layer's inputs. It reads only those of earlier positions from the
    // state, so members need not wait for each other at one position, but do at several.
    void convolve(const Layer& layer, const State& state) {
        if (positions > 1) return convolve_positions(layer, state);
        each(team.n, [&](int64_t i) { remember(state, position, i); });
        for (int64_t i = 0; i < team.n; i++) {
            convolve_row(layer, state, position, i, x[i]);
            write_input(i);
        }
    }

    void convolve_positions(const Layer& layer, const State& state) {
        share(team.n, [&](int64_t i) {
            for (int64_t p = 0; p < positions; p++) {
                int64_t r = p * team.n + i;
                remember(state, position + p, r);
                convolve_row(layer, state, position + p, r, team.convolved[r]);
            }
        });
        for (int64_t r = 0; r < rows(); r++) {
            std::copy_n(team.convolved[r], D, x[r]);
            write_input(r);
        }
    }

    // The inputs of row r's image at `place`.
    Stored* remembered(const State& state, int64_t place, int64_t r) const {
        return state.inputs + (place % RECENT * job.n + team.first + r % team.n) * D;
    }

    void remember(const State& state, int64_t place, int64_t r) {
        store(remembered(state, place, r), x[r], D);
    }

    void convolve_row(const Layer& layer, const State& state, int64_t place, int64_t r,
                      float* target) {
        const Stored* earlier[TAPS];
        for (int k = 0; k < TAPS; k++)
            earlier[k] = remembered(state, place + RECENT - offsets[k], r);
        const float* row = x[r];
        float sums[D];
        for (int d = 0; d < D; d++) {
            sums[d] = row[d];
#pragma GCC unroll 16
            for (int k = 0; k < TAPS; k++)
                sums[d] += layer.convolution[k * D + d] * load(earlier[k][d]);
        }
        std::copy_n(sums, D, target);
    }
#else
    void convolve(const Layer&, const State&) {}
#endif

    // Writes the norm of the row read(0), ..., read(D - 1) to row r of x and of the next inputs.
    template <class Read>
    void write_norm(int64_t r, const Norm& norm, Read read) {
        float row[D], *target = x[r];
        auto write = [=](int d, float value) { target[d] = value; };
        normalise(read, row, norm.weight, norm.bias, D, write);
        write_input(r);
    }

    void add_and_normalise(const Norm& norm) {
        for (int64_t r = 0; r < rows(); r++) {
            const float *residual = x[r], *y = team.y[r];
            write_norm(r, norm, [=](int d) { return residual[d] + y[d]; });
        }
    }

    // One head of row r; `at` is the number of its state. Not inlined, so that its vectors stay in
    // registers.
    [[gnu::noinline]] void attend_head(const State& state, int64_t at, int64_t head, int64_t r) {
        const float* q = team.projected[r] + head * SIZE;
        float* S = state.S + at * SIZE * SIZE;
        Operand* target = team.attended[r] + head * SIZE;
#if GATED
        gated::Positions<1> position;
        float sums[1][SIZE], gates[1][SIZE];
        position.load(q, team.projected[r] + 4 * D + head, 0, D, HEADS);
        gated::load_gates<1>(q + 2 * D, 0, gates);
        gated::attend(position, S, sums);
        float scale = gated::output_scale(sums[0]);
        for (int m = 0; m < SIZE; m++) sums[0][m] *= gates[0][m] * scale;
        store(target, sums[0], SIZE);
#else
        attend<1>(q, q + D, q + 2 * D, 0, S, state.Z + at * SIZE, target, 0);
#endif
    }

    void attention_block(const Layer& layer, const State& state) {
        multiply(input, layer.projections, team.projected);
        share(team.n * HEADS, [&](int64_t task) {
            for (int64_t r = task / HEADS; r < rows(); r += team.n)
                attend_head(state, team.first * HEADS + task, task % HEADS, r);
        });
        multiply(team.attended, layer.out, team.y);
        add_and_normalise(layer.norm1);
    }

    void feed_forward_block(const Layer& layer) {
        multiply<true>(input, layer.linear1, team.hidden);
        multiply(team.hidden, layer.linear2, team.y);
        add_and_normalise(layer.norm2);
    }

    void predict() {
        for (int64_t r = 0; r < team.n; r++) {
            const float* row = x[r];
            write_norm(r, job.model->norm, [=](int d) { return row[d]; });
        }
        multiply(input, job.model->predictor, team.parameters);
    }

    void draw_bytes(int64_t byte) {
        share(team.n, [&](int64_t r) {
            int64_t image = team.first + r, at = image * job.length + byte;
            float* parameters = team.parameters[r];
            add_neighbours<3 * MIXTURES>(r, byte - 1, job.model->prediction, parameters);
            if (job.parameters && byte == job.last)
                std::copy_n(parameters, 3 * MIXTURES, job.parameters + image * 3 * MIXTURES);
            int value = draw(parameters, job.noise + 2 * at, job.temperature);
            if (value < 0) fail(byte);
            job.images[at] = std::max(value, 0);
        });
    }

    // Keeps the earliest byte: another team may have failed at a later one.
    void fail(int64_t byte) {
        int64_t failed = job.failed;
        while (byte < failed && !job.failed.compare_exchange_weak(failed, byte)) continue;
    }

    void run() {
        for (position = job.first; position < job.last; position += positions) {
            positions = std::min(team.positions, job.last - position);
            embed();
            for (int l = 0; l < LAYERS; l++) {
                convolve(job.model->layers[l], job.states[l]);
                attention_block(job.model->layers[l], job.states[l]);
                feed_forward_block(job.model->layers[l]);
            }
            if (!job.noise) continue;
            predict();
            draw_bytes(position + 1);
        }
    }
};

// The outputs of a panel, and what the number of those of the last one is a multiple of.
void panel_sizes(int64_t* sizes) {
    sizes[0] = PANEL;
    sizes[1] = LANES;
}

// What each thread does, one after the other: its part in the teams of the job, which are added to
// `teams`.
std::vector<std::vector<Member>> make_members(Job& job, std::deque<Team>& teams, int64_t threads) {
    std::vector<std::vector<Member>> members(threads);
    int64_t parts = std::clamp<int64_t>(job.n / IMAGES_PER_THREAD, 1, threads);
    for (int64_t p = 0; p < parts; p++) {
        int64_t first = threads * p / parts, size = TEAMS ? threads * (p + 1) / parts - first : 1;
        int64_t image = job.n * p / parts, end = job.n * (p + 1) / parts;
        for (; image < end; image += teams.back().n) {
            int64_t n = std::min(IMAGES_PER_GROUP, end - image);
            int64_t positions = job.noise ? 1 : std::max<int64_t>(1, ROWS_AT_ONCE / n);
            teams.emplace_back(image, n, positions, size);
            for (int number = 0; number < size; number++)
                members[first + number].emplace_back(job, teams.back(), number);
        }
    }
    return members;
}

// Reads bytes `first` to `last` - 1 of each image and, with noise, draws the byte after each.
// `failed` becomes -1, or the first byte that had a distribution with a parameter that is not
// finite. Whatever the number of images and threads, the sums of an image are taken in one order.
void sample(const Model* model, const State* states, int64_t* images, const float* noise,
            float* parameters, int64_t n, int64_t length, int64_t first, int64_t last,
            float temperature, int64_t threads, int64_t* failed) {
    Job job{model, states, images, noise, parameters, n, length, first, last, temperature, {length}};
    std::deque<Team> teams;  // a Team cannot be moved
    auto members = make_members(job, teams, threads);
    run_threads(threads, [&](int i) {
        for (Member& member : members[i]) member.run();
    });
    *failed = job.failed == length ? -1 : job.failed.load();
}

extern "C" const Export* exports() {
    static const Export table[] = {
        exported<panel_sizes>("panel_sizes"),
        exported<sample>("sample"),
        {},
    };
    return table;
}
