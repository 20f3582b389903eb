// The merges of the reductions' partials, in their order: thread rows take every kMergeRows-th, then the rows are
// merged by halves.
#pragma once
#include "stats.cuh"

namespace fractal::cuda {

constexpr int kMergeWidth = 16, kMergeRows = 32;  // threads of a block: channels, partials
constexpr int kMergeBatch = 8;                    // partials that a thread loads before it uses the first

// Running statistics of the branches, updated where a branch had values; means are null without them.
struct Running {
  float *mean[kMaxBranches], *var[kMaxBranches];
  const float* momenta;  // [k]; null: `momentum` is that of all
  float momentum;
};

// Grid: (groups of channels, branch). mean and biased var [k][C], count [k].
static __global__ void __launch_bounds__(kMergeWidth* kMergeRows)
    merge_stats(const float* partial, const float* number, float* mean, float* var, float* count,
                const __grid_constant__ Running running, int rows, int C) {
  const int b = blockIdx.y, k = gridDim.y, c = blockIdx.x * kMergeWidth + threadIdx.x;
  Moments moments;
  if (c < C)
    for (int first = threadIdx.y; first < rows; first += kMergeBatch * kMergeRows) {
      Moments batch[kMergeBatch];
      FRACTAL_UNROLL
      for (int i = 0; i < kMergeBatch; ++i) {
        const int64_t at = int64_t(first + i * kMergeRows) * k + b;
        if (first + i * kMergeRows >= rows) continue;
        const float* from = partial + at * 3 * C + c;
        batch[i] = {number[at], from[0], from[C], from[2 * int64_t(C)]};
      }
      FRACTAL_UNROLL
      for (int i = 0; i < kMergeBatch; ++i) moments.merge(batch[i]);
    }
  Shared<Moments> memory = shared<Moments>();
  const int row = threadIdx.y;
  memory[row * kMergeWidth + threadIdx.x] = moments;
  for (int half = kMergeRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row >= half) continue;
    moments.merge(memory[(row + half) * kMergeWidth + threadIdx.x]);
    memory[row * kMergeWidth + threadIdx.x] = moments;
  }
  if (row != 0 || c >= C) return;
  const float center = moments.origin + moments.mean, biased = moments.m2 / fmaxf(moments.number, 1.f);
  mean[int64_t(b) * C + c] = center;
  var[int64_t(b) * C + c] = biased;
  if (c == 0) count[b] = moments.number;
  float* const running_mean = running.mean[b];
  if (running_mean == nullptr || moments.number == 0.f) return;
  float* const running_var = running.var[b];
  const float keep = running.momenta ? running.momenta[b] : running.momentum;
  const float unbiased = biased * (moments.number / fmaxf(moments.number - 1.f, 1.f));
  running_mean[c] = (1.f - keep) * running_mean[c] + keep * center;
  running_var[c] = (1.f - keep) * running_var[c] + keep * unbiased;
}

// Grid: (groups of channels, 2k). Sums of dz and of dz*xhat, [k][C] each.
static __global__ void __launch_bounds__(kMergeWidth* kMergeRows)
    merge_sums(const float* partial, float* sum_dz, float* sum_dzx, int rows, int C) {
  const int i = blockIdx.y, c = blockIdx.x * kMergeWidth + threadIdx.x;
  float total = 0.f;
  if (c < C)
    for (int first = threadIdx.y; first < rows; first += kMergeBatch * kMergeRows) {
      float batch[kMergeBatch];
      FRACTAL_UNROLL
      for (int j = 0; j < kMergeBatch; ++j) {
        const int at = first + j * kMergeRows;
        batch[j] = at < rows ? partial[(int64_t(at) * gridDim.y + i) * C + c] : 0.f;
      }
      FRACTAL_UNROLL
      for (int j = 0; j < kMergeBatch; ++j) total += batch[j];
    }
  Shared<float> memory = shared<float>();
  const int row = threadIdx.y;
  memory[row * kMergeWidth + threadIdx.x] = total;
  for (int half = kMergeRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row >= half) continue;
    total += memory[(row + half) * kMergeWidth + threadIdx.x];
    memory[row * kMergeWidth + threadIdx.x] = total;
  }
  if (row != 0 || c >= C) return;
  (i % 2 ? sum_dzx : sum_dz)[int64_t(i / 2) * C + c] = total;
}

}  // namespace fractal::cuda
