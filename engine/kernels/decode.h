// Attention of decoding sequences in bfloat16, for processors with AVX512-BF16: one new token each,
// over keys and values that are read once, where they lie in the cache's blocks. Owns no memory and
// checks nothing of what it is given.
//
// Legend: S sequences, G KV heads, R query heads that share a KV head, L keys, H head size. A row is
// a query head; the R rows of a KV head go over its keys and values together.
//
// A sequence is cut into parts of kPart keys, which are items of work; the partial results of a
// part are merged in their order, as in FlashDecoding (Dao et al. 2023). Where it is cut depends on
// its own length alone, so that its result depends on nothing else in the batch.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"

namespace twinpool {
namespace {

constexpr int kLanes = 16;        // fp32 numbers of a register
constexpr int kPair = 2 * kLanes; // bf16 numbers of a register
constexpr int kPart = 512;        // keys of an item of work
constexpr int kStrip = 64;        // keys whose values are near when the next rows go over them
constexpr int kRows = 4;          // rows of a register block
constexpr int kTogether = 16;     // rows whose scores there is room for
constexpr int kMaxHead = 256;
constexpr int kAhead = 32;        // keys: memory is asked for them this early
constexpr float kLog2e = 1.44269504f;

// Strides are in elements.
struct TwinpoolDecode {
  const Bf16* q;         // [S, >= G * R * H], scaled already
  Index q_stride;        // from sequence to sequence
  const Bf16* keys;      // [blocks, G, block_tokens, H]
  const Bf16* values;    // likewise
  Index block_tokens;
  const Index* tables;   // the sequences' blocks, one sequence after another
  const Index* begins;   // [S], where each one's are
  const Index* lengths;  // [S], keys of each, the new token's own included
  Index sequences, heads, kv_heads, head_size;
  Bf16* out;             // [S, G * R * H]
  float* partial;        // [R rows of all parts of sequences of several][H + 16]
};

Index parts_of(Index length) { return (length + kPart - 1) / kPart; }

// What is known of a row after a part: its output, not yet divided, the sum of its weights and its
// greatest score.
Index partial_size(Index head_size) { return head_size + kLanes; }

struct Item {
  Index sequence, kv_head, part;
  float* partial;  // of the part's R rows; null where it is the only part
};

struct Scratch {
  alignas(64) Bf16 q[kTogether * kMaxHead];
  alignas(64) float scores[kTogether * kPart];
  alignas(64) Bf16 weights[kTogether * kPart];
  alignas(64) float out[kTogether * kMaxHead];
  float top[kTogether], sum[kTogether];
  const Bf16* keys[kPart + kAhead];  // where each key lies; what follows is asked for, not read
};

// Asks memory for what is read soon: into the second cache, since the first one waits for too few
// lines at once (10 GB/s of a core instead of 17). Inline, or else the compiler drops it.
[[gnu::always_inline]] inline void ask(const Bf16* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// A register of a row, of which the last one may be half.
inline __m512i load(const Bf16* row, int c, __mmask16 last, int chunks) {
  const __mmask16 mask = c + 1 == chunks ? last : 0xffff;
  return _mm512_maskz_loadu_epi32(mask, row + c * kPair);
}

// ---- Scores ------------------------------------------------------------------------------------

// Lane by lane of 128 bits: the sums of a, of b, of c and of d.
inline __m512 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

// Sums of the lanes of 128 bits of a, then those of b, of c and of d.
inline __m512 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// Scores of R rows with 16 keys, to scores[r * kPart].
template <int R>
[[gnu::always_inline]] inline void score(const Bf16* q, const Bf16* const* keys, int chunks,
                                         __mmask16 last, float* scores) {
  __m512 four[R][4];
  UNROLL for (int i = 0; i < 4; ++i) {
    __m512 sum[R][4];
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
    for (int c = 0; c < chunks; ++c) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const __m512bh key = (__m512bh)load(keys[4 * i + j], c, last, chunks);
        ask(keys[4 * i + j + kAhead] + c * kPair);
        UNROLL for (int r = 0; r < R; ++r) {
          const __m512bh row = (__m512bh)_mm512_load_si512(q + r * kMaxHead + c * kPair);
          sum[r][j] = _mm512_dpbf16_ps(sum[r][j], key, row);
        }
      }
    }
    UNROLL for (int r = 0; r < R; ++r)
      four[r][i] = sum_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
  }
  UNROLL for (int r = 0; r < R; ++r)
    _mm512_store_ps(scores + r * kPart, sum_lanes(four[r][0], four[r][1], four[r][2], four[r][3]));
}

// ---- Weights -----------------------------------------------------------------------------------

// e^(score - top) to 3e-6 of it, and 1 for 0; see attention_cpu.cpp.
inline __m512 weights_of(__m512 score, __m512 top) {
  const __m512 x = _mm512_mul_ps(_mm512_sub_ps(score, top), _mm512_set1_ps(kLog2e));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(9.58285294e-3f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.59064262e-2f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.240240991f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.693124175f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// Makes weights of a row's scores; what is beyond `keys` gets a weight of 0.
void weigh(Scratch& s, int r, int keys) {
  float* scores = s.scores + r * kPart;
  const int width = (keys + kPair - 1) / kPair * kPair;
  // Far below all scores and yet finite, so that differences are no NaN.
  for (int i = keys; i < width; ++i) scores[i] = -1e38f;
  __m512 greatest = _mm512_load_ps(scores);
  for (int i = kLanes; i < width; i += kLanes) {
    greatest = _mm512_max_ps(greatest, _mm512_load_ps(scores + i));
  }
  // A NaN among the scores makes a NaN of the sum below, whatever becomes of it here.
  const float top = std::max(_mm512_reduce_max_ps(greatest), -1e36f);
  const __m512 tops = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps(), more = _mm512_setzero_ps();
  for (int i = 0; i < width; i += kPair) {
    const __m512 a = weights_of(_mm512_load_ps(scores + i), tops);
    const __m512 b = weights_of(_mm512_load_ps(scores + i + kLanes), tops);
    sum = _mm512_add_ps(sum, a);
    more = _mm512_add_ps(more, b);
    _mm512_store_si512(s.weights + r * kPart + i,
                       reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
  s.top[r] = top;
  s.sum[r] = _mm512_reduce_add_ps(_mm512_add_ps(sum, more));
}

// ---- Values ------------------------------------------------------------------------------------

// Adds to C registers of values of R rows' outputs those of `keys` keys, an even number. What is
// kept of a register of values are two of sums: of the lower four of every eight elements, and of
// the upper ones.
template <int R, int C>
[[gnu::always_inline]] inline void mix(const Bf16* weights, const Bf16* const* keys, Index away,
                                       int count, int first, int chunks, __mmask16 last,
                                       float* out) {
  __m512 sum[R][C][2];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int c = 0; c < C; ++c)
      UNROLL for (int h = 0; h < 2; ++h)
        sum[r][c][h] = _mm512_load_ps(out + r * kMaxHead + (first + c) * kPair + h * kLanes);
  for (int k = 0; k < count; k += 2) {
    const Bf16 *even = keys[k] + away, *odd = keys[k + 1] + away;
    __m512bh value[C][2];
    UNROLL for (int c = 0; c < C; ++c) {
      const __m512i a = load(even, first + c, last, chunks);
      const __m512i b = load(odd, first + c, last, chunks);
      ask(keys[k + kAhead] + away + (first + c) * kPair);
      ask(keys[k + 1 + kAhead] + away + (first + c) * kPair);
      value[c][0] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      value[c][1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
    UNROLL for (int r = 0; r < R; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, weights + r * kPart + k, sizeof pair);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
      UNROLL for (int c = 0; c < C; ++c)
        UNROLL for (int h = 0; h < 2; ++h)
          sum[r][c][h] = _mm512_dpbf16_ps(sum[r][c][h], value[c][h], weight);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int c = 0; c < C; ++c)
      UNROLL for (int h = 0; h < 2; ++h)
        _mm512_store_ps(out + r * kMaxHead + (first + c) * kPair + h * kLanes, sum[r][c][h]);
}

// ---- Items -------------------------------------------------------------------------------------

// R rows from `row` on of some that go over the keys together.
template <int R>
void score_rows(Scratch& s, int row, int from, int to, int chunks, __mmask16 last) {
  for (int k = from; k < to; k += kLanes) {
    const Bf16* q = s.q + row * kMaxHead;
    float* scores = s.scores + row * kPart + k;
    switch (chunks) {  // known where it is inlined
      case 2: score<R>(q, s.keys + k, 2, last, scores); break;
      case 4: score<R>(q, s.keys + k, 4, last, scores); break;
      default: score<R>(q, s.keys + k, chunks, last, scores);
    }
  }
}

template <int R>
void mix_rows(Scratch& s, int row, int from, int to, Index away, int chunks, __mmask16 last) {
  const Bf16* weights = s.weights + row * kPart + from;
  float* out = s.out + row * kMaxHead;
  int c = 0;
  for (; c + 1 < chunks; c += 2) {
    mix<R, 2>(weights, s.keys + from, away, to - from, c, chunks, last, out);
  }
  if (c < chunks) mix<R, 1>(weights, s.keys + from, away, to - from, c, chunks, last, out);
}

#define WITH_ROWS(count, f, ...)          \
  switch (count) {                        \
    case 1: f<1>(__VA_ARGS__); break;     \
    case 2: f<2>(__VA_ARGS__); break;     \
    case 3: f<3>(__VA_ARGS__); break;     \
    default: f<kRows>(__VA_ARGS__);       \
  }

// Where the part's keys lie. Those past the end repeat the last one: they are read to fill up a
// register or asked for in vain, and count nothing.
int locate(const TwinpoolDecode& p, const Item& item, Scratch& s) {
  const Index begin = item.part * kPart;
  const int count = static_cast<int>(std::min<Index>(kPart, p.lengths[item.sequence] - begin));
  const Index* table = p.tables + p.begins[item.sequence];
  for (int i = 0; i < count;) {
    const Index block = (begin + i) / p.block_tokens, place = (begin + i) % p.block_tokens;
    const Index run = (table[block] * p.kv_heads + item.kv_head) * p.block_tokens + place;
    const Bf16* at = p.keys + run * p.head_size;
    const int end = static_cast<int>(std::min<Index>(count, i + p.block_tokens - place));
    for (; i < end; ++i, at += p.head_size) s.keys[i] = at;
  }
  std::fill(s.keys + count, s.keys + kPart + kAhead, s.keys[count - 1]);
  return count;
}

// Sixteen elements of an output from the order in which they were summed.
inline __m512 in_order(const float* out, Index h) {
  const float* pair = out + h / kPair * kPair;
  const __m512i from = h % kPair ? _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15,
                                                     28, 29, 30, 31)
                                 : _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21,
                                                     22, 23);
  return _mm512_permutex2var_ps(_mm512_load_ps(pair), from, _mm512_load_ps(pair + kLanes));
}

inline void store(Bf16* out, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// Rows `first` to `first + rows` of the item's KV head.
void attend_rows(const TwinpoolDecode& p, const Item& item, Scratch& s, int keys, Index first,
                 int rows) {
  const Index size = p.head_size, shared = p.heads / p.kv_heads;
  const int chunks = static_cast<int>((size + kPair - 1) / kPair);
  const __mmask16 last = size % kPair ? 0x00ff : 0xffff;
  const Index head = item.kv_head * shared + first;
  const Bf16* q = p.q + item.sequence * p.q_stride + head * size;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < chunks; ++c) {
      _mm512_store_si512(s.q + r * kMaxHead + c * kPair, load(q + r * size, c, last, chunks));
    }
    std::memset(s.out + r * kMaxHead, 0, chunks * kPair * sizeof(float));
  }
  for (int k = 0; k < keys; k += kLanes) {
    for (int r = 0; r < rows; r += kRows) {
      WITH_ROWS(rows - r, score_rows, s, r, k, k + 1, chunks, last)
    }
  }
  const Index away = p.values - p.keys;
  for (int k = 0; k < kAhead; ++k) {
    for (int c = 0; c < chunks; ++c) ask(s.keys[k] + away + c * kPair);
  }
  for (int r = 0; r < rows; ++r) weigh(s, r, keys);
  for (int k = 0; k < keys; k += kStrip) {
    const int to = std::min(k + kStrip, keys + keys % 2);
    for (int r = 0; r < rows; r += kRows) {
      WITH_ROWS(rows - r, mix_rows, s, r, k, to, away, chunks, last)
    }
  }
  for (int r = 0; r < rows; ++r) {
    const float* out = s.out + r * kMaxHead;
    if (item.partial) {
      float* to = item.partial + (first + r) * partial_size(size);
      for (Index h = 0; h < size; h += kLanes) _mm512_storeu_ps(to + h, in_order(out, h));
      to[size] = s.sum[r];
      to[size + 1] = s.top[r];
    } else {
      const __m512 scale = _mm512_set1_ps(1.0f / s.sum[r]);
      Bf16* to = p.out + (item.sequence * p.heads + head + r) * size;
      for (Index h = 0; h < size; h += kLanes) {
        store(to + h, _mm512_mul_ps(scale, in_order(out, h)));
      }
    }
  }
}

void attend(const TwinpoolDecode& p, const Item& item, Scratch& s) {
  const int keys = locate(p, item, s);
  const Index shared = p.heads / p.kv_heads;
  for (Index first = 0; first < shared; first += kTogether) {
    const Index rows = std::min<Index>(kTogether, shared - first);
    attend_rows(p, item, s, keys, first, static_cast<int>(rows));
  }
}

// The row of a sequence from its partial ones, `apart` numbers from one part's to the next's.
void merge(const float* partial, Index apart, Index parts, Index size, Bf16* out) {
  float top = partial[size + 1];
  for (Index i = 1; i < parts; ++i) top = std::max(top, partial[i * apart + size + 1]);
  __m512 total[kMaxHead / kLanes];
  float sum = 0;
  for (Index i = 0; i < parts; ++i) {
    const float* part = partial + i * apart;
    const float scale = std::exp(part[size + 1] - top);
    sum += part[size] * scale;
    for (Index h = 0; h < size; h += kLanes) {
      const __m512 x = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(part + h));
      total[h / kLanes] = i ? _mm512_add_ps(total[h / kLanes], x) : x;
    }
  }
  const __m512 scale = _mm512_set1_ps(1.0f / sum);
  for (Index h = 0; h < size; h += kLanes) store(out + h, _mm512_mul_ps(scale, total[h / kLanes]));
}

// All items, those of long sequences first and of neighbouring heads together.
std::vector<Item> items_of(const TwinpoolDecode& p) {
  std::vector<Item> items;
  float* partial = p.partial;
  const Index rows = p.heads / p.kv_heads;
  for (Index i = 0; i < p.sequences; ++i) {
    const Index parts = parts_of(p.lengths[i]);
    for (Index part = 0; part < parts; ++part) {
      for (Index head = 0; head < p.kv_heads; ++head) {
        items.push_back({i, head, part, parts > 1 ? partial : nullptr});
        if (parts > 1) partial += rows * partial_size(p.head_size);
      }
    }
  }
  return items;
}

// Once all items are attended: merges the parts of which this is the first one, if it is.
void finish(const TwinpoolDecode& p, const Item& item) {
  if (item.part || !item.partial) return;
  const Index shared = p.heads / p.kv_heads, row = partial_size(p.head_size);
  for (Index r = 0; r < shared; ++r) {
    const Index head = item.kv_head * shared + r;
    merge(item.partial + r * row, p.heads * row, parts_of(p.lengths[item.sequence]), p.head_size,
          p.out + (item.sequence * p.heads + head) * p.head_size);
  }
}

}  // namespace
}  // namespace twinpool

