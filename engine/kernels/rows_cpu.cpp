// What prefill does to rows between its matrix products, each in one pass over memory.
//
// Plain loops that the compiler vectorises; arithmetic is fp32, and what is stored in bf16 is
// rounded once. A row's result depends on that row alone: never on its neighbours, their number or
// the number of threads. Only indices are checked, where a wrong one would write elsewhere; shapes
// are engine/kernels/rows_cpu.py's to get right.

#include <cmath>
#include <cstdint>
#include <cstring>

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

// A thread that sleeps costs up to 0.1 ms to wake: not for less than this many elements.
constexpr i64 kAlone = 1 << 17;

inline int team(i64 elements, int threads) { return elements < kAlone ? 1 : threads; }

inline void norm_row(const float* x, const float* weight, bf16* out, i64 size, float floor2) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 d = 0; d < size; ++d) sum += x[d] * x[d];
    float scale = 1.0f / std::sqrt(sum + floor2);
#pragma omp simd
    for (i64 d = 0; d < size; ++d) out[d] = narrow(x[d] * scale * weight[d]);
}

}  // namespace

extern "C" {

// out = x / sqrt(|x|^2 + floor2) * weight, row by row.
void twinpool_norm(const float* x_TD, const float* weight_D, bf16* out_TD, i64 rows, i64 size,
                   float floor2, int threads) {
#pragma omp parallel for num_threads(team(rows * size, threads)) schedule(static)
    for (i64 t = 0; t < rows; ++t)
        norm_row(x_TD + t * size, weight_D, out_TD + t * size, size, floor2);
}

// x += more, then as twinpool_norm.
void twinpool_add_norm(float* x_TD, const bf16* more_TD, const float* weight_D, bf16* out_TD,
                       i64 rows, i64 size, float floor2, int threads) {
#pragma omp parallel for num_threads(team(rows * size, threads)) schedule(static)
    for (i64 t = 0; t < rows; ++t) {
        float* x = x_TD + t * size;
        const bf16* more = more_TD + t * size;
#pragma omp simd
        for (i64 d = 0; d < size; ++d) x[d] += widen(more[d]);
        norm_row(x, weight_D, out_TD + t * size, size, floor2);
    }
}

// The same with `more` in fp32.
void twinpool_add_norm_fp32(float* x_TD, const float* more_TD, const float* weight_D, bf16* out_TD,
                            i64 rows, i64 size, float floor2, int threads) {
#pragma omp parallel for num_threads(team(rows * size, threads)) schedule(static)
    for (i64 t = 0; t < rows; ++t) {
        float* x = x_TD + t * size;
        const float* more = more_TD + t * size;
#pragma omp simd
        for (i64 d = 0; d < size; ++d) x[d] += more[d];
        norm_row(x, weight_D, out_TD + t * size, size, floor2);
    }
}

// The first `heads` of each token's heads, `stride` elements from token to token, normalised and
// turned in place. `size` is even and at most kMaxHead.
constexpr i64 kMaxHead = 1024;

void twinpool_norm_rotate(bf16* x_TMH, const float* weight_MH, const float* cos_TH,
                          const float* sin_TH, i64 tokens, i64 heads, i64 stride, i64 size,
                          float floor2, int threads) {
    i64 half = size / 2;
#pragma omp parallel for num_threads(team(tokens * heads * size, threads)) schedule(static)
    for (i64 t = 0; t < tokens; ++t) {
        const float* cos = cos_TH + t * size;
        const float* sin = sin_TH + t * size;
        for (i64 m = 0; m < heads; ++m) {
            bf16* head = x_TMH + t * stride + m * size;
            const float* weight = weight_MH + m * size;
            float x[kMaxHead];
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (i64 h = 0; h < size; ++h) {
                x[h] = widen(head[h]);
                sum += x[h] * x[h];
            }
            float scale = 1.0f / std::sqrt(sum + floor2);
#pragma omp simd
            for (i64 h = 0; h < size; ++h) x[h] *= scale * weight[h];
#pragma omp simd
            for (i64 h = 0; h < half; ++h) {
                head[h] = narrow(x[h] * cos[h] + x[h + half] * sin[h]);
                head[h + half] = narrow(x[h + half] * cos[h + half] + x[h] * sin[h + half]);
            }
        }
    }
}

// Token t's `heads` heads to the rows of `cells` that slots_TX names. Returns how many slots are
// none of the cells; those are left out.
i64 twinpool_insert(bf16* cells, i64 num_cells, const i64* slots_TX, const bf16* x_TXH, i64 tokens,
                    i64 heads, i64 stride, i64 size, int threads) {
    i64 wrong = 0;
#pragma omp parallel for num_threads(team(tokens * heads * size, threads)) schedule(static) \
    reduction(+ : wrong)
    for (i64 t = 0; t < tokens; ++t)
        for (i64 x = 0; x < heads; ++x) {
            i64 slot = slots_TX[t * heads + x];
            if (slot < 0 || slot >= num_cells) {
                ++wrong;
                continue;
            }
            std::memcpy(cells + slot * size, x_TXH + t * stride + x * size, size * sizeof(bf16));
        }
    return wrong;
}

// silu(gate) * up of gate and up side by side.
void twinpool_gated(const bf16* gate_up, bf16* out, i64 rows, i64 size, int threads) {
#pragma omp parallel for num_threads(team(rows * size, threads)) schedule(static)
    for (i64 t = 0; t < rows; ++t) {
        const bf16* gate = gate_up + 2 * t * size;
        const bf16* up = gate + size;
        bf16* row = out + t * size;
#pragma omp simd
        for (i64 i = 0; i < size; ++i) row[i] = narrow(silu(widen(gate[i])) * widen(up[i]));
    }
}

// Softmax over E experts, and the K with the highest scores: highest first, the first of equals.
// Then the pairs of token and choice are sorted by expert, tokens in order: tokens_P, where each
// pair is in it (place_TK), and how many pairs each expert has. scratch_TE is overwritten.
void twinpool_route(float* scratch_TE, i64 rows, i64 experts, i64 top_k, int normalise,
                    float* weights_TK, i64* experts_TK, i64* tokens_P, i64* place_TK, i64* loads_E,
                    int threads) {
#pragma omp parallel for num_threads(team(rows * experts, threads)) schedule(static)
    for (i64 t = 0; t < rows; ++t) {
        float* row = scratch_TE + t * experts;
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
            weights_TK[t * top_k + k] = row[best];
            experts_TK[t * top_k + k] = best;
            row[best] = -1;
        }
        float whole = normalise ? kept : sum;
        for (i64 k = 0; k < top_k; ++k) weights_TK[t * top_k + k] /= whole;
    }
    i64 pairs = rows * top_k;
    std::memset(loads_E, 0, experts * sizeof(i64));
    for (i64 p = 0; p < pairs; ++p) ++loads_E[experts_TK[p]];
    i64 begin = 0;
    for (i64 e = 0; e < experts; ++e) {
        i64 load = loads_E[e];
        loads_E[e] = begin;
        begin += load;
    }
    for (i64 p = 0; p < pairs; ++p) {
        i64 place = loads_E[experts_TK[p]]++;
        place_TK[p] = place;
        tokens_P[place] = p / top_k;
    }
    for (i64 e = experts - 1; e > 0; --e) loads_E[e] -= loads_E[e - 1];
}

}  // extern "C"
