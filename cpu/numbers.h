// Vectors of the CPU, where they lie in memory, and bfloat16.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// How many floats one of this CPU's widest vectors holds. GCC computes wider ones number by number.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// A vector of N numbers, anywhere in memory.
template <int N>
struct Floats {
    typedef float Vector __attribute__((vector_size(4 * N), aligned(4), may_alias));
};
static_assert(alignof(Floats<LANES>::Vector) == 4);

// Begins with a cache line: a vector in two lines takes twice as long. Not initialised.
template <class T>
class Buffer {
    static constexpr int64_t LINE = 64;  // bytes
    std::unique_ptr<T[]> numbers;

   public:
    explicit Buffer(int64_t size) : numbers(new T[size + LINE / sizeof(T)]) {}
    T* data() const { return (T*)(((uintptr_t)numbers.get() + LINE - 1) / LINE * LINE); }
};

// x with its numbers I and I ^ W exchanged.
template <int W, class Vector, int... I>
inline Vector exchange(Vector x, std::integer_sequence<int, I...>) {
    return Vector{x[I ^ W]...};
}

// The sum of a vector's N numbers, by halves. (A compiler that must not change the order of additions
// adds one number after the other, and each addition waits for the one before.)
template <int N, int W = N / 2, class Vector>
inline float add_up(Vector x) {
    if constexpr (W > 0)
        return add_up<N, W / 2>(x + exchange<W>(x, std::make_integer_sequence<int, N>()));
    return x[0];
}

// The sum of a[i] * b[i] for i < n.
template <int N = LANES>
inline float dot(const float* a, const float* b, int n) {
    typedef typename Floats<N>::Vector Vector;
    Vector sums = {};
    int i = 0;
    for (; i + N <= n; i += N) sums += *(const Vector*)(a + i) * *(const Vector*)(b + i);
    float total = i ? add_up<N>(sums) : 0;
    if constexpr (N > 1)
        if (i < n) total += dot<N / 2>(a + i, b + i, n - i);
    return total;
}

// The sum of n numbers.
template <int N = LANES>
inline float sum(const float* x, int n) {
    typedef typename Floats<N>::Vector Vector;
    Vector sums = {};
    int i = 0;
    for (; i + N <= n; i += N) sums += *(const Vector*)(x + i);
    float total = i ? add_up<N>(sums) : 0;
    if constexpr (N > 1)
        if (i < n) total += sum<N / 2>(x + i, n - i);
    return total;
}

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
inline void store(BFloat16* target, float x) {  // rounds to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    target->bits = x == x ? rounded : 0x7fc0;  // the sum would carry a NaN over to 0
}

// Stores n numbers.
template <class T>
inline void store(T* target, const float* numbers, int n) {
    for (int i = 0; i < n; i++) store(target + i, numbers[i]);
}

#ifdef __AVX512BF16__
// CPUs round two vectors at once. Like their products of pairs, this takes denormal numbers for 0.
inline void store(BFloat16* target, const float* numbers, int n) {
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        __m512 first = _mm512_loadu_ps(numbers + i), second = _mm512_loadu_ps(numbers + i + 16);
        __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
        memcpy(target + i, &rounded, sizeof rounded);
    }
    for (; i < n; i++) store(target + i, numbers[i]);
}
#endif
