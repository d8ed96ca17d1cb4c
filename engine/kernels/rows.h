// What is done to one row between matrix products: plain loops that the compiler vectorises.
// Arithmetic is fp32, and what is stored in bf16 is rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace twinpool {
namespace {

using bf16 = uint16_t;
using i64 = int64_t;

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float widen(bf16 x) { return as_float(uint32_t(x) << 16); }

// To nearest, ties to even; a NaN stays one.
inline bf16 narrow(float x) {
    uint32_t bits = as_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16(x != x ? 0x7fc0u : rounded);
}

// e^x by 2^n * e^r with |r| <= ln(2) / 2 and Taylor's series of e^r: within 2 units in the last
// place, far below what bf16 keeps. Below -87 and above 88 it stays at the bound's value.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504f);
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float y = 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return y * as_float(uint32_t(int32_t(n) + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline void norm_row(const float* x, const float* weight, bf16* out, i64 size, float floor2) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 d = 0; d < size; ++d) sum += x[d] * x[d];
    float scale = 1.0f / std::sqrt(sum + floor2);
#pragma omp simd
    for (i64 d = 0; d < size; ++d) out[d] = narrow(x[d] * scale * weight[d]);
}

constexpr i64 kMaxRotated = 1024;

// A head normalised and turned in place; `size` is even and at most kMaxRotated. With a floor below
// zero it is not normalised.
inline void norm_rotate_head(bf16* head, const float* weight, const float* cos, const float* sin,
                             i64 size, float floor2) {
    i64 half = size / 2;
    float x[kMaxRotated];
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 h = 0; h < size; ++h) {
        x[h] = widen(head[h]);
        sum += x[h] * x[h];
    }
    float scale = floor2 < 0 ? 1.0f : 1.0f / std::sqrt(sum + floor2);
#pragma omp simd
    for (i64 h = 0; h < size; ++h) x[h] *= scale * weight[h];
#pragma omp simd
    for (i64 h = 0; h < half; ++h) {
        head[h] = narrow(x[h] * cos[h] + x[h + half] * sin[h]);
        head[h + half] = narrow(x[h + half] * cos[h + half] + x[h] * sin[h + half]);
    }
}

// `more` added in place, rounded once.
inline void add_row(bf16* x, const bf16* more, i64 size) {
#pragma omp simd
    for (i64 d = 0; d < size; ++d) x[d] = narrow(widen(x[d]) + widen(more[d]));
}

inline void gate_row(const bf16* gate, const bf16* up, bf16* out, i64 size) {
#pragma omp simd
    for (i64 i = 0; i < size; ++i) out[i] = narrow(silu(widen(gate[i])) * widen(up[i]));
}

// Scores of a row with E experts.
inline void score_row(const bf16* x, const float* router_ED, float* out_E, i64 experts, i64 size) {
    for (i64 e = 0; e < experts; ++e) {
        const float* weight = router_ED + e * size;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 d = 0; d < size; ++d) sum += widen(x[d]) * weight[d];
        out_E[e] = sum;
    }
}

// Softmax of a row of E scores, in place, and the K with the highest: highest first, the first of
// equals.
inline void route_row(float* row, i64 experts, i64 top_k, bool normalise, float* weights_K,
                      i64* experts_K) {
    float most = row[0];
#pragma omp simd reduction(max : most)
    for (i64 e = 0; e < experts; ++e) most = row[e] > most ? row[e] : most;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 e = 0; e < experts; ++e) {
        row[e] = exponential(row[e] - most);
        sum += row[e];
    }
    float kept = 0;
    for (i64 k = 0; k < top_k; ++k) {
        i64 best = 0;
        for (i64 e = 1; e < experts; ++e) best = row[e] > row[best] ? e : best;
        kept += row[best];
        weights_K[k] = row[best];
        experts_K[k] = best;
        row[best] = -1;
    }
    float whole = normalise ? kept : sum;
    for (i64 k = 0; k < top_k; ++k) weights_K[k] /= whole;
}

}  // namespace
}  // namespace twinpool
