// Starts the instance of a kernel that a plan names. One translation unit for each element type.
#pragma once
#include "plan.h"

namespace fractal::cuda {

template <class T>
void run(Kernel kernel, const Plan& plan, const Args& args, Stream stream);

template <Kernel E, class T, int K, int NP, Axis A, int V>
void start(const Plan& p, const Args& a, Stream stream) {
  const dim3 grid(p.blocks_x, p.blocks_y, p.blocks_z), block(p.threads_x, kThreads / p.threads_x);
  constexpr int P = A == Axis::kChannels ? V : 1;
  const size_t rows = (kThreads / 32 - 1) * p.threads_x;  // what the warps after the first leave for it
  if constexpr (E == Kernel::kStats)
    launch(stream, "channel_stats", channel_stats<T, A, V>, grid, block, rows * P * sizeof(Moments), a);
  else if constexpr (E == Kernel::kForward)
    launch(stream, "join_forward", join_forward<T, K, NP, A, V>, grid, block, 0, a);
  else if constexpr (E == Kernel::kReduce)
    launch(stream, "join_backward_reduce", join_backward_reduce<T, K, NP, A, V>, grid, block,
           rows * 2 * K * P * sizeof(float), a);
  else
    launch(stream, "join_backward_apply", join_backward_apply<T, K, NP, A, V>, grid, block, 0, a);
}

template <Kernel E, class T, int K, int NP>
void start(const Plan& p, const Args& a, Stream stream) {
  constexpr int V = lanes(E, sizeof(T), K, NP, Axis::kPixels);
  if constexpr (has_half(NP, Axis::kPixels))
    if (p.axis == Axis::kPixels && p.lanes == V / 2) return start<E, T, K, NP, Axis::kPixels, V / 2>(p, a, stream);
  if (p.axis == Axis::kPixels)
    start<E, T, K, NP, Axis::kPixels, V>(p, a, stream);
  else if (p.lanes > 1)
    start<E, T, K, NP, Axis::kChannels, lanes(E, sizeof(T), K, NP, Axis::kChannels)>(p, a, stream);
  else
    start<E, T, K, NP, Axis::kChannels, 1>(p, a, stream);
}

template <Kernel E, class T, int NP>
void start(const Plan& p, const Args& a, Stream stream) {
  switch (p.k) {
    case 1:
      return start<E, T, 1, NP>(p, a, stream);
    case 2:
      return start<E, T, 2, NP>(p, a, stream);
    case 3:
      return start<E, T, 3, NP>(p, a, stream);
    case 4:
      return start<E, T, 4, NP>(p, a, stream);
    default:
      return start<E, T, kMaxBranches, NP>(p, a, stream);
  }
}

template <Kernel E, class T>
void start(const Plan& p, const Args& a, Stream stream) {
  return p.np == 4 ? start<E, T, 4>(p, a, stream) : start<E, T, 1>(p, a, stream);
}

template <class T>
void run(Kernel kernel, const Plan& plan, const Args& args, Stream stream) {
  if (kernel == Kernel::kStats) return start<Kernel::kStats, T, 1, 1>(plan, args, stream);
  if (kernel == Kernel::kForward) return start<Kernel::kForward, T>(plan, args, stream);
  if (kernel == Kernel::kReduce) return start<Kernel::kReduce, T>(plan, args, stream);
  return start<Kernel::kApply, T>(plan, args, stream);
}

}  // namespace fractal::cuda
