// Dropout of layers/dropout.py.

#pragma once

#include "tile.h"

// keep_mask of layers/dropout.py: a hash of an element's index and its image's two keys. For one
// index, or a vector of them.
template <class Index>
inline auto keep(Index place, uint32_t first, uint32_t second, uint32_t threshold) {
    Index x = place ^ first;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = (x ^ (x >> 16)) + second;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return (x ^ (x >> 16)) >= threshold;
}

// Dropout of images with `size` elements each; without keys (N, 2) nothing is dropped.
struct Dropout {
    const uint32_t* keys;
    int64_t size, threshold;
    float scale;

    // y = x * scale where kept, else 0, for `count` elements of one image, from number `start` of all
    // images on. y may be x.
    template <class X, class Y>
    void drop(const X* x, Y* y, int64_t start, int count) const {
        const uint32_t* key = keys + 2 * (start / size);
        uint32_t first = key[0], second = key[1], place = start % size, limit = threshold;
        float kept = scale;
#pragma omp simd
        for (int i = 0; i < count; i++) {
            float factor = keep(place + i, first, second, limit) ? kept : 0;
            store(y + i, load(x[i]) * factor);
        }
    }

    // The same in place, for V vectors.
    template <int V>
    void drop(Vector (&x)[V], int64_t start) const {
        typedef uint32_t Places __attribute__((vector_size(sizeof(Vector))));
        const uint32_t* key = keys + 2 * (start / size);
        Places place;
        for (int j = 0; j < LANES; j++) place[j] = start % size + j;
        Vector zero = {}, kept = zero + scale;
        for (int v = 0; v < V; v++)
            x[v] *= keep(place + v * LANES, key[0], key[1], threshold) ? kept : zero;
    }
};
