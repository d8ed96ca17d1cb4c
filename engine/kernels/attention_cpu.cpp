// Causal attention in bfloat16 for processors with AVX512-BF16. Owns no memory and checks nothing
// of what it is given: engine/kernels/attention_native.py is its only caller.
//
// Legend: T tokens, R query heads that share a KV head, L keys, H head size. A row is a query head
// of a token; the rows of a KV head are those of its R query heads, token by token.
//
// The keys that a token sees are a range of keys, and neither end of it moves back from one token
// to the next. Scores are made block by block of keys and never leave the innermost cache; what is
// kept of a row is its greatest score, the sum of its weights and its output, in fp32. See
// FlashAttention-2, arXiv 2307.08691, section 3.1.
//
// K and V are first brought into the order in which vdpbf16ps wants them: it multiplies pairs of
// neighbours, so that K lies as [L / 64][H / 2][64][2] and V as [L / 2][H][2].
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {

using Bf16 = std::uint16_t;
using Index = std::int64_t;

constexpr int kLanes = 16;             // fp32 numbers of a register
constexpr int kVectors = 4;            // registers side by side in a product
constexpr int kRows = 6;               // rows of a product: 24 sums, 4 operands, 1 broadcast
constexpr int kPanel = kVectors * kLanes;
constexpr int kBlock = 256;            // keys between two looks at a row's greatest score
constexpr int kTile = 16 * kRows;      // rows of a work item
constexpr int kMaxHead = 256;

// Far below all scores and yet finite, so that differences are no NaN: a hidden score is below
// what counts as the greatest score of a row that has seen nothing.
constexpr float kHidden = -1e38f;
constexpr float kLowest = -1e36f;
constexpr float kLog2e = 1.44269504f;

}  // namespace

extern "C" {

// Tensors are of bf16 and strides in elements; heads of a token and elements of a head are dense.
struct TwinpoolAttention {
  const Bf16* q;        // scaled already
  Index q_stride;       // from token to token
  Index tokens, heads, kv_heads, head_size;
  // Keys before `cached` are in runs of `run_tokens` tokens of one head, found by their indices
  // [2 (K, V), kv_heads, runs_per_head]; those from there on are at k and v.
  const Bf16* runs;
  const Index* run_indices;
  Index runs_per_head, run_tokens, cached;
  const Bf16* k;
  const Bf16* v;
  Index kv_stride;
  // Token t sees the keys from low[t] to high[t]; where there are none of these, all up to its own.
  const Index* low;
  const Index* high;
  void* out;            // dense; bf16 where there is no lse, else fp32
  float* lse;
};

}

namespace {

Index up(Index number, Index multiple) { return (number + multiple - 1) / multiple * multiple; }

// A KV head of a piece.
struct Head {
  const TwinpoolAttention& p;
  Index number;
  Index begin, keys;  // of the keys that anybody sees
  Bf16* k;            // packed
  Bf16* v;
  Index first_chunk = 0, first_tile = 0;  // items of work are counted through all heads

  Index low(Index token) const { return p.low ? p.low[token] - begin : 0; }
  Index high(Index token) const { return p.high ? p.high[token] - begin : p.cached + token + 1; }
  Index rows() const { return p.tokens * (p.heads / p.kv_heads); }
  Index chunks() const { return up(keys, kBlock) / kBlock; }
  Index tiles() const { return up(rows(), kTile) / kTile; }

  const Bf16* source(int which, Index key) const {
    if (key >= p.cached) {
      return (which ? p.v : p.k) + (key - p.cached) * p.kv_stride + number * p.head_size;
    }
    const Index run = (which * p.kv_heads + number) * p.runs_per_head + key / p.run_tokens;
    return p.runs + (p.run_indices[run] * p.run_tokens + key % p.run_tokens) * p.head_size;
  }
};

Index packed_size(Index keys, Index head_size) { return up(keys, kPanel) * head_size; }

// Heads that are packed at once, and what has been done for them.
struct Round {
  std::vector<Head> heads;
  Index chunks = 0, tiles = 0;
  std::atomic<Index> next{0};
  std::atomic<Index> chunks_done{0};

  void add(Head head) {
    head.first_chunk = chunks;
    head.first_tile = tiles;
    chunks += head.chunks();
    tiles += head.tiles();
    heads.push_back(head);
  }

  // The head whose item of work this is.
  const Head& of(Index Head::*first, Index item) const {
    const auto after = std::upper_bound(
        heads.begin(), heads.end(), item,
        [first](Index value, const Head& head) { return value < head.*first; });
    return *std::prev(after);
  }
};

// ---- Packing -----------------------------------------------------------------------------------

// Transposes 16 x 16 pairs of elements.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Keys from `from` (a multiple of kPanel) to `to`; what is missing of the last panel is zero.
void pack_keys(const Head& head, Index from, Index to) {
  const Index pairs = head.p.head_size / 2;
  for (Index key = from; key < up(to, kPanel); key += kLanes) {
    const Bf16* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = key + i < to ? head.source(0, head.begin + key + i) : nullptr;
    }
    Bf16* into = head.k + key / kPanel * kPanel * 2 * pairs + key % kPanel * 2;
    for (Index pair = 0; pair < pairs; pair += kLanes) {
      const int count = static_cast<int>(std::min<Index>(kLanes, pairs - pair));
      const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
      __m512i r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        r[i] = _mm512_setzero_si512();
        if (rows[i]) r[i] = _mm512_maskz_loadu_epi32(mask, rows[i] + 2 * pair);
      }
      transpose(r);
      for (int i = 0; i < count; ++i) {
        _mm512_store_si512(into + (pair + i) * 2 * kPanel, r[i]);
      }
    }
  }
}

void pack_values(const Head& head, Index from, Index to) {
  const Index size = head.p.head_size;
  for (Index key = from; key < to; key += 2) {
    const Bf16* even = head.source(1, head.begin + key);
    const Bf16* odd = key + 1 < to ? head.source(1, head.begin + key + 1) : nullptr;
    Bf16* into = head.v + key * size;
    for (Index i = 0; i < size; i += kLanes) {
      const auto half = [i](const Bf16* row) {
        return row ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i))
                   : _mm256_setzero_si256();
      };
      const __m512i low = _mm512_cvtepu16_epi32(half(even));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half(odd)), 16);
      _mm512_store_si512(into + 2 * i, _mm512_or_si512(low, high));
    }
  }
}

// ---- Attention ---------------------------------------------------------------------------------

// Some rows of one KV head, and what is known of them so far.
struct Tile {
  alignas(64) Bf16 q[kTile * kMaxHead];
  alignas(64) float out[kTile * kMaxHead];
  alignas(64) float scores[kRows * kBlock];
  alignas(64) Bf16 weights[kRows * kBlock];
  float scale[kRows];
  float top[kTile];     // greatest score
  float sum[kTile];     // of exp(score - top)
  Index low[kTile], high[kTile];
};

inline __m512bh pair_of(const Bf16* at) {
  std::int32_t pair;
  std::memcpy(&pair, at, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

inline __m512bh pairs_at(const Bf16* at) {
  return reinterpret_cast<__m512bh>(_mm512_load_si512(at));
}

template <typename Element>
struct Matrix {
  Element* at;
  Index stride;  // from row to row
};

// out = out * scale + a by b, for kRows rows of a and kColumns registers of b, whose rows are pairs
// of `inner`; without a scale out need not be anything before.
template <int kColumns>
[[gnu::always_inline]] inline void multiply(Matrix<const Bf16> a, Matrix<const Bf16> b,
                                            Index inner, Matrix<float> out, const float* scale) {
  __m512 sums[kRows][kColumns];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      sums[r][c] = scale ? _mm512_mul_ps(_mm512_set1_ps(scale[r]),
                                         _mm512_load_ps(out.at + r * out.stride + c * kLanes))
                         : _mm512_setzero_ps();
    }
  }
  for (Index i = 0; i < inner; i += 2) {
    __m512bh right[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      right[c] = pairs_at(b.at + i / 2 * b.stride + c * 2 * kLanes);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = pair_of(a.at + r * a.stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], right[c], left);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      _mm512_store_ps(out.at + r * out.stride + c * kLanes, sums[r][c]);
    }
  }
}

// As above, for the first of `columns` registers; returns for how many. Inline, so that strides
// which are constant where it is called are so here: 3% of all time.
[[gnu::always_inline]] inline Index multiply_some(Index columns, Matrix<const Bf16> a,
                                                  Matrix<const Bf16> b, Index inner,
                                                  Matrix<float> out, const float* scale) {
  switch (columns) {
    case 1: multiply<1>(a, b, inner, out, scale); return 1;
    case 2: multiply<2>(a, b, inner, out, scale); return 2;
    case 3: multiply<3>(a, b, inner, out, scale); return 3;
    default: multiply<kVectors>(a, b, inner, out, scale); return kVectors;
  }
}

// e^(score - top) to 3e-6 of it, and 1 for 0; what becomes of it is rounded to 8 bits. Subtracted
// first: log2(e) times a great score and its own rounding may be far apart. The polynomial is 2^x
// with the smallest greatest relative error over [-0.5, 0.5].
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

// Hides the scores of keys outside of a row's range; scores[0] is that of key `from`.
inline void hide(float* scores, Index from, int width, Index low, Index high) {
  const __m512i lanes =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto near = [width](Index key) {
    return _mm512_set1_epi32(static_cast<int>(std::clamp<Index>(key, 0, width)));
  };
  const __m512i first = near(low - from), last = near(high - from);
  for (int i = 0; i < width; i += kLanes) {
    const __m512i key = _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
    const __mmask16 seen =
        _mm512_cmpge_epi32_mask(key, first) & _mm512_cmplt_epi32_mask(key, last);
    const __m512 score = _mm512_load_ps(scores + i);
    _mm512_store_ps(scores + i, _mm512_mask_blend_ps(seen, _mm512_set1_ps(kHidden), score));
  }
}

// Makes weights of one row's scores; `width` is a multiple of two registers.
inline void weigh(Tile& tile, int r, int row, int width) {
  const float* scores = tile.scores + r * kBlock;
  Bf16* weights = tile.weights + r * kBlock;
  __m512 greatest = _mm512_load_ps(scores), other = _mm512_load_ps(scores + kLanes);
  for (int i = 2 * kLanes; i < width; i += 2 * kLanes) {
    greatest = _mm512_max_ps(greatest, _mm512_load_ps(scores + i));
    other = _mm512_max_ps(other, _mm512_load_ps(scores + i + kLanes));
  }
  const float before = tile.top[row];
  const float top = std::max(before, _mm512_reduce_max_ps(_mm512_max_ps(greatest, other)));
  const __m512 top_of_all = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps(), more = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 2 * kLanes) {
    const __m512 a = weights_of(_mm512_load_ps(scores + i), top_of_all);
    const __m512 b = weights_of(_mm512_load_ps(scores + i + kLanes), top_of_all);
    sum = _mm512_add_ps(sum, a);
    more = _mm512_add_ps(more, b);
    _mm512_store_si512(weights + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
  const float scale = std::exp(before - top);
  tile.scale[r] = scale;
  tile.top[row] = top;
  tile.sum[row] = tile.sum[row] * scale + _mm512_reduce_add_ps(_mm512_add_ps(sum, more));
}

// kRows rows of a tile from `row` on, and the keys from `from`, a multiple of kPanel, to `to`.
void attend_rows(Tile& tile, int row, const Head& head, Index from, Index to) {
  const Index size = head.p.head_size, keys = to - from;
  for (Index i = 0; i < keys; i += kPanel) {
    const Bf16* panel = head.k + (from + i) * size;
    multiply_some(up(keys - i, kLanes) / kLanes, {tile.q + row * size, size}, {panel, 2 * kPanel},
                  size, {tile.scores + i, kBlock}, nullptr);
  }
  const int width = static_cast<int>(up(keys, 2 * kLanes));
  const bool hidden = from < tile.low[row + kRows - 1] || from + width > tile.high[row];
  for (int r = 0; r < kRows; ++r) {
    if (hidden) {
      hide(tile.scores + r * kBlock, from, width, tile.low[row + r], tile.high[row + r]);
    }
    weigh(tile, r, row + r, width);
  }
  const Index columns = size / kLanes;
  for (Index c = 0; c < columns;) {
    c += multiply_some(columns - c, {tile.weights, kBlock},
                       {head.v + from * size + c * 2 * kLanes, 2 * size}, keys,
                       {tile.out + row * size + c * kLanes, size}, tile.scale);
  }
}

// Rows beyond the last one are zero, and see what the last one sees.
void load(Tile& tile, const Head& head, Index first, int rows) {
  const TwinpoolAttention& p = head.p;
  const Index shared = p.heads / p.kv_heads, size = p.head_size;
  const int filled = static_cast<int>(up(rows, kRows));
  for (int i = 0; i < filled; ++i) {
    const Index row = first + std::min(i, rows - 1), token = row / shared;
    tile.low[i] = head.low(token);
    tile.high[i] = head.high(token);
    tile.top[i] = kLowest;
    tile.sum[i] = 0;
    const Index query_head = head.number * shared + row % shared;
    const Bf16* q = p.q + token * p.q_stride + query_head * size;
    if (i < rows) {
      std::memcpy(tile.q + i * size, q, size * sizeof(Bf16));
    } else {
      std::memset(tile.q + i * size, 0, size * sizeof(Bf16));
    }
  }
  std::memset(tile.out, 0, filled * size * sizeof(float));
}

void store(const Tile& tile, const Head& head, Index first, int rows) {
  const TwinpoolAttention& p = head.p;
  const Index shared = p.heads / p.kv_heads, size = p.head_size;
  for (int i = 0; i < rows; ++i) {
    const Index token = (first + i) / shared;
    const Index at = token * p.heads + head.number * shared + (first + i) % shared;
    const bool blind = tile.low[i] >= tile.high[i];
    const __m512 scale = _mm512_set1_ps(blind ? 0.0f : 1.0f / tile.sum[i]);
    if (p.lse) {
      p.lse[at] = blind ? -std::numeric_limits<float>::infinity()
                        : tile.top[i] + std::log(tile.sum[i]);
    }
    for (Index h = 0; h < size; h += kLanes) {
      const __m512 out = _mm512_mul_ps(scale, _mm512_load_ps(tile.out + i * size + h));
      if (p.lse) {
        _mm512_storeu_ps(static_cast<float*>(p.out) + at * size + h, out);
      } else {
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(static_cast<Bf16*>(p.out) + at * size + h),
            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(out)));
      }
    }
  }
}

void attend_tile(Tile& tile, const Head& head, Index number) {
  const Index first = number * kTile;
  const int rows = static_cast<int>(std::min<Index>(kTile, head.rows() - first));
  load(tile, head, first, rows);
  for (Index begin = tile.low[0] / kBlock * kBlock; begin < tile.high[rows - 1]; begin += kBlock) {
    for (int row = 0; row < rows; row += kRows) {
      const Index from = std::max(begin, tile.low[row] / kPanel * kPanel);
      const Index to = std::min(begin + kBlock, tile.high[row + kRows - 1]);
      if (from < to) attend_rows(tile, row, head, from, to);
    }
  }
  store(tile, head, first, rows);
}

// ---- Sharing out -------------------------------------------------------------------------------

// Takes one item of work after another until there are none: first K and V are packed, then tiles
// are attended, of each head those with the most keys first.
void work(Round& round) {
  const Index all = round.chunks + round.tiles;
  Tile tile;
  for (Index item; (item = round.next.fetch_add(1, std::memory_order_relaxed)) < all;) {
    if (item < round.chunks) {
      const Head& head = round.of(&Head::first_chunk, item);
      const Index from = (item - head.first_chunk) * kBlock;
      const Index to = std::min(from + kBlock, head.keys);
      pack_keys(head, from, to);
      pack_values(head, from, to);
      round.chunks_done.fetch_add(1, std::memory_order_release);
      continue;
    }
    // What is missing is being packed by another thread right now.
    for (int tries = 0; round.chunks_done.load(std::memory_order_acquire) < round.chunks; ++tries) {
      if (tries < 1000) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
    const Index tile_number = item - round.chunks;
    const Head& head = round.of(&Head::first_tile, tile_number);
    attend_tile(tile, head, head.tiles() - 1 - (tile_number - head.first_tile));
  }
}

void run(Round& round, int threads) {
#pragma omp parallel num_threads(threads)
  work(round);
}

}  // namespace

extern "C" {

// Elements that a KV head takes of the room for packed ones.
Index twinpool_attention_packed(Index keys, Index head_size) {
  return 2 * packed_size(keys, head_size);
}

// Attends all pieces. `packed`, aligned to 64 bytes, has room for some of the heads, and at least
// for each one alone.
void twinpool_attend(const TwinpoolAttention* pieces, Index count, Bf16* packed, Index room,
                     int threads) {
  auto round = std::make_unique<Round>();
  Index used = 0;
  for (Index i = 0; i < count; ++i) {
    const TwinpoolAttention& p = pieces[i];
    const Index begin = p.low ? p.low[0] : 0;
    const Index keys = (p.high ? p.high[p.tokens - 1] : p.cached + p.tokens) - begin;
    const Index size = packed_size(keys, p.head_size);
    for (Index head = 0; head < p.kv_heads; ++head) {
      if (used + 2 * size > room) {
        run(*round, threads);
        round = std::make_unique<Round>();
        used = 0;
      }
      round->add({p, head, begin, keys, packed + used, packed + used + size});
      used += 2 * size;
    }
  }
  run(*round, threads);
}

}  // extern "C"
