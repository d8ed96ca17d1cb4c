// A matrix product with a constant weight in one parallel region; see product.h. Checks nothing of
// what it is given: engine/kernels/linear_cpu.py does.
#include "product.h"

using namespace twinpool;

namespace {

constexpr Index kBlock = 96;  // rows that share a panel while it is near

}  // namespace

extern "C" void twinpool_product(const Bf16* x, const Bf16* panels, Bf16* out, Index rows,
                                 Index inner, Index outputs, int threads) {
  const Index blocks = (rows + kBlock - 1) / kBlock, count = panels_of(outputs);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (Index item = 0; item < blocks * count; ++item) {
    const Index row = item / count * kBlock;
    by_panel(x + row * inner, std::min(kBlock, rows - row), panels, item % count, inner,
             out + row * outputs, outputs, outputs);
  }
}
