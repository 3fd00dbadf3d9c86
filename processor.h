// What the C++ files share: bfloat16, the feature map, and the step of linear attention.
// SIZE, a constant of the compilation, is the size of a head's queries, keys and values.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

struct BFloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline void store(float* target, float x) { *target = x; }
inline void store(BFloat16* target, float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    target->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// exp(x) for x <= 0: 2^n e^r with |r| <= log(2) / 2 and Taylor's series of e^r.
inline float exponential(float x) {
    x = x > -87 ? x : -87;  // std::max would keep the loops from being vectorised
    int n = int(x * 1.44269504f - 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // log(2) in two parts
    float e = 1.f / 5040;
    e = e * r + 1.f / 720;
    e = e * r + 1.f / 120;
    e = e * r + 1.f / 24;
    e = e * r + 1.f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.f;
    e = e * r + 1.f;
    int bits = (n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return e * power;
}

// phi(x) = elu(x) + 1 of a row, without a branch: exp(min(x, 0)) + max(x, 0).
template <class T>
inline void features(const T* x, float* phi) {
    for (int e = 0; e < SIZE; e++) {
        float value = load(x[e]);
        phi[e] = exponential(value < 0 ? value : 0) + (value > 0 ? value : 0);
    }
}

constexpr float EPSILON = 1e-6f;  // attention.EPSILON

// The widest vectors that fill a row of SIZE numbers.
constexpr int WIDTH = std::min(16, SIZE & -SIZE), COUNT = SIZE / WIDTH;
typedef float Part __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float Matrix[SIZE][SIZE];

// So many positions whose rows fit into the registers go through `update` at once.
#ifdef __AVX512F__
constexpr int TOGETHER = std::max(1, std::min(4, 8 / COUNT));
#else
constexpr int TOGETHER = 1;
#endif

// Of one position after the other: matrix[a] += x[a] * row for every a, and then
// sums += y[a] * matrix[a]. The matrix is read and written once for all N positions.
template <int N>
inline void update(float* matrix, const float (*x)[SIZE], const float (*row)[SIZE],
                   const float (*y)[SIZE], float (*sums)[SIZE]) {
    Part rows[N][COUNT], total[N][COUNT];
    memcpy(rows, row, sizeof rows);
    memcpy(total, sums, sizeof total);
    for (int a = 0; a < SIZE; a++) {
        Part* line = (Part*)(matrix + a * SIZE);
#pragma GCC unroll 64
        for (int i = 0; i < COUNT; i++) {
            Part changed = line[i];
#pragma GCC unroll 64
            for (int n = 0; n < N; n++) {
                changed += x[n][a] * rows[n][i];
                total[n][i] += y[n][a] * changed;
            }
            line[i] = changed;
        }
    }
    memcpy(sums, total, sizeof total);
}

inline float dot(const float* a, const float* b) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int e = 0; e < SIZE; e++) sum += a[e] * b[e];
    return sum;
}
