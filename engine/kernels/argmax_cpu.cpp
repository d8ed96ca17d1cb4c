// The place of the greatest of a row: the first of equals, or of NaNs where there are any, as torch
// has it. Plain loops that the compiler vectorises: a row is gone through once, piece by piece, and
// again no further than the piece that the greatest is in.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

using i64 = std::int64_t;

constexpr i64 kPiece = 4096;  // that is near when it is gone through again

i64 argmax(const float* row, i64 size) {
    i64 best = 0, from = 0, to = 0;
    float most = -INFINITY;
    for (i64 begin = 0; begin < size; begin += kPiece) {
        i64 end = std::min(size, begin + kPiece);
        float here = -INFINITY;
        int nans = 0;
#pragma omp simd reduction(max : here) reduction(+ : nans)
        for (i64 v = begin; v < end; ++v) {
            here = row[v] > here ? row[v] : here;
            nans += row[v] != row[v];
        }
        if (nans) {
            for (best = begin; row[best] == row[best];) ++best;
            return best;
        }
        if (here > most) {
            most = here;
            from = begin;
            to = end;
        }
    }
    for (best = from; best < to && row[best] != most;) ++best;
    return best < to ? best : 0;  // where all are -inf, the first one
}

}  // namespace

extern "C" void twinpool_argmax(const float* x_SV, i64 rows, i64 size, i64* found_S, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 s = 0; s < rows; ++s) found_S[s] = argmax(x_SV + s * size, size);
}
