// How the launchers see a tensor [N, C, *].
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "join.h"

namespace fractal {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// H and W are one axis of pixels without pooling.
inline View view_of(const Tensor& t, bool pool) {
  View v{t.data_ptr(), t.stride(0), t.stride(1), 0, 1};
  for (int64_t d = t.dim() - 1; d >= 2; --d)
    if (t.size(d) > 1) {
      v.w = t.stride(d);
      break;
    }
  if (pool) v.h = t.stride(2), v.w = t.stride(3);
  return v;
}

inline int64_t pixels_of(const Tensor& t) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < t.dim(); ++d) pixels *= t.size(d);
  return pixels;
}

struct Geometry {
  int64_t N, C, H, W;
};

inline Geometry geometry_of(const Tensor& y, bool pool) {
  if (pool) return {y.size(0), y.size(1), y.size(2), y.size(3)};
  return {y.size(0), y.size(1), 1, pixels_of(y)};
}

}  // namespace fractal
