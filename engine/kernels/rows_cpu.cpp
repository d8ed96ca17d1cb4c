// What prefill does to rows between its matrix products, each in one pass over memory.
//
// Plain loops that the compiler vectorises; arithmetic is fp32, and what is stored in bf16 is
// rounded once. A row's result depends on that row alone: never on its neighbours, their number or
// the number of threads. Only indices are checked, where a wrong one would write elsewhere; shapes
// are engine/kernels/rows_cpu.py's to get right.

#include "rows.h"

using namespace twinpool;

namespace {

// A thread that sleeps costs up to 0.1 ms to wake: not for less than this many elements.
constexpr i64 kAlone = 1 << 17;

inline int team(i64 elements, int threads) { return elements < kAlone ? 1 : threads; }

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
// turned in place. `size` is even and at most kMaxRotated.
void twinpool_norm_rotate(bf16* x_TMH, const float* weight_MH, const float* cos_TH,
                          const float* sin_TH, i64 tokens, i64 heads, i64 stride, i64 size,
                          float floor2, int threads) {
#pragma omp parallel for num_threads(team(tokens * heads * size, threads)) schedule(static)
    for (i64 t = 0; t < tokens; ++t)
        for (i64 m = 0; m < heads; ++m)
            norm_rotate_head(x_TMH + t * stride + m * size, weight_MH + m * size,
                             cos_TH + t * size, sin_TH + t * size, size, floor2);
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
    for (i64 t = 0; t < rows; ++t)
        gate_row(gate_up + 2 * t * size, gate_up + (2 * t + 1) * size, out + t * size, size);
}

// Scores of each row with E experts, as a decoding step makes them.
void twinpool_scores(const bf16* x_TD, const float* router_ED, float* out_TE, i64 rows, i64 size,
                     i64 experts, int threads) {
#pragma omp parallel for num_threads(team(rows * size * experts, threads)) schedule(static)
    for (i64 t = 0; t < rows; ++t)
        score_row(x_TD + t * size, router_ED, out_TE + t * experts, experts, size);
}

// Softmax over E experts, and the K with the highest scores: highest first, the first of equals.
// Then the pairs of token and choice are sorted by expert, tokens in order: tokens_P, where each
// pair is in it (place_TK), and how many pairs each expert has. scratch_TE is overwritten.
void twinpool_route(float* scratch_TE, i64 rows, i64 experts, i64 top_k, int normalise,
                    float* weights_TK, i64* experts_TK, i64* tokens_P, i64* place_TK, i64* loads_E,
                    int threads) {
#pragma omp parallel for num_threads(team(rows * experts, threads)) schedule(static)
    for (i64 t = 0; t < rows; ++t)
        route_row(scratch_TE + t * experts, experts, top_k, normalise, weights_TK + t * top_k,
                  experts_TK + t * top_k);
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
