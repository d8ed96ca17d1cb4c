// Rows times a weight in panels, in bf16 with sums in fp32, for processors with AVX512-BF16.
//
// A panel is 64 columns of the weight: [pair of inner elements][column][2], and zeros for columns
// that there are not. A sum goes in the order of the inner dimension, whatever rows there are:
// a row's result is its own.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace twinpool {

using Bf16 = std::uint16_t;
using Index = std::int64_t;

constexpr Index kPanel = 64;  // columns
constexpr int kSide = 4;      // registers of a panel's columns
constexpr int kMost = 6;      // rows of a register block: 24 sums

// Sums are in registers only where every loop over them is gone.
#define UNROLL _Pragma("GCC unroll 16")

// R rows times a panel of `inner` elements.
template <int R>
[[gnu::always_inline]] inline void multiply(const Bf16* const* rows, const Bf16* panel, Index inner,
                                            __m512 (&sum)[R][kSide]) {
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int j = 0; j < kSide; ++j) sum[r][j] = _mm512_setzero_ps();
  for (Index k = 0; k < inner; k += 2) {
    __m512bh column[kSide];
    UNROLL for (int j = 0; j < kSide; ++j)
      column[j] = (__m512bh)_mm512_loadu_si512(panel + k * kPanel + j * 32);
    UNROLL for (int r = 0; r < R; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, rows[r] + k, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
      UNROLL for (int j = 0; j < kSide; ++j)
        sum[r][j] = _mm512_dpbf16_ps(sum[r][j], left, column[j]);
    }
  }
}

inline __mmask16 first_of_16(Index columns) {
  return columns >= 16 ? 0xffff : columns > 0 ? (1 << columns) - 1 : 0;
}

inline void store(Bf16* out, __m512 x, Index columns) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  _mm256_mask_storeu_epi16(out, first_of_16(columns), rounded);
}

// In fp32 they are the same numbers, rounded likewise.
inline void store(float* out, __m512 x, Index columns) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  const __m512i widened = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
  _mm512_mask_storeu_ps(out, first_of_16(columns), _mm512_castsi512_ps(widened));
}

// Calls f<R> for as many rows as there are, up to kMost.
#define WITH_PRODUCT_ROWS(count, f, ...)  \
  switch (count) {                        \
    case 1: f<1>(__VA_ARGS__); break;     \
    case 2: f<2>(__VA_ARGS__); break;     \
    case 3: f<3>(__VA_ARGS__); break;     \
    case 4: f<4>(__VA_ARGS__); break;     \
    case 5: f<5>(__VA_ARGS__); break;     \
    default: f<kMost>(__VA_ARGS__);       \
  }

// The first `columns` of R rows by a panel, to out[r] each.
template <int R, typename Out>
void rows_by_panel(const Bf16* const* rows, const Bf16* panel, Index inner, Out* const* out,
                   Index columns) {
  __m512 sum[R][kSide];
  multiply<R>(rows, panel, inner, sum);
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int j = 0; j < kSide; ++j) store(out[r] + 16 * j, sum[r][j], columns - 16 * j);
}

// x [rows, inner] by a weight of `outputs` columns, its panel number `panel` alone, to
// out [rows, stride].
template <typename Out>
inline void by_panel(const Bf16* x, Index rows, const Bf16* panels, Index panel, Index inner,
                     Out* out, Index outputs, Index stride) {
  const Bf16* at = panels + panel * kPanel * inner;
  const Index columns = outputs - panel * kPanel;
  out += panel * kPanel;
  for (; rows > 0; rows -= kMost, x += kMost * inner, out += kMost * stride) {
    const Bf16* from[kMost];
    Out* to[kMost];
    for (int r = 0; r < kMost && r < rows; ++r) {
      from[r] = x + r * inner;
      to[r] = out + r * stride;
    }
    WITH_PRODUCT_ROWS(rows, rows_by_panel, from, at, inner, to, columns)
  }
}

inline Index panels_of(Index outputs) { return (outputs + kPanel - 1) / kPanel; }

}  // namespace twinpool
