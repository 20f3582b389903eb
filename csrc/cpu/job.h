// What one kernel call is, free of element types: filled in ops.cpp, executed by the SIMD translation units.
#pragma once
#include <cstdint>

#include "../join.h"

namespace fractal::cpu {

enum class Kernel { kStats, kForward, kReduce, kApply };
enum Param { kMean, kScale, kShift, kOffset, kSlope, kParams };  // of a channel of a branch
enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// Without pooling, H = 1 and W is the number of pixels. Work is cut into units, the same for any number of threads:
// channels_last: `unit_rows` rows of pixels (pooling: one row of windows) of a sample; contiguous: one (sample,
// channel).
struct Job {
  Kernel kernel;
  DType dtype;
  bool channels_last, pool;
  int k;
  int64_t N, C, H, W, Ho, Wo;
  View y[kMaxBranches], dy[kMaxBranches];
  View out;                // forward: the output; backward: the gradient of the output
  const bool* mask;        // null: every branch lives in every sample
  int64_t mask_k, mask_n;  // strides of the mask
  int64_t flags;           // of join.h
  bool reads_y;            // false for the backward of a plain mean: dy needs grad and mask only
  const void* params;      // [k][kParams][C] of accumulator type (float, or double for double); null: no normalisation
  bool corrects;           // apply, for batch statistics: dy = scale*dz + offset + slope*(y - mean)
  bool corrected[kMaxBranches];  // of which branches: of those that have any
  bool flat;                     // channels_last without per-channel parameters or gaps: a unit is one long row
  bool past_caches;              // outputs are aligned and too large to be found in a cache by who reads them next
  int64_t unit_rows, units_per_sample, units;
  bool short_rows;  // channels_last: a row is so few vectors that their parameters are held for several rows

  FRACTAL_HD bool live(int b, int64_t n) const { return mask == nullptr || mask[b * mask_k + n * mask_n]; }
};

// Runs units [begin, end). `partial` is scratch of accumulator type:
//   kStats: of branch `branch`, the mean relative to an origin:
//     channels_last: count, mean[C], m2[C], origin[C] of these units together;
//     contiguous: mean[units], m2[units], origin[units].
//   kReduce: channels_last: sum_dz, sum_dz*(y - mean): [k][2][C]; contiguous: [units][k][2].
using RunFn = void (*)(const Job& job, int branch, int64_t begin, int64_t end, void* partial);

namespace baseline {
void run(const Job& job, int branch, int64_t begin, int64_t end, void* partial);
}
#if defined(__x86_64__)
namespace avx2 {
void run(const Job& job, int branch, int64_t begin, int64_t end, void* partial);
}
namespace avx512 {
void run(const Job& job, int branch, int64_t begin, int64_t end, void* partial);
}
#endif

}  // namespace fractal::cpu
