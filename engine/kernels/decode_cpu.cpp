// Attention of decoding sequences in one parallel region; see decode.h. Checks nothing of what it is
// given: engine/kernels/decode_native.py does.
#include "decode.h"

using namespace twinpool;

extern "C" void twinpool_decode(const TwinpoolDecode* problem, int threads) {
  const std::vector<Item> items = items_of(*problem);
  const Index count = static_cast<Index>(items.size());
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < count; ++i) attend(*problem, items[i], scratch);
#pragma omp for schedule(static)
    for (Index i = 0; i < count; ++i) finish(*problem, items[i]);
  }
}
