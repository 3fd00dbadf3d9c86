// Matrices as operands of products: float32 numbers, or pairs of bfloat16 numbers.
//
// A word is a number or a pair. The two numbers of a pair are next to each other in a row ("by row")
// or, where a product sums over the rows, in a column ("by column"). Columns may lie in panels: for
// each panel all rows, so that the rows of a panel are next to each other.

#pragma once

#include <algorithm>

#include "tile.h"

template <class Word>
using Number = std::conditional_t<std::is_same_v<Word, Pair>, BFloat16, float>;

// Of a word, its numbers.
template <class Word>
constexpr int64_t NUMBERS = sizeof(Word) / sizeof(Number<Word>);

// Of n numbers of a column, the words.
template <class Word>
int64_t words_of(int64_t n) {
    return (n + NUMBERS<Word> - 1) / NUMBERS<Word>;
}

// Calls run(first column, V) for each panel of V vectors.
template <class Run>
inline void each_panel(int64_t width, const Run& run) {
    for (int64_t c = 0; c < width; c += PANEL) {
        int64_t vectors = std::min<int64_t>(PANEL, width - c) / LANES;
        with_constant<VECTORS>(vectors, [&](auto V) { run(c, V); });
    }
}

// Rows of numbers (n, width) as words: they themselves, or else `buffer`.
inline const float* as_words(const float* x, int64_t, int64_t, float*) { return x; }

#ifdef __AVX512BF16__
inline const Pair* as_words(const BFloat16* x, int64_t, int64_t, Pair*) { return (const Pair*)x; }
inline const Pair* as_words(const float* x, int64_t n, int64_t width, Pair* buffer) {
    each_panel(width, [&](int64_t c, auto V) {
        for (int64_t i = c; i < n * width; i += width) {
            Vector numbers[V];
            read(x + i, numbers);
            store_row(buffer + i / 2, numbers);
        }
    });
    return buffer;
}
#endif

// `columns` (ceil(n / NUMBERS), width): n rows of a panel by column. In the rows, which are `stride`
// words apart, the words are by row. A number that is missing is 0.
inline void order_by_column(const float* rows, int64_t stride, int64_t n, int64_t width,
                            float* columns) {
    for (int64_t r = 0; r < n; r++) std::copy_n(rows + r * stride, width, columns + r * width);
}
inline void order_by_column(const Pair* rows, int64_t stride, int64_t n, int64_t width,
                            Pair* columns) {
    for (int64_t r = 0; r < n; r += 2, rows += 2 * stride, columns += width) {
        const BFloat16 *first = (const BFloat16*)rows, *second = (const BFloat16*)(rows + stride);
        for (int64_t j = 0; j < width; j++)
            columns[j].bits = first[j].bits | (r + 1 < n ? uint32_t(second[j].bits) << 16 : 0);
    }
}

// The numbers of row r in a vector of words by column.
template <class Word>
inline Vector numbers_of_row(Vector words, int64_t r) {
    if (NUMBERS<Word> == 1) return words;
    typedef uint32_t Bits __attribute__((vector_size(sizeof(Vector))));
    return (Vector)((Bits)words << (r % 2 ? 0 : 16) & 0xffff0000);
}

// A matrix by column, in panels.
template <class Word>
class Columns {
    Buffer<Word> words;
    const int64_t width;

   public:
    int64_t rows = 0;  // of words

    Columns(int64_t most, int64_t width) : words(words_of<Word>(most) * width), width(width) {}

    // The n rows of `matrix`.
    Columns(const float* matrix, int64_t n, int64_t width) : Columns(n, width) {
        Buffer<Word> buffer(n * width / NUMBERS<Word>);
        fill(as_words(matrix, n, width, buffer.data()), n);
    }

    // The panel that begins at column c.
    const Word* operator[](int64_t c) const { return words.data() + c * rows; }

    // From n rows of words.
    void fill(const Word* source, int64_t n) {
        rows = words_of<Word>(n);
        each_panel(width, [&](int64_t c, auto V) {
            order_by_column(source + c / NUMBERS<Word>, width / NUMBERS<Word>, n, V * LANES,
                            words.data() + c * rows);
        });
    }
};
