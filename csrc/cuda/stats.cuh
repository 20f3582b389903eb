// channel_stats: grid as in join.cuh, z over branches; reads y once. For each thread and channel, relative to
// the first value it saw (exact where |mean| >> std): Welford's update by single values, Chan's merge of four at a
// time; then Chan's merge over the warp, the block and, in merge_stats, the blocks: always in the same order.
#pragma once
#include "join.cuh"

namespace fractal::cuda {

constexpr int kUnrollStats = unroll(Kernel::kStats, 1, 1, 1);

struct Moments {
  float number = 0.f, origin = 0.f, mean = 0.f, m2 = 0.f;  // mean: relative to the origin

  __device__ __forceinline__ void merge(const Moments& o) {
    if (o.number == 0.f) return;
    if (number == 0.f) {
      *this = o;
      return;
    }
    const float delta = (o.origin - origin) + (o.mean - mean), total = number + o.number;
    mean += delta * (o.number / total);
    m2 += o.m2 + delta * delta * (number * (o.number / total));
    number = total;
  }

  __device__ __forceinline__ Moments shifted_down(int offset) const {
    return {__shfl_down_sync(0xffffffffu, number, offset), __shfl_down_sync(0xffffffffu, origin, offset),
            __shfl_down_sync(0xffffffffu, mean, offset), __shfl_down_sync(0xffffffffu, m2, offset)};
  }
};

template <class T, Axis A, int V>
__global__ void __launch_bounds__(kThreads, blocks(Kernel::kStats, 1, 1, A, kArchitecture))
    channel_stats(const __grid_constant__ Args a) {
  constexpr int P = A == Axis::kChannels ? V : 1, U = kUnrollStats;
  using Y = Tile<T, 1, A, V>;
  const int b = blockIdx.z;
  const int width = blockDim.x, thread = threadIdx.y * width + threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
    const int c = channel<A, V>(group);
    float number = 0.f, origin[V] = {}, mean[V] = {}, m2[V] = {};
    if (c < a.C) {
      for (Walk walk = first_unit(a); walk.n < a.N;) {
        Y y[U];
        bool there[U];
        FRACTAL_UNROLL
        for (int u = 0; u < U; ++u) {
          there[u] = walk.n < a.N && (a.mask == nullptr || a.mask[b * a.mask_k + walk.n * a.mask_n]);
          if (there[u]) y[u].load(a, a.y[b], walk, c);
          advance<1>(a, walk);
        }
        if (number > 0.f && there[0] && there[1] && there[2] && there[3]) {
          // Four values relative to the first of them lose nothing: of their squares, at least a quarter is variance.
          const float total = number + U, weight = U / total, both = number * weight;
          FRACTAL_UNROLL
          for (int v = 0; v < V; ++v) {
            const float value = static_cast<float>(y[0].at(0, v));
            float sum = 0.f, squares = 0.f;
            FRACTAL_UNROLL
            for (int u = 1; u < U; ++u) {
              const float d = static_cast<float>(y[u].at(0, v)) - value;
              sum += d;
              squares += d * d;
            }
            const float delta = (value - origin[v]) + sum * (1.f / U) - mean[v];
            mean[v] += delta * weight;
            m2[v] += (squares - sum * sum * (1.f / U)) + delta * delta * both;
          }
          number = total;
          continue;
        }
        FRACTAL_UNROLL
        for (int u = 0; u < U; ++u) {
          if (!there[u]) continue;
          const bool first = number == 0.f;
          number += 1.f;
          const float inverse = 1.f / number;  // one for all the channels of the thread
          FRACTAL_UNROLL
          for (int v = 0; v < V; ++v) {
            const float value = static_cast<float>(y[u].at(0, v));
            origin[v] = first ? value : origin[v];
            const float x = value - origin[v], delta = x - mean[v];
            mean[v] += delta * inverse;
            m2[v] += delta * (x - mean[v]);
          }
        }
      }
    }
    Shared<Moments> memory = shared<Moments>();
    Moments moments[P];
    FRACTAL_UNROLL
    for (int p = 0; p < P; ++p) {
      FRACTAL_UNROLL
      for (int v = p; v < V; v += P) moments[p].merge({number, origin[v], mean[v], m2[v]});
      for (int offset = width; offset < 32; offset *= 2) {
        const Moments other = moments[p].shifted_down(offset);
        if (lane % (2 * offset) < width) moments[p].merge(other);
      }
      if (lane < width && warp > 0) memory[((warp - 1) * P + p) * width + lane] = moments[p];
    }
    __syncthreads();
    if (threadIdx.y == 0 && c < a.C) {
      FRACTAL_UNROLL
      for (int p = 0; p < P; ++p) {
        for (int w = 0; w + 1 < kThreads / 32; ++w) moments[p].merge(memory[(w * P + p) * width + lane]);
        float* to = a.partial + (int64_t(blockIdx.x) * a.k + b) * 3 * a.C + c + p;
        to[0] = moments[p].origin;
        to[a.C] = moments[p].mean;
        to[2 * int64_t(a.C)] = moments[p].m2;
      }
      if (c == 0) a.number[int64_t(blockIdx.x) * a.k + b] = moments[0].number;
    }
    __syncthreads();  // before the next group of channels writes
  }
}

}  // namespace fractal::cuda
