// All layers of a decoding step in one parallel region, for processors with AVX512-BF16.
//
// A step of few rows is hundreds of small pieces of work. Each piece that is a call of its own
// wakes threads that slept, which takes as long as many of the pieces do; here the threads stay
// together from the first layer to the last. A step is a sequence of phases, a phase some items of
// work. Threads take items until there are none, and the next phase opens when the last item is
// done: a thread that the machine has given to somebody else holds nobody up unless it has an item.
// What is computed, and in which order it is summed, is what the single kernels compute: product.h,
// rows.h, decode.h and experts_cpu.cpp. Checks nothing: engine/kernels/step_cpu.py does.
//
// Legend: T tokens, D hidden size, N query heads, G KV heads, H head size, E experts, K experts of
// a token, P = T * K pairs, I inner size.
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <vector>

#include "decode.h"
#include "gated.h"
#include "product.h"
#include "rows.h"

using namespace twinpool;

extern "C" {

struct TwinpoolWeight {
  const Bf16* panels;
  Index inner, outputs;
};

struct TwinpoolLayer {
  const float* attention_norm_D;
  TwinpoolWeight qkv[2];        // side by side; the second may have no outputs
  const Bf16* qkv_bias;         // of all their outputs; null where there is none
  const float* qk_norm_MH;      // M = N + G
  TwinpoolWeight out;
  const float* mlp_norm_D;
  TwinpoolWeight gate_up, down; // of a dense layer
  const float* router_ED;       // null for a dense layer
  const Bf16* expert_gate_up;   // panels of 32 columns of gate and 32 of up
  const Bf16* expert_down;
  Bf16* cells;                  // of the cache: [rows, H]
};

struct TwinpoolStep {
  const TwinpoolLayer* layers;
  Index count;
  float* x_TD;                  // the residual stream, in and out
  Index tokens, hidden;
  float norm_floor2, head_floor2;
  const float* cos_TH;
  const float* sin_TH;
  const Index* slots_TX;        // X = 2G
  TwinpoolDecode attention;     // but for keys and values
  Index values_after;           // elements from a layer's keys to its values
  Index experts, top_k, inner;  // of sparse layers
  Index normalise;
  const float* end_norm_D;      // null where the stream is what is wanted
  TwinpoolWeight head;
  const Index* wanted_T;        // the row of each of the logits
  float* head_logits_TV;
  // Room.
  Bf16* normed_TD;
  Bf16* qkv_TNH;                // what attention has as q
  Bf16* wide;                   // [T, 2I] of a dense layer
  Bf16* between;                // [T, I] of a dense one, [P, I] of a sparse one
  Bf16* more_TD;                // to be added to x: of attention or of a dense layer
  float* logits_TE;
  Bf16* y_PD;
  double* seconds;              // that the first thread spent in each Part
};

}

namespace {

constexpr Index kHalf = kPanel / 2;
constexpr Index kHeads = 8;      // that are rotated and inserted as one item
constexpr Index kGated = 1024;   // gates of a row that are one item
constexpr int kPatience = 2000;  // looks at a phase that does not open before others may run

enum class Work {
  kAttentionNorm, kQkv, kRotate, kAttend, kMerge, kOut, kMlpNorm,
  kGateUp, kGate, kDown,                           // of a dense layer
  kScore, kRoute, kExpertGateUp, kExpertDown,      // of a sparse one
  kEnd, kHead,
};

// What a phase belongs to; the last layer's addition to its MLP.
enum Part { kAttentionPart, kDensePart, kExpertsPart, kHeadPart, kParts };

Part part_of(Work work, const TwinpoolLayer& layer) {
  if (work == Work::kHead) return kHeadPart;
  if (work < Work::kMlpNorm) return kAttentionPart;
  return layer.router_ED ? kExpertsPart : kDensePart;
}

struct alignas(64) Phase {
  Work work;
  const TwinpoolLayer* layer;
  const TwinpoolLayer* before;     // whose outcome a norm adds first; null at the first layer
  std::atomic<Index> count{-1};    // of items; below 0 until the phase is open
  std::atomic<Index> next{0}, done{0};
};

// Which pairs of a token and its choice each expert of the current layer has.
struct Routing {
  std::vector<float> weights_TK;
  std::vector<Index> experts_TK, begins_E, next_E, pairs_P, chosen;
};

class Step {
 public:
  explicit Step(const TwinpoolStep& step) : s_(step), items_(items_of(step.attention)) {
    for (const Item& item : items_) {
      if (item.partial && !item.part) merged_.push_back(item);
    }
    phases_ = std::make_unique<Phase[]>(s_.count * 11 + 2);
    const TwinpoolLayer* before = nullptr;
    for (const TwinpoolLayer* layer = s_.layers; layer < s_.layers + s_.count; ++layer) {
      for (Work work : {Work::kAttentionNorm, Work::kQkv, Work::kRotate, Work::kAttend,
                        Work::kMerge, Work::kOut, Work::kMlpNorm}) {
        add(work, layer, before);
      }
      if (layer->router_ED) {
        for (Work work : {Work::kScore, Work::kRoute, Work::kExpertGateUp, Work::kExpertDown}) {
          add(work, layer, before);
        }
      } else {
        for (Work work : {Work::kGateUp, Work::kGate, Work::kDown}) add(work, layer, before);
      }
      before = layer;
    }
    add(Work::kEnd, before, before);
    if (s_.end_norm_D) add(Work::kHead, before, before);
    open(0);
  }

  // What every thread does; the one that is `timed` says how long the parts took, waits included.
  void run(bool timed) {
    const auto scratch = std::make_unique<Scratch>();
    Part part = kAttentionPart;
    auto since = std::chrono::steady_clock::now();
    const auto charge = [&](Part next) {
      const auto now = std::chrono::steady_clock::now();
      s_.seconds[part] += std::chrono::duration<double>(now - since).count();
      since = now;
      part = next;
    };
    for (Index i = 0; i < size_; ++i) {
      Phase& phase = phases_[i];
      const Index count = wait(phase);
      if (const Part next = part_of(phase.work, *phase.layer); timed && next != part) charge(next);
      for (Index item; (item = phase.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        perform(phase, item, *scratch);
        if (phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) open(i + 1);
      }
    }
    if (timed) charge(part);
  }

 private:
  void add(Work work, const TwinpoolLayer* layer, const TwinpoolLayer* before) {
    Phase& phase = phases_[size_++];
    phase.work = work;
    phase.layer = layer;
    phase.before = before;
  }

  // Opens a phase, and the next one where it has no items. All before it is done.
  void open(Index i) {
    for (Index count = 0; i < size_ && !count; ++i) {
      count = count_of(phases_[i]);
      phases_[i].count.store(count, std::memory_order_release);
    }
  }

  static Index wait(const Phase& phase) {
    Index count;
    for (int looks = 0; (count = phase.count.load(std::memory_order_acquire)) < 0; ++looks) {
      if (looks < kPatience) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
    return count;
  }

  Index count_of(const Phase& phase) const {
    const TwinpoolLayer& layer = *phase.layer;
    const TwinpoolDecode& shape = s_.attention;
    const Index chosen = static_cast<Index>(routing_.chosen.size());
    switch (phase.work) {
      case Work::kQkv: return panels_of(layer.qkv[0].outputs) + panels_of(layer.qkv[1].outputs);
      case Work::kRotate: return s_.tokens * pieces(shape.heads + 2 * shape.kv_heads, kHeads);
      case Work::kAttend: return static_cast<Index>(items_.size());
      case Work::kMerge: return static_cast<Index>(merged_.size());
      case Work::kOut: return panels_of(layer.out.outputs);
      case Work::kGateUp: return panels_of(layer.gate_up.outputs);
      case Work::kGate: return s_.tokens * pieces(layer.down.inner, kGated);
      case Work::kDown: return panels_of(layer.down.outputs);
      case Work::kRoute: return 1;
      case Work::kExpertGateUp: return chosen * pieces(s_.inner, kHalf);
      case Work::kExpertDown: return chosen * panels_of(s_.hidden);
      case Work::kHead: return panels_of(s_.head.outputs);
      default: return s_.tokens;
    }
  }

  void perform(const Phase& phase, Index i, Scratch& scratch) {
    const TwinpoolLayer& layer = *phase.layer;
    switch (phase.work) {
      case Work::kAttentionNorm:
        if (phase.before) add(*phase.before, i);
        norm(i, layer.attention_norm_D, i);
        break;
      case Work::kQkv: qkv(layer, i); break;
      case Work::kRotate: rotate_and_insert(layer, i); break;
      case Work::kAttend: attend(problem(layer), items_[i], scratch); break;
      case Work::kMerge: finish(problem(layer), merged_[i]); break;
      case Work::kOut: multiply_by(s_.attention.out, layer.out, i, s_.more_TD); break;
      case Work::kMlpNorm:
        add_product(i);
        norm(i, layer.mlp_norm_D, i);
        break;
      case Work::kGateUp:
        multiply_by(s_.normed_TD, layer.gate_up, i, s_.wide);
        break;
      case Work::kGate: gate(layer.down.inner, i); break;
      case Work::kDown: multiply_by(s_.between, layer.down, i, s_.more_TD); break;
      case Work::kScore: score(layer.router_ED, i); break;
      case Work::kRoute: route(); break;
      case Work::kExpertGateUp: expert_gate_up(layer.expert_gate_up, i); break;
      case Work::kExpertDown: expert_down(layer.expert_down, i); break;
      case Work::kEnd: {
        const Index t = s_.end_norm_D ? s_.wanted_T[i] : i;
        add(*phase.before, t);
        if (s_.end_norm_D) norm(t, s_.end_norm_D, i);
        break;
      }
      case Work::kHead: multiply_by(s_.normed_TD, s_.head, i, s_.head_logits_TV); break;
    }
  }

  static Index pieces(Index all, Index each) { return (all + each - 1) / each; }

  TwinpoolDecode problem(const TwinpoolLayer& layer) const {
    TwinpoolDecode made = s_.attention;
    made.keys = layer.cells;
    made.values = layer.cells + s_.values_after;
    return made;
  }

  template <typename Out>
  void multiply_by(const Bf16* x, const TwinpoolWeight& weight, Index panel, Out* out,
                   Index stride = 0) {
    by_panel(x, s_.tokens, weight.panels, panel, weight.inner, out, weight.outputs,
             stride ? stride : weight.outputs);
  }

  // ---- Rows ------------------------------------------------------------------------------------

  // Adds what the layer before left.
  void add(const TwinpoolLayer& before, Index t) {
    if (before.router_ED) {
      add_experts(t);
    } else {
      add_product(t);
    }
  }

  void add_product(Index t) {
    float* x = s_.x_TD + t * s_.hidden;
    const Bf16* more = s_.more_TD + t * s_.hidden;
#pragma omp simd
    for (Index d = 0; d < s_.hidden; ++d) x[d] += widen(more[d]);
  }

  void norm(Index t, const float* weight_D, Index to) {
    const Index size = s_.hidden;
    norm_row(s_.x_TD + t * size, weight_D, s_.normed_TD + to * size, size, s_.norm_floor2);
  }

  void qkv(const TwinpoolLayer& layer, Index i) {
    const TwinpoolWeight& first = layer.qkv[0];
    const Index count = panels_of(first.outputs), row = s_.attention.q_stride;
    if (i < count) {
      multiply_by(s_.normed_TD, first, i, s_.qkv_TNH, row);
    } else {
      multiply_by(s_.normed_TD, layer.qkv[1], i - count, s_.qkv_TNH + first.outputs, row);
    }
  }

  void rotate_and_insert(const TwinpoolLayer& layer, Index i) {
    const TwinpoolDecode& shape = s_.attention;
    const Index size = shape.head_size, kv_heads = shape.kv_heads;
    const Index turned = shape.heads + kv_heads, all = turned + kv_heads;
    const Index t = i / pieces(all, kHeads), from = i % pieces(all, kHeads) * kHeads;
    for (Index m = from; m < std::min(from + kHeads, all); ++m) {
      Bf16* head = s_.qkv_TNH + t * shape.q_stride + m * size;
      if (layer.qkv_bias) add_row(head, layer.qkv_bias + m * size, size);
      if (m < turned) {
        norm_rotate_head(head, layer.qk_norm_MH + m * size, s_.cos_TH + t * size,
                         s_.sin_TH + t * size, size, s_.head_floor2);
      }
      if (m >= shape.heads) {
        const Index slot = s_.slots_TX[t * 2 * kv_heads + m - shape.heads];
        std::memcpy(layer.cells + slot * size, head, size * sizeof(Bf16));
      }
    }
  }

  void gate(Index inner, Index i) {
    const Index t = i / pieces(inner, kGated), from = i % pieces(inner, kGated) * kGated;
    const Bf16* at = s_.wide + t * 2 * inner + from;
    gate_row(at, at + inner, s_.between + t * inner + from, std::min(kGated, inner - from));
  }

  // ---- Experts ---------------------------------------------------------------------------------

  void score(const float* router_ED, Index t) {
    score_row(s_.normed_TD + t * s_.hidden, router_ED, s_.logits_TE + t * s_.experts, s_.experts,
              s_.hidden);
  }

  void route() {
    const Index pairs = s_.tokens * s_.top_k;
    Routing& r = routing_;
    r.weights_TK.resize(pairs);
    r.experts_TK.resize(pairs);
    r.pairs_P.resize(pairs);
    r.begins_E.assign(s_.experts + 1, 0);
    r.chosen.clear();
    for (Index t = 0; t < s_.tokens; ++t) {
      route_row(s_.logits_TE + t * s_.experts, s_.experts, s_.top_k, s_.normalise != 0,
                r.weights_TK.data() + t * s_.top_k, r.experts_TK.data() + t * s_.top_k);
    }
    for (Index expert : r.experts_TK) ++r.begins_E[expert + 1];
    for (Index e = 0; e < s_.experts; ++e) {
      if (r.begins_E[e + 1]) r.chosen.push_back(e);
      r.begins_E[e + 1] += r.begins_E[e];
    }
    r.next_E.assign(r.begins_E.begin(), r.begins_E.end() - 1);
    for (Index p = 0; p < pairs; ++p) r.pairs_P[r.next_E[r.experts_TK[p]]++] = p;
  }

  void expert_gate_up(const Bf16* panels, Index i) {
    const Index count = pieces(s_.inner, kHalf), padded = count * kHalf;
    const Index expert = routing_.chosen[i / count], panel = i % count;
    const Bf16* at = panels + (expert * count + panel) * kPanel * s_.hidden;
    for (Index p = routing_.begins_E[expert]; p < routing_.begins_E[expert + 1]; p += kMost) {
      const Index rows = routing_.begins_E[expert + 1] - p;
      const Bf16* from[kMost];
      Bf16* to[kMost];
      for (Index r = 0; r < kMost && r < rows; ++r) {
        from[r] = s_.normed_TD + routing_.pairs_P[p + r] / s_.top_k * s_.hidden;
        to[r] = s_.between + (p + r) * padded + panel * kHalf;
      }
      WITH_PRODUCT_ROWS(rows, gated_by_panel, from, at, s_.hidden, to)
    }
  }

  void expert_down(const Bf16* panels, Index i) {
    const Index count = panels_of(s_.hidden), padded = pieces(s_.inner, kHalf) * kHalf;
    const Index expert = routing_.chosen[i / count], panel = i % count;
    const Bf16* at = panels + (expert * count + panel) * kPanel * s_.inner;
    for (Index p = routing_.begins_E[expert]; p < routing_.begins_E[expert + 1]; p += kMost) {
      const Index rows = routing_.begins_E[expert + 1] - p;
      const Bf16* from[kMost];
      Bf16* to[kMost];
      for (Index r = 0; r < kMost && r < rows; ++r) {
        from[r] = s_.between + (p + r) * padded;
        to[r] = s_.y_PD + routing_.pairs_P[p + r] * s_.hidden + panel * kPanel;
      }
      WITH_PRODUCT_ROWS(rows, rows_by_panel, from, at, s_.inner, to, s_.hidden - panel * kPanel)
    }
  }

  // Adds the weighted sum of a token's outputs, which is made in the order of its choices.
  void add_experts(Index t) {
    const Index size = s_.hidden, top_k = s_.top_k;
    const Bf16* y_KD = s_.y_PD + t * top_k * size;
    const float* weights = routing_.weights_TK.data() + t * top_k;
    float* x = s_.x_TD + t * size;
#pragma omp simd
    for (Index d = 0; d < size; ++d) {
      float sum = 0;
      for (Index k = 0; k < top_k; ++k) {
        sum = std::fma(weights[k], widen(y_KD[k * size + d]), sum);
      }
      x[d] += sum;
    }
  }

  const TwinpoolStep& s_;
  const std::vector<Item> items_;
  std::vector<Item> merged_;  // first parts of several
  std::unique_ptr<Phase[]> phases_;
  Index size_ = 0;
  Routing routing_;
};

}  // namespace

extern "C" void twinpool_step(const TwinpoolStep* problem, int threads) {
  Step step(*problem);
#pragma omp parallel num_threads(threads)
  step.run(omp_get_thread_num() == 0);
}
