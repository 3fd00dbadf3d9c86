// Vectors of the CPU, and bfloat16.

#pragma once

#include <cstdint>
#include <cstring>

// How many floats one of this CPU's widest vectors holds. GCC computes wider ones number by number.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

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
