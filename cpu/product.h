// The sampler's matrix products: of few rows with weights that are read again for every byte.
//
// Further compile-time constants: with BF16 the operands are bfloat16, otherwise float32; with DOT
// bfloat16 numbers are multiplied in pairs, by AVX-512's instruction for that, if there is one
// (dot.cpp). WEIGHT_BYTES is the size of the weights of all layers.
// Whatever the number of rows, the sums of a row are taken in one order.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "tile.h"

constexpr int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// A bfloat16 number that need not be converted again.
struct Rounded {
    float value;
};

inline float load(Rounded x) { return x.value; }
inline void store(Rounded* target, float x) {
    BFloat16 rounded;
    store(&rounded, x);
    target->value = load(rounded);
}

#ifdef __AVX512BF16__
constexpr bool PAIRS = DOT;
#else
constexpr bool PAIRS = false;
#endif

// A number of a weight, and one of a row that is multiplied with it.
typedef std::conditional_t<BF16, BFloat16, float> Stored;
typedef std::conditional_t<BF16, std::conditional_t<PAIRS, BFloat16, Rounded>, float> Operand;

// Whether the weights are too large to stay in caches beside the states of some images.
constexpr bool LARGE = WEIGHT_BYTES > 4 << 20;
// Of a panel of large weights, one block after the other stays in the first cache, 16 kB, while a
// few tiles of rows are multiplied with it. (With many rows, reading and writing the sums for every
// block would take longer than reading the panel from the second cache.)
constexpr int BLOCK = (16 << 10) / (PANEL * sizeof(Stored));  // its inputs
constexpr int FEW_ROWS = 4 * ROWS;
// How far ahead a single tile prefetches, bytes. It reads each weight once: blocks are of no use.
constexpr int AHEAD = 8 << 10;

// What a tile of `rows` of `all_rows` prefetches while it computes: an equal share of the next
// block, since memory may take as long to read a block as all rows take to be multiplied with it.
// Behind the last block this is in vain.
struct Prefetch {
    static constexpr int64_t LINE = 64;  // bytes of a cache line

    const char* address;
    int64_t step;  // bytes for each cache line that the tile reads

    // `ahead` is the distance of the next block, bytes.
    Prefetch(const Stored* weight, int64_t ahead, int64_t row, int64_t rows, int64_t all_rows)
        : address((const char*)weight + ahead + ahead * row / all_rows),
          step((LINE * rows + all_rows - 1) / all_rows) {}

    template <int BYTES>
    void next() {
        if (!LARGE) return;
        for (int i = 0; i < BYTES; i += LINE, address += step) __builtin_prefetch(address);
    }
};

// Of pairs, the first or the second numbers.
template <bool SECOND, int V>
inline void read(const BFloat16* source, Vector (&vectors)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
        Bits pairs = ((const volatile Bits*)source)[v];
        vectors[v] = (Vector)(SECOND ? pairs & 0xffff0000 : pairs << 16);
    }
}

// As `accumulate` of tile.h. The weights are pairs, with that of the first input in the lower half,
// and are read twice, since the registers do not hold both beside the sums.
template <int R, int V>
inline void accumulate(Vector (&sums)[R][V], const Rounded* a, int64_t stride, const BFloat16* b,
                       int64_t n, Prefetch prefetch) {
    for (int64_t i = 0; i < n; i += 2, b += 2 * V * LANES) {
        prefetch.next<V * sizeof(Vector)>();
        Vector weights[V];
        read<false>(b, weights);
        add_products(sums, a + i, stride, weights);
        read<true>(b, weights);
        add_products(sums, a + i + 1, stride, weights);
    }
}

#ifdef __AVX512BF16__
template <int R, int V, class Prefetch>
inline void accumulate(Vector (&sums)[R][V], const BFloat16* a, int64_t stride, const BFloat16* b,
                       int64_t n, Prefetch prefetch) {
    accumulate(sums, (const Pair*)a, stride / 2, (const Pair*)b, n / 2, prefetch);
}

template <int V>
inline void store_row(BFloat16* row, const Vector (&numbers)[V]) {
    store_row((Pair*)row, numbers);
}
#endif

template <int V>
inline void store_row(Rounded* row, const Vector (&numbers)[V]) {
    float copy[V * LANES];
    memcpy(copy, numbers, sizeof copy);
    for (int j = 0; j < V * LANES; j++) store(row + j, copy[j]);
}

// What is added to: the biases or, from the second block on, the sums so far.
struct Start {
    const float* numbers;
    int stride;
};

// R rows of a panel of V vectors: outputs = start + inputs * weight over n inputs (all INPUTS
// unless the weights are LARGE), with a relu if RELU. The strides are from one row to the next. Not
// inlined, so that the sums stay in registers.
template <int R, int V, bool RELU, int INPUTS, int STRIDE, int OUT_STRIDE, class Output>
[[gnu::noinline]] void tile(const Operand* inputs, const Stored* weight, int n, Start start,
                            Output* outputs, Prefetch prefetch) {
    Vector sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sums[r][v] = *(const Vector*)(start.numbers + r * start.stride + v * LANES);
    // CPUs that are fast with pairs foresee the lines of a single row's weights themselves.
    if constexpr (R == 1 && PAIRS) accumulate(sums, inputs, STRIDE, weight, INPUTS, NoPrefetch());
    else accumulate(sums, inputs, STRIDE, weight, LARGE ? n : INPUTS, prefetch);
    for (int r = 0; r < R; r++) {
        for (int v = 0; RELU && v < V; v++) sums[r][v] = sums[r][v] < 0.f ? 0.f : sums[r][v];
        store_row(outputs + r * OUT_STRIDE, sums[r]);
    }
}

// A linear layer, laid out as Python fills it in: pointers, nothing else. The weights are packed in
// panels of PANEL outputs side by side, input after input (bfloat16: pair after pair of inputs). The
// last panel has the rest of the outputs, and zeros up to a whole number of vectors.
template <int INPUTS, int OUTPUTS>
struct Linear {
    static constexpr int PANELS = (OUTPUTS + PANEL - 1) / PANEL;
    static constexpr int LAST = (padded(OUTPUTS) - (PANELS - 1) * PANEL) / LANES;  // its vectors

    const Stored* weight;  // of each panel (INPUTS, outputs) or (INPUTS / 2, outputs, 2)
    const float* bias;     // (padded(OUTPUTS))

    // Panel p of the outputs of all rows, with a relu if RELU.
    template <bool RELU, int STRIDE, int OUT_STRIDE, class Output>
    void multiply(int64_t p, const Operand* inputs, int64_t rows, Output* outputs) const {
        if (p < PANELS - 1)
            multiply<RELU, STRIDE, OUT_STRIDE, VECTORS>(p, inputs, rows, outputs + p * PANEL);
        else multiply<RELU, STRIDE, OUT_STRIDE, LAST>(p, inputs, rows, outputs + p * PANEL);
    }

    template <bool RELU, int STRIDE, int OUT_STRIDE, int V, class Output>
    void multiply(int64_t p, const Operand* inputs, int64_t rows, Output* outputs) const {
        alignas(64) float sums[FEW_ROWS * PANEL];
        bool in_blocks = LARGE && rows > ROWS && rows <= FEW_ROWS;
        for (int i = 0, n; i < INPUTS; i += n) {
            n = std::min(in_blocks ? BLOCK : INPUTS, INPUTS - i);
            const Stored* block = weight + p * INPUTS * PANEL + i * V * LANES;
            int64_t ahead = rows > ROWS ? n * V * LANES * sizeof(Stored) : AHEAD;
            each_tile(rows, [&](int64_t r, auto R) {
                const Operand* input = inputs + r * STRIDE + i;
                Start start = i == 0 ? Start{bias + p * PANEL, 0} : Start{sums + r * PANEL, PANEL};
                Prefetch prefetch(block, ahead, r, R, rows);
                if (LARGE && i + n < INPUTS)
                    tile<R, V, false, INPUTS, STRIDE, PANEL>(input, block, n, start,
                                                             sums + r * PANEL, prefetch);
                else
                    tile<R, V, RELU, INPUTS, STRIDE, OUT_STRIDE>(
                        input, block, n, start, outputs + r * OUT_STRIDE, prefetch);
            });
        }
    }
};
