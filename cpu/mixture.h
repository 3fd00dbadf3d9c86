// Log-probabilities of bytes under mixtures of discretized logistics, and their gradients (log_prob
// of layers/mixture.py).
//
// Further compile-time constants: BIN_WIDTH and MIN_LOG_SCALE.

#pragma once

#include <vector>

#include "common.h"

// log(x) of a normal x > 0: n log(2) + log(m) with m near 1, and the Taylor series of the latter in
// (m - 1) / (m + 1).
inline float logarithm(float x) {
    int bits;
    memcpy(&bits, &x, 4);
    int n = (bits - 0x3f3504f3) >> 23;  // so that sqrt(1/2) <= m < sqrt(2)
    bits -= n << 23;
    float m;
    memcpy(&m, &bits, 4);
    float s = (m - 1) / (m + 1), s2 = s * s;
    float series = 2 + s2 * (2.f / 3 + s2 * (2.f / 5 + s2 * (2.f / 7 + s2 * (2.f / 9))));
    return n * 0.69314718f + s * series;
}

inline float log_sigmoid(float x) {  // written so that NaN stays NaN
    return (x > 0 ? 0 : x) - logarithm(1 + exponential(x > 0 ? -x : x));
}

// sinh(x) / x from x^2, for x up to 5: half of the widest bin in scales is exp(7) / 255 = 4.3.
inline float sinh_ratio(float x2) {
    float sum = 1;
#pragma GCC unroll 12
    for (int n = 12; n > 0; n--) sum = 1 + sum * x2 * (1.f / (2 * n * (2 * n + 1)));
    return sum;
}

// The components of some mixtures with K each, one mixture after the other. What is computed of
// every component is computed in one loop over all of them: those of one mixture fill no vector.
struct Components {
    int64_t K, n;
    std::vector<float> bytes, logits, means, log_scales;  // logits less the largest of a mixture
    std::vector<float> log_masses, d_means, d_log_scales;

    template <class T>
    Components(const T* parameters, const uint8_t* values, int64_t mixtures, int64_t K)
        : K(K), n(mixtures * K), bytes(n), logits(n), means(n), log_scales(n), log_masses(n),
          d_means(n), d_log_scales(n) {
        for (int64_t i = 0; i < n; i += K, parameters += 3 * K) {
            float largest = -INFINITY;
            for (int64_t k = 0; k < K; k++) largest = std::max(largest, load(parameters[k]));
            for (int64_t k = 0; k < K; k++) {
                bytes[i + k] = values[i / K];
                logits[i + k] = load(parameters[k]) - largest;
                means[i + k] = load(parameters[K + k]);
                log_scales[i + k] = load(parameters[2 * K + k]);
            }
        }
    }

    // The logarithm of the mass of each component in the bin of the byte, and its derivatives. With
    // the edges a and b and the width w = a - b, in scales from the mean, the mass is
    // sigma(a) sigma(-b) (1 - exp(-w)), and 1 - exp(-w) is w exp(-w/2) sinh(w/2) / (w/2).
    void locate() {
        const float *__restrict byte = bytes.data(), *__restrict mean = means.data(),
                    *__restrict log_scale = log_scales.data();
        float *__restrict log_mass = log_masses.data(), *__restrict d_mean = d_means.data(),
              *__restrict d_log_scale = d_log_scales.data();
        const float least = MIN_LOG_SCALE, most = std::exp(-least), log_width = std::log(BIN_WIDTH);
        for (int64_t i = 0; i < n; i++) {
            // The last bin has no upper edge, the first no lower one. These are factors because GCC
            // does not vectorise conditions that have more behind them.
            float upper = byte[i] < 255 ? 1 : 0, lower = byte[i] > 0 ? 1 : 0;
            float free = log_scale[i] <= least ? 0 : 1;  // as the gradient of torch.clamp
            float log_s = log_scale[i] < least ? least : log_scale[i];
            float inverse = most * exponential(least - log_s);
            float a = ((2 * byte[i] - 254) / 255 - mean[i]) * inverse;
            float b = ((2 * byte[i] - 256) / 255 - mean[i]) * inverse;
            float half = inverse * float(BIN_WIDTH / 2), ratio = sinh_ratio(half * half);
            float log_w = log_width - log_s - half + logarithm(ratio);
            log_mass[i] = upper * log_sigmoid(a) + lower * (log_sigmoid(-b) + upper * log_w);
            float d_a = upper * sigmoid(-a), d_b = lower * sigmoid(b);
            float d_log_w = upper * lower * exponential(-half) / ratio;  // w / (exp(w) - 1)
            d_mean[i] = inverse * (d_b - d_a);
            d_log_scale[i] = free * (b * d_b - a * d_a - d_log_w);
        }
    }

    // Replaces the components' numbers of each mixture by their softmax; `log_sums` gets
    // log(sum(exp(x))) of them, added with this sign.
    void softmax(std::vector<float>& x, float sign, float* log_sums) const {
        for (int64_t i = 0; i < n; i += K) {
            float largest = *std::max_element(&x[i], &x[i] + K);
            log_sums[i / K] += sign * largest;
            if (largest != -INFINITY)
                for (int64_t k = 0; k < K; k++) x[i + k] -= largest;
        }
        for (float& value : x) value = exponential(value);
        for (int64_t i = 0; i < n; i += K) {
            float sum = 0;
            for (int64_t k = 0; k < K; k++) sum += x[i + k];
            for (int64_t k = 0; k < K; k++) x[i + k] /= sum;
            log_sums[i / K] += sign * std::log(sum);
        }
    }

    // The logarithm of a byte's probability is that of the sum of exp(logit + log_mass), less that
    // of the sum of exp(logit). `gradients` are left out if it is null.
    void log_prob(float* log_probs, float* gradients) {
        std::vector<float> posterior(n);
        locate();
        for (int64_t i = 0; i < n; i++) posterior[i] = logits[i] + log_masses[i];
        std::fill_n(log_probs, n / K, 0.f);
        softmax(posterior, 1, log_probs);
        softmax(logits, -1, log_probs);
        if (!gradients) return;
        for (int64_t i = 0; i < n; i += K, gradients += 3 * K)
            for (int64_t k = 0; k < K; k++) {
                gradients[k] = posterior[i + k] - logits[i + k];
                gradients[K + k] = posterior[i + k] * d_means[i + k];
                gradients[2 * K + k] = posterior[i + k] * d_log_scales[i + k];
            }
    }
};
