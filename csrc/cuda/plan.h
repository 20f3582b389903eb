// Which instance of a kernel runs, and on which grid.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>

#include "stats.cuh"

namespace fractal::cuda {

constexpr int kClasses[] = {1, 2, 3, 4, kMaxBranches};  // numbers of branches that kernels are compiled for

struct Plan {
  int k;  // of kClasses
  int np;
  Axis axis;
  int lanes;  // 1: any strides
  unsigned threads_x, blocks_x, blocks_y, blocks_z;
};

// Whether every load of `width` elements along the axis is aligned and inside one row of pixels or one pixel's
// channels.
inline bool is_aligned(const Strided& v, Axis axis, int64_t width, int itemsize, int64_t N, int64_t C, int64_t H,
                       int64_t W) {
  const bool channels = axis == Axis::kChannels;
  if ((channels ? C : W) % width || (channels ? v.c : v.w) != 1) return false;
  if (reinterpret_cast<uintptr_t>(v.data) % (width * itemsize)) return false;
  const int64_t across = channels ? (W > 1 ? v.w : 0) : (C > 1 ? v.c : 0);
  return across % width == 0 && (N == 1 || v.n % width == 0) && (H == 1 || v.h % width == 0);
}

// Fills in the geometry of `a`, which has N, k, C, H, W and the views. `np`: 4 with pooling. Hout, Wout: sites.
inline Plan make_plan(Kernel kernel, Args& a, int itemsize, int np, int Hout, int Wout, bool channels_last,
                      int processors, int architecture) {
  const bool stats = kernel == Kernel::kStats;
  Plan p{};
  p.np = np;
  p.axis = channels_last ? Axis::kChannels : Axis::kPixels;
  p.k = stats ? 1 : *std::lower_bound(std::begin(kClasses), std::end(kClasses), a.k);
  p.lanes = lanes(kernel, itemsize, p.k, np, p.axis);
  const auto aligned = [&](int lanes) {
    const int width = np == 4 && p.axis == Axis::kPixels ? 2 * lanes : lanes;
    bool good =
        stats || is_aligned(a.out, p.axis, lanes, itemsize, a.N, a.C, Hout, np == 4 && !channels_last ? a.W / 2 : Wout);
    for (int b = 0; b < a.k; ++b) {
      if (a.reads_y) good &= is_aligned(a.y[b], p.axis, width, itemsize, a.N, a.C, a.H, a.W);
      if (kernel == Kernel::kApply) good &= is_aligned(a.dy[b], p.axis, width, itemsize, a.N, a.C, a.H, a.W);
    }
    return good;
  };
  if (!aligned(p.lanes)) {
    if (has_half(np, p.axis) && aligned(p.lanes / 2))
      p.lanes /= 2;
    else
      p.axis = Axis::kChannels, p.lanes = 1;
  }

  const bool pixels = p.axis == Axis::kPixels;
  const int vectors = pixels ? a.C : (a.C + p.lanes - 1) / p.lanes;
  p.threads_x = 1;
  if (channels_last)  // the power of two that leaves the fewest threads idle, of those that read 64 bytes or more
    for (unsigned x = 1, least = ~0u; x <= 32; x *= 2) {
      if (x < 32 && x * p.lanes * itemsize < 64 && static_cast<int>(x) < vectors) continue;
      const unsigned idle = (vectors + x - 1) / x * x;
      if (idle <= least) least = idle, p.threads_x = x;
    }
  a.groups = (vectors + p.threads_x - 1) / p.threads_x;
  a.rows = std::max(Hout, 1);
  a.columns = std::max(pixels ? Wout / p.lanes : Wout, 1);
  if (Hout == 0 || Wout == 0) a.N = 0;

  const int64_t units = int64_t(a.N) * a.rows * a.columns, threads_y = kThreads / p.threads_x;
  // No more blocks than run at once: those of a reduction leave a partial each, and others gain nothing.
  const int64_t most = int64_t(processors) * blocks(kernel, p.k, np, p.axis, architecture);
  const int64_t at_once = threads_y * unroll(kernel, p.k, np, p.lanes);
  p.blocks_y = std::min(a.groups, 65535);
  p.blocks_z = stats ? a.k : 1;
  const int64_t columns = int64_t(p.blocks_y) * p.blocks_z;
  p.blocks_x = std::max<int64_t>(1, std::min((units + at_once - 1) / at_once, most / columns));

  const int64_t step = p.blocks_x * threads_y, sample = int64_t(a.rows) * a.columns;
  const int within = static_cast<int>(step % sample);
  a.step = {static_cast<int>(step / sample), within / a.columns, within % a.columns};
  return p;
}

}  // namespace fractal::cuda
