// The experts of a sparse layer in one parallel region, for processors with AVX512-BF16.
//
// A product of its own for each expert wakes the other threads hundreds of times a layer, and
// their gathered inputs, gates and outputs pass through memory in between. Here a thread takes up
// to kBlock rows of one expert, all the way through; rows are read where they lie. A row's result
// depends on that row alone: sums are fp32 and in the order of the inner dimension.
//
// Weights are packed in panels of 64 columns: [panel][pair of inner elements][column][2], and the
// panels of gate and up hold 32 columns of each. Checks nothing: engine/kernels/experts_cpu.py does.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;
using i64 = int64_t;

constexpr int kRows = 6;      // of the register block: 24 sums of 16 columns
constexpr i64 kBlock = 96;    // rows that share a panel while it is near
constexpr i64 kPanel = 64;    // columns
constexpr i64 kHalf = 32;     // of them, gate or up

// Sums are in registers only where every loop over them is gone.
#define UNROLL _Pragma("GCC unroll 8")

struct Block {
    i64 expert, begin, rows;
};

// e^x by 2^n * e^r with |r| <= ln(2) / 2 and Taylor's series of e^r.
inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 y = _mm512_set1_ps(1.0f / 720);
    for (float each : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(each));
    return _mm512_scalef_ps(y, n);
}

inline __m512 gated(__m512 gate, __m512 up) {
    __m512 below = _mm512_add_ps(
        _mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
    return _mm512_mul_ps(_mm512_div_ps(gate, below), up);
}

inline void store(bf16* out, __m512 x, __mmask16 columns) {
    _mm256_mask_storeu_epi16(out, columns, (__m256i)_mm512_cvtneps_pbh(x));
}

// R rows times a panel.
template <int R>
inline void multiply(const bf16* const* rows, const bf16* panel, i64 pairs, __m512 (&sum)[R][4]) {
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
    for (i64 k = 0; k < pairs; ++k) {
        __m512bh column[4];
        UNROLL for (int j = 0; j < 4; ++j)
            column[j] = (__m512bh)_mm512_loadu_si512(panel + (k * 4 + j) * 32);
        UNROLL for (int r = 0; r < R; ++r) {
            int32_t pair;
            std::memcpy(&pair, rows[r] + 2 * k, sizeof pair);
            __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], left, column[j]);
        }
    }
}

// Columns `column` on of silu(gate) * up.
template <int R>
void gate_up(const bf16* const* rows, const bf16* panel, i64 pairs, bf16* const* out, i64 column) {
    __m512 sum[R][4];
    multiply<R>(rows, panel, pairs, sum);
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int j = 0; j < 2; ++j)
            store(out[r] + column + 16 * j, gated(sum[r][j], sum[r][j + 2]), 0xffff);
}

// Columns `column` on of the product, of which there are `size` in all.
template <int R>
void down(const bf16* const* rows, const bf16* panel, i64 pairs, bf16* const* out, i64 column,
          i64 size) {
    __m512 sum[R][4];
    multiply<R>(rows, panel, pairs, sum);
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int j = 0; j < 4; ++j) {
            i64 left = size - column - 16 * j;
            __mmask16 columns = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            store(out[r] + column + 16 * j, sum[r][j], columns);
        }
}

// Calls f<R> for as many rows as there are.
#define WITH_ROWS(count, f, ...)          \
    switch (count) {                      \
        case 1: f<1>(__VA_ARGS__); break; \
        case 2: f<2>(__VA_ARGS__); break; \
        case 3: f<3>(__VA_ARGS__); break; \
        case 4: f<4>(__VA_ARGS__); break; \
        case 5: f<5>(__VA_ARGS__); break; \
        default: f<kRows>(__VA_ARGS__);   \
    }

struct Sizes {
    i64 hidden, inner;

    i64 inner_panels() const { return (inner + kHalf - 1) / kHalf; }
    i64 hidden_panels() const { return (hidden + kPanel - 1) / kPanel; }
    i64 padded_inner() const { return inner_panels() * kHalf; }
};

// One block: x's rows `tokens` to y's rows, those that `places` names or else one after another, by
// way of `between`.
void through(const bf16* x_TD, const i64* tokens, const i64* places, i64 rows,
             const bf16* gate_up_panels, const bf16* down_panels, Sizes sizes, bf16* between,
             bf16* y) {
    const bf16* in[kBlock];
    bf16 *middle[kBlock], *out[kBlock];
    for (i64 r = 0; r < rows; ++r) {
        in[r] = x_TD + tokens[r] * sizes.hidden;
        middle[r] = between + r * sizes.padded_inner();
        out[r] = y + (places ? places[r] : r) * sizes.hidden;
    }
    for (i64 p = 0; p < sizes.inner_panels(); ++p) {
        const bf16* panel = gate_up_panels + p * kPanel * sizes.hidden;
        for (i64 r = 0; r < rows; r += kRows)
            WITH_ROWS(rows - r, gate_up, in + r, panel, sizes.hidden / 2, middle + r, p * kHalf)
    }
    for (i64 p = 0; p < sizes.hidden_panels(); ++p) {
        const bf16* panel = down_panels + p * kPanel * sizes.inner;
        for (i64 r = 0; r < rows; r += kRows)
            WITH_ROWS(rows - r, down, middle + r, panel, sizes.inner / 2, out + r, p * kPanel,
                      sizes.hidden)
    }
}

// Each expert's rows in blocks of like size.
std::vector<Block> blocks(const i64* loads_E, i64 experts) {
    std::vector<Block> found;
    i64 begin = 0;
    for (i64 e = 0; e < experts; ++e) {
        i64 count = (loads_E[e] + kBlock - 1) / kBlock;
        i64 each = count ? (loads_E[e] + count - 1) / count : 0;
        each = (each + kRows - 1) / kRows * kRows;
        i64 end = begin + loads_E[e];
        for (; begin < end; begin += each)
            found.push_back({e, begin, each < end - begin ? each : end - begin});
        begin = end;
    }
    return found;
}

// The weighted sum of a token's rows, in the order of its choices.
void combine(const bf16* y_PD, const i64* place_K, const float* weights_K, i64 top_k, i64 size,
             float* out) {
    for (i64 d = 0; d < size; d += 16) {
        __mmask16 columns = size - d >= 16 ? 0xffff : (1 << (size - d)) - 1;
        __m512 sum = _mm512_setzero_ps();
        for (i64 k = 0; k < top_k; ++k) {
            __m256i y = _mm256_maskz_loadu_epi16(columns, y_PD + place_K[k] * size + d);
            __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
            sum = _mm512_fmadd_ps(_mm512_set1_ps(weights_K[k]), wide, sum);
        }
        _mm512_mask_storeu_ps(out + d, columns, sum);
    }
}

}  // namespace

extern "C" void twinpool_experts(const bf16* x_TD, const bf16* gate_up_panels,
                                 const bf16* down_panels, const i64* loads_E, const i64* tokens_P,
                                 const i64* place_TK, const float* weights_TK, bf16* y_PD,
                                 float* out_TD, i64 tokens, i64 experts, i64 top_k, i64 hidden,
                                 i64 inner, int threads) {
    Sizes sizes{hidden, inner};
    i64 gate_up_size = sizes.inner_panels() * kPanel * hidden;
    i64 down_size = sizes.hidden_panels() * kPanel * inner;
    std::vector<Block> work = blocks(loads_E, experts);
#pragma omp parallel num_threads(threads)
    {
        std::vector<bf16> between(kBlock * sizes.padded_inner());
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < work.size(); ++i) {
            Block b = work[i];
            through(x_TD, tokens_P + b.begin, nullptr, b.rows,
                    gate_up_panels + b.expert * gate_up_size, down_panels + b.expert * down_size,
                    sizes, between.data(), y_PD + b.begin * hidden);
        }
#pragma omp for schedule(static)
        for (i64 t = 0; t < tokens; ++t)
            combine(y_PD, place_TK + t * top_k, weights_TK + t * top_k, top_k, hidden,
                    out_TD + t * hidden);
    }
}

// What each pair's expert makes of its token, in the order of the pairs; zeros for expert -1. Returns
// how many pairs name an expert that there is not; those get zeros too.
extern "C" i64 twinpool_expert_pairs(const bf16* x_TD, const bf16* gate_up_panels,
                                     const bf16* down_panels, const i64* tokens_P,
                                     const i64* experts_P, bf16* y_PD, i64 pairs, i64 experts,
                                     i64 hidden, i64 inner, int threads) {
    Sizes sizes{hidden, inner};
    i64 gate_up_size = sizes.inner_panels() * kPanel * hidden;
    i64 down_size = sizes.hidden_panels() * kPanel * inner;
    std::vector<i64> loads_E(experts), next_E(experts), sorted_P(pairs), places_P(pairs);
    i64 wrong = 0;
    for (i64 p = 0; p < pairs; ++p) {
        i64 e = experts_P[p];
        if (e >= 0 && e < experts) {
            ++loads_E[e];
        } else {
            std::memset(y_PD + p * hidden, 0, hidden * sizeof(bf16));
            wrong += e != -1;
        }
    }
    for (i64 e = 1; e < experts; ++e) next_E[e] = next_E[e - 1] + loads_E[e - 1];
    for (i64 p = 0; p < pairs; ++p) {
        i64 e = experts_P[p];
        if (e < 0 || e >= experts) continue;
        i64 at = next_E[e]++;
        sorted_P[at] = tokens_P[p];
        places_P[at] = p;
    }
    std::vector<Block> work = blocks(loads_E.data(), experts);
#pragma omp parallel num_threads(threads)
    {
        std::vector<bf16> between(kBlock * sizes.padded_inner());
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < work.size(); ++i) {
            Block b = work[i];
            through(x_TD, sorted_P.data() + b.begin, places_P.data() + b.begin, b.rows,
                    gate_up_panels + b.expert * gate_up_size, down_panels + b.expert * down_size,
                    sizes, between.data(), y_PD);
        }
    }
    return wrong;
}
