// Products of a few rows with a panel of columns, whose sums stay in registers. They are multiplied
// word by word: float by float or, where CPUs have an instruction for that, by pairs of bfloat16
// numbers.

#pragma once

#include <cstdint>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "numbers.h"

typedef Floats<LANES>::Vector Vector;

// ROWS * VECTORS registers hold sums: of 16 with AVX, of 32 with AVX-512 and on ARM.
constexpr int VECTORS = LANES == 8 ? 2 : 4;
constexpr int ROWS = 6, PANEL = LANES * VECTORS;

// Two bfloat16 numbers, the first one in the lower half.
struct [[gnu::may_alias]] Pair {
    uint32_t bits;
};

// Reads V vectors of words. Volatile: g++ would read them again for each row, which takes longer
// than to multiply.
template <int V, class Word>
inline void read(const Word* source, Vector (&vectors)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) vectors[v] = ((const volatile Vector*)source)[v];
}

// sums += a word of each row * columns; the stride is from one row to the next.
template <int R, int V, class Input>
inline void add_products(Vector (&sums)[R][V], const Input* a, int64_t stride,
                         const Vector (&columns)[V]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[r][v] += load(a[r * stride]) * columns[v];
}

// V vectors of a row as words.
template <int V>
inline void store_row(float* row, const Vector (&numbers)[V]) {
    for (int v = 0; v < V; v++) ((Vector*)row)[v] = numbers[v];
}

#ifdef __AVX512BF16__
template <int R, int V>
inline void add_products(Vector (&sums)[R][V], const Pair* a, int64_t stride,
                         const Vector (&columns)[V]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            __m512i word = _mm512_set1_epi32(a[r * stride].bits);
            sums[r][v] = (Vector)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)word,
                                                  (__m512bh)columns[v]);
        }
}

template <int V>
inline void store_row(Pair* row, const Vector (&numbers)[V]) {
    for (int v = 0; v + 1 < V; v += 2) {
        __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)numbers[v + 1], (__m512)numbers[v]);
        memcpy(row + v * LANES / 2, &pairs, sizeof pairs);
    }
    if (V % 2) {
        __m256bh pairs = _mm512_cvtneps_pbh((__m512)numbers[V - 1]);
        memcpy(row + (V - 1) * LANES / 2, &pairs, sizeof pairs);
    }
}
#endif

struct NoPrefetch {
    template <int BYTES>
    void next() {}
};

// sums += a * b for R rows of a, n words of inputs and a panel of V vectors.
template <int R, int V, class Word, class Prefetch = NoPrefetch>
inline void accumulate(Vector (&sums)[R][V], const Word* a, int64_t stride, const Word* b,
                       int64_t n, Prefetch prefetch = {}) {
    for (int64_t i = 0; i < n; i++, b += V * LANES) {
        prefetch.template next<V * sizeof(Vector)>();
        Vector columns[V];
        read(b, columns);
        add_products(sums, a + i, stride, columns);
    }
}

// Calls run(n) with 1 <= n <= MOST as a std::integral_constant.
template <int MOST, class Run>
inline void with_constant(int64_t n, const Run& run) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_constant<MOST - 1>(n, run);
    run(std::integral_constant<int, MOST>());
}

// Calls run(first row, R) for each tile of rows. They have the same R, or nearly: a tile of one row
// takes almost as long as one of four, since every sum waits for the addition before.
template <class Run>
inline void each_tile(int64_t rows, const Run& run) {
    int64_t tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t row = rows * t / tiles, next = rows * (t + 1) / tiles;
        with_constant<ROWS>(next - row, [&](auto R) { run(row, R); });
    }
}
