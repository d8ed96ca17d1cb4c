// Rows by panels of which one half of the columns is gate and the other up, in bf16 for processors
// with AVX512-BF16; see product.h.
#pragma once

#include "product.h"

namespace twinpool {

// e^x by 2^n * e^r with |r| <= ln(2) / 2 and Taylor's series of e^r.
inline __m512 exponential_of(__m512 x) {
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
    _mm512_set1_ps(1.0f), exponential_of(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
  return _mm512_mul_ps(_mm512_div_ps(gate, below), up);
}

// 32 columns of silu(gate) * up of R rows, to out[r] each.
template <int R>
void gated_by_panel(const Bf16* const* rows, const Bf16* panel, Index inner, Bf16* const* out) {
  __m512 sum[R][kSide];
  multiply<R>(rows, panel, inner, sum);
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int j = 0; j < 2; ++j)
      store(out[r] + 16 * j, gated(sum[r][j], sum[r][j + 2]), 16);
}

}  // namespace twinpool
