// The merges of the reductions' partials, in their order: thread rows take every kMergeRows-th, then the rows are
// merged.
#pragma once
#include "stats.cuh"

namespace fractal::cuda {

constexpr int kMergeWidth = 32, kMergeRows = 16;  // threads of a block: channels, partials
constexpr int kMergeBatch = 4;                    // partials that a thread loads before it uses the first

// Grid: (groups of channels, branch). mean and biased var [k][C], count [k].
static __global__ void __launch_bounds__(kMergeWidth* kMergeRows)
    merge_stats(const float* partial, const float* number, float* mean, float* var, float* count, int rows, int C) {
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
  memory[threadIdx.y * kMergeWidth + threadIdx.x] = moments;
  __syncthreads();
  if (threadIdx.y != 0 || c >= C) return;
  for (int row = 1; row < kMergeRows; ++row) moments.merge(memory[row * kMergeWidth + threadIdx.x]);
  mean[int64_t(b) * C + c] = moments.origin + moments.mean;
  var[int64_t(b) * C + c] = moments.m2 / fmaxf(moments.number, 1.f);
  if (c == 0) count[b] = moments.number;
}

// Grid: (groups of channels, 2k). Sums of dz and of dz*xhat, [k][C] each.
static __global__ void __launch_bounds__(kMergeWidth* kMergeRows)
    merge_sums(const float* partial, float* sum_dz, float* sum_dzx, int rows, int C) {
  const int i = blockIdx.y, c = blockIdx.x * kMergeWidth + threadIdx.x;
  float total = 0.f;
  if (c < C)
    for (int row = threadIdx.y; row < rows; row += kMergeRows) total += partial[(int64_t(row) * gridDim.y + i) * C + c];
  Shared<float> memory = shared<float>();
  memory[threadIdx.y * kMergeWidth + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || c >= C) return;
  for (int row = 1; row < kMergeRows; ++row) total += memory[row * kMergeWidth + threadIdx.x];
  (i % 2 ? sum_dzx : sum_dz)[int64_t(i / 2) * C + c] = total;
}

}  // namespace fractal::cuda
