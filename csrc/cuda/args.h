// What a launch is told, by value: filled in ops.cu, read by the kernels from constant memory.
#pragma once
#include <cstdint>

#include "../join.h"

namespace fractal::cuda {

constexpr int kThreads = 128;  // of a block: threadIdx.x over vectors of channels, threadIdx.y over units of sites

// A place among the units of work, or a distance: sample, row and column. Without pooling there is one row of pixels.
struct Walk {
  int n, h, w;
};

// A tensor: strides in elements. Those of pixels have 32 bits, and a product of 32 bits by 32 is one instruction; where
// there is one row or one column they are 0.
struct Strided {
  void* data;
  int64_t n, c;
  int h, w;
};

struct Args {
  int N, k, C, H, W;  // of the inputs
  int rows, columns;  // units of a sample
  int groups;         // of channels: how many a column of the grid walks
  Walk step;          // from one unit of a thread to its next
  Strided y[kMaxBranches], dy[kMaxBranches];
  Strided out;          // forward: the output; backward: its gradient
  const uint8_t* mask;  // null: every branch lives in every sample
  int64_t mask_k, mask_n;
  const float *mean[kMaxBranches], *var[kMaxBranches];     // null without normalisation
  const float *weight[kMaxBranches], *bias[kMaxBranches];  // null for one and zero
  const float *sum_dz, *sum_dzx, *count;                   // apply, with batch statistics: [k][C], [k][C], [k]
  float *partial, *number;                                 // of the reductions, one for each row of the grid
  float eps;
  float weights[kMaxBranches + 1];  // of a join, by the number of live branches
  Activation<float> branch, output;
  bool pool_before, gate_output;
  bool reads_y;      // false for the backward of a plain mean
  bool all_samples;  // the statistics ran over dropped samples too, which therefore have a gradient
};

}  // namespace fractal::cuda
