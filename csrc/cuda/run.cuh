// Starts the instance of a kernel that a plan names. One translation unit for each element type.
#pragma once
#include "plan.h"

namespace fractal::cuda {

template <class T>
void run(Kernel kernel, const Plan& plan, const Args& args, Stream stream);

template <class T, int K, int NP, Axis A, int V>
void start(Kernel kernel, const Plan& p, const Args& a, Stream stream) {
  const dim3 grid(p.blocks_x, p.blocks_y, p.blocks_z), block(p.threads_x, kThreads / p.threads_x);
  constexpr int P = A == Axis::kChannels ? V : 1;
  const size_t rows = (kThreads / 32 - 1) * p.threads_x;  // what the warps after the first leave for it
  if (kernel == Kernel::kForward)
    launch(stream, "join_forward", join_forward<T, K, NP, A, V>, grid, block, 0, a);
  else if (kernel == Kernel::kReduce)
    launch(stream, "join_backward_reduce", join_backward_reduce<T, K, NP, A, V>, grid, block,
           rows * 2 * K * P * sizeof(float), a);
  else
    launch(stream, "join_backward_apply", join_backward_apply<T, K, NP, A, V>, grid, block, 0, a);
}

template <class T, int K, int NP>
void start(Kernel kernel, const Plan& p, const Args& a, Stream stream) {
  if (p.axis == Axis::kPixels)
    start<T, K, NP, Axis::kPixels, lanes(sizeof(T), K, NP, Axis::kPixels)>(kernel, p, a, stream);
  else if (p.lanes > 1)
    start<T, K, NP, Axis::kChannels, lanes(sizeof(T), K, NP, Axis::kChannels)>(kernel, p, a, stream);
  else
    start<T, K, NP, Axis::kChannels, 1>(kernel, p, a, stream);
}

template <class T, int NP>
void start(Kernel kernel, const Plan& p, const Args& a, Stream stream) {
  switch (p.k) {
    case 1:
      return start<T, 1, NP>(kernel, p, a, stream);
    case 2:
      return start<T, 2, NP>(kernel, p, a, stream);
    case 3:
      return start<T, 3, NP>(kernel, p, a, stream);
    case 4:
      return start<T, 4, NP>(kernel, p, a, stream);
    default:
      return start<T, kMaxBranches, NP>(kernel, p, a, stream);
  }
}

template <class T, Axis A, int V>
void start_stats(const Plan& p, const Args& a, Stream stream) {
  const dim3 grid(p.blocks_x, p.blocks_y, p.blocks_z), block(p.threads_x, kThreads / p.threads_x);
  constexpr int P = A == Axis::kChannels ? V : 1;
  const size_t shared = (kThreads / 32 - 1) * p.threads_x * P * sizeof(Moments);
  launch(stream, "channel_stats", channel_stats<T, A, V>, grid, block, shared, a);
}

template <class T>
void run(Kernel kernel, const Plan& plan, const Args& args, Stream stream) {
  constexpr int full = 16 / sizeof(T);
  if (kernel == Kernel::kStats && plan.axis == Axis::kPixels)
    start_stats<T, Axis::kPixels, full>(plan, args, stream);
  else if (kernel == Kernel::kStats && plan.lanes > 1)
    start_stats<T, Axis::kChannels, full>(plan, args, stream);
  else if (kernel == Kernel::kStats)
    start_stats<T, Axis::kChannels, 1>(plan, args, stream);
  else if (plan.np == 4)
    start<T, 4>(kernel, plan, args, stream);
  else
    start<T, 1>(kernel, plan, args, stream);
}

}  // namespace fractal::cuda
