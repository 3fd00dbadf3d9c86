// Which of product.h's two ways to multiply bfloat16 numbers this CPU is faster at. On some CPUs the
// instruction for pairs of them takes several times as long as one for float32 numbers.

#include <chrono>

#include "exports.h"
#include "product.h"

// Seconds of a product of ROWS rows, whose type says how it is computed, from the first cache.
template <class Input>
double seconds_of_tile() {
    constexpr int INPUTS = 256;
    static Input rows[ROWS * INPUTS];
    static BFloat16 weight[INPUTS * PANEL];
    static Vector result[ROWS][VECTORS];
    auto start = std::chrono::steady_clock::now();
    Vector sums[ROWS][VECTORS] = {};
    accumulate(sums, rows, INPUTS, weight, INPUTS, Prefetch(weight, 0, 0, 1, 1));
    memcpy(result, sums, sizeof sums);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// faster = 1 if the CPU has the instruction, unless conversion to float32 takes less than 0.8 times
// as long.
void compare(int64_t* faster) {
    *faster = 0;
#ifdef __AVX512BF16__
    double pairs = 1, converted = 1;
    for (int i = 0; i < 1000; i++) {
        pairs = std::min(pairs, seconds_of_tile<BFloat16>());
        converted = std::min(converted, seconds_of_tile<Rounded>());
    }
    *faster = converted > 0.8 * pairs;
#endif
}

extern "C" const Export* exports() {
    static const Export table[] = {exported<compare>("compare"), {}};
    return table;
}
