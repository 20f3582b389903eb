// join_forward, join_backward_reduce and join_backward_apply.
//
// Grid: x walks the units of sites with a stride, y the groups of channels; blocks of kThreads threads. Every tensor is
// passed once: forward reads the live y and writes out, reduce reads grad and the live y, apply reads those again and
// writes dy. A thread loads `unroll` units of all live branches before it uses the first. Its channels' parameters and
// sums stay in registers. What a mask drops is not loaded.
// Arithmetic is float32. Sums: thread, warp (shuffles), block (shared memory), one partial for each block of a column,
// always in the same order.
#pragma once
#include "site.cuh"

namespace fractal::cuda {

enum class Kernel { kStats, kForward, kReduce, kApply };

// How the kernels are cut, chosen by timing variants on an H100 for three branches. Where threads hold the parameters
// of few channels many fit, and many threads hide latency better than many loads of one.

// Elements of a load. 16 bytes; 8 where the parameters of so many channels would take too many registers.
constexpr int lanes(Kernel kernel, int itemsize, int k, int np, Axis axis) {
  int v = 16 / itemsize;
  if (kernel == Kernel::kStats) return v;
  if (axis == Axis::kPixels) return np == 4 ? v / 2 : v;
  if (kernel != Kernel::kReduce || np == 4) v /= 2;
  while (k * v > (np == 4 ? 16 : 24)) v /= 2;
  return v;
}

// Whether there is an instance of half as many lanes too: rows of pixels that 8 half-precision values do not divide are
// common, those of 14x14 images.
constexpr bool has_half(int np, Axis axis) { return np == 1 && axis == Axis::kPixels; }

#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 90;  // in the host's pass, which makes no machine code
#endif

// Blocks that fit on a multiprocessor together: what bounds the registers of a thread. The same bound spills on one
// architecture and not on another.
constexpr int blocks(Kernel kernel, int k, int np, Axis axis, int architecture) {
  if (kernel == Kernel::kStats) return axis == Axis::kPixels || architecture == 90 ? 6 : 4;
  if (kernel == Kernel::kForward) return k > 3 ? (np == 4 ? 3 : 4) : np == 4 ? 4 : k == 3 ? 6 : 7;
  if (k > 3) return k == 4 && np == 1 ? 3 : 2;
  if (kernel == Kernel::kReduce && k == 3 && np == 1 && axis == Axis::kChannels && architecture < 90) return 2;
  if (kernel == Kernel::kReduce) return np == 4 ? 4 : 6 - k;
  return np == 4 ? 3 : k == 1 ? 5 : 4;
}

// Units that a thread takes at once.
constexpr int unroll(Kernel kernel, int k, int np, int v) {
  if (kernel == Kernel::kStats) return 4;
  if (np == 4 || k > 4) return 1;
  if (v == 1) return 4;
  return kernel == Kernel::kReduce ? (k == 1 ? 2 : 1) : k == 1 ? 4 : 2;
}

template <Kernel E, class T, int K, int NP, Axis A, int V>
struct Units {
  static constexpr int U = unroll(E, K, NP, V);
  Tile<T, NP, A, V> y[U][K];
  Walk at[U];
  unsigned live[U];
  float weight[U];
  bool there[U];

  // `dropped`: bits of branches that are read where they are dropped too.
  __device__ __forceinline__ void load(const Args& a, Walk& walk, Live<K>& mask, int c, unsigned dropped) {
    FRACTAL_UNROLL
    for (int u = 0; u < U; ++u) {
      at[u] = walk;
      there[u] = walk.n < a.N;
      if (there[u]) mask.to(a, walk.n);
      live[u] = mask.bits, weight[u] = mask.weight;
      advance<NP>(a, walk);
    }
    FRACTAL_UNROLL
    for (int u = 0; u < U; ++u) FRACTAL_UNROLL
    for (int b = 0; b < K; ++b) {
      const bool reads = a.reads_y && there[u] && ((live[u] | dropped) >> b & 1);
      if (NP == 4 || !reads) y[u][b].clear();
      if (reads) y[u][b].load(a, a.y[b], at[u], c);
    }
  }
};

template <class T, int K, int NP, Axis A, int V, int P>
__device__ __forceinline__ void normalise(Tile<T, NP, A, V> (&y)[K], int v, const Norm<K, P>& norm, float (&z)[K][NP]) {
  FRACTAL_UNROLL
  for (int b = 0; b < K; ++b) FRACTAL_UNROLL
  for (int e = 0; e < NP; ++e) {
    const float d = static_cast<float>(y[b].at(e, v)) - norm.mean[b][v % P];
    z[b][e] = d * norm.scale[b][v % P] + norm.shift[b][v % P];
  }
}

template <class T, int K, int NP, Axis A, int V>
__global__ void __launch_bounds__(kThreads, blocks(Kernel::kForward, K, NP, A, kArchitecture))
    join_forward(const __grid_constant__ Args a) {
  constexpr int P = A == Axis::kChannels ? V : 1;
  for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
    const int c = channel<A, V>(group);
    if (c >= a.C) return;
    const Norm<K, P> norm(a, c);
    Units<Kernel::kForward, T, K, NP, A, V> units;
    Live<K> mask(a);
    for (Walk walk = first_unit(a); walk.n < a.N;) {
      units.load(a, walk, mask, c, 0u);
      FRACTAL_UNROLL
      for (int u = 0; u < units.U; ++u) {
        if (!units.there[u]) continue;
        const Join<float> join = join_of(a, units.weight[u]);
        const Bits live{units.live[u]};
        Pack<T, V> out;
        FRACTAL_UNROLL
        for (int v = 0; v < V; ++v) {
          float z[K][NP];
          normalise(units.y[u], v, norm, z);
          out.v[v] = T(join.forward(z, K, live));
        }
        out.store(output_at<T, A, V>(a, units.at[u], c));
      }
    }
  }
}

// Adds `values` of the threads that share threadIdx.x, into the first of them. Every thread of the block calls it.
template <int N>
__device__ __forceinline__ void block_sum(float (&values)[N]) {
  const int width = blockDim.x, thread = threadIdx.y * width + threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int offset = 16; offset >= width; offset /= 2) FRACTAL_UNROLL
  for (int i = 0; i < N; ++i) values[i] += __shfl_down_sync(0xffffffffu, values[i], offset);
  Shared<float> memory = shared<float>();
  if (lane < width && warp > 0) FRACTAL_UNROLL
  for (int i = 0; i < N; ++i) memory[((warp - 1) * N + i) * width + lane] = values[i];
  __syncthreads();
  if (threadIdx.y == 0)
    for (int w = 0; w + 1 < kThreads / 32; ++w) FRACTAL_UNROLL
  for (int i = 0; i < N; ++i) values[i] += memory[(w * N + i) * width + lane];
  __syncthreads();  // before the next group of channels writes
}

template <class T, int K, int NP, Axis A, int V>
__global__ void __launch_bounds__(kThreads, blocks(Kernel::kReduce, K, NP, A, kArchitecture))
    join_backward_reduce(const __grid_constant__ Args a) {
  constexpr int P = A == Axis::kChannels ? V : 1;
  for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
    const int c = channel<A, V>(group);
    float sums[2 * K * P] = {};  // of dz and of dz*(y - mean), of each branch and channel
    if (c < a.C) {
      const Norm<K, P> norm(a, c);
      Units<Kernel::kReduce, T, K, NP, A, V> units;
      Pack<T, V> grad[units.U];
      Live<K> mask(a);
      for (Walk walk = first_unit(a); walk.n < a.N;) {
        units.load(a, walk, mask, c, 0u);
        FRACTAL_UNROLL
        for (int u = 0; u < units.U; ++u)
          if (units.there[u]) grad[u].load(output_at<T, A, V>(a, units.at[u], c));
        FRACTAL_UNROLL
        for (int u = 0; u < units.U; ++u) {
          if (!units.there[u]) continue;
          const Join<float> join = join_of(a, units.weight[u]);
          const Bits live{units.live[u]};
          FRACTAL_UNROLL
          for (int v = 0; v < V; ++v) {
            float z[K][NP];
            normalise(units.y[u], v, norm, z);
            join.backward(z, K, static_cast<float>(grad[u].v[v]), a.gate_output, z, live);
            FRACTAL_UNROLL
            for (int b = 0; b < K; ++b) FRACTAL_UNROLL
            for (int e = 0; e < NP; ++e) {
              if (!live(b)) continue;
              const float d = static_cast<float>(units.y[u][b].at(e, v)) - norm.mean[b][v % P];
              sums[(2 * b) * P + v % P] += z[b][e];
              sums[(2 * b + 1) * P + v % P] += z[b][e] * d;
            }
          }
        }
      }
    }
    block_sum(sums);
    if (threadIdx.y == 0 && c < a.C) FRACTAL_UNROLL
    for (int b = 0; b < K; ++b)
      if (b < a.k) FRACTAL_UNROLL
    for (int p = 0; p < P; ++p) {
      float* to = a.partial + (int64_t(blockIdx.x) * 2 * a.k + 2 * b) * a.C + c + p;
      to[0] = sums[(2 * b) * P + p];
      const float dzx = sums[(2 * b + 1) * P + p];
      to[a.C] = dzx == 0.f ? 0.f : dzx * Norm<K, P>::invstd(a, b, c + p);  // of a dropped branch it may be infinite
    }
  }
}

template <class T, int K, int NP, Axis A, int V>
__global__ void __launch_bounds__(kThreads, blocks(Kernel::kApply, K, NP, A, kArchitecture))
    join_backward_apply(const __grid_constant__ Args a) {
  constexpr int P = A == Axis::kChannels ? V : 1;
  for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
    const int c = channel<A, V>(group);
    if (c >= a.C) return;
    const Norm<K, P> norm(a, c);
    float centre[K][P], slope[K][P];  // dy = scale*dz + centre + slope*(y - mean), of branches that have statistics
    unsigned counted = 0;
    FRACTAL_UNROLL
    for (int b = 0; b < K; ++b) {
      const bool has = b < a.k && a.count != nullptr && a.count[b] > 0.f;
      counted |= has ? 1u << b : 0u;
      const float inverse = has ? -1.f / a.count[b] : 0.f;  // a division for a branch, not for a channel
      FRACTAL_UNROLL
      for (int p = 0; p < P; ++p) {
        const float factor = norm.scale[b][p] * inverse;
        centre[b][p] = has ? factor * a.sum_dz[int64_t(b) * a.C + c + p] : 0.f;
        slope[b][p] = has ? factor * a.sum_dzx[int64_t(b) * a.C + c + p] * Norm<K, P>::invstd(a, b, c + p) : 0.f;
      }
    }
    Units<Kernel::kApply, T, K, NP, A, V> units;
    Pack<T, V> grad[units.U];
    Live<K> mask(a);
    for (Walk walk = first_unit(a); walk.n < a.N;) {
      units.load(a, walk, mask, c, a.all_samples ? counted : 0u);
      FRACTAL_UNROLL
      for (int u = 0; u < units.U; ++u) {
        grad[u] = {};
        if (units.there[u] && whole<NP>(a, units.at[u])) grad[u].load(output_at<T, A, V>(a, units.at[u], c));
      }
      FRACTAL_UNROLL
      for (int u = 0; u < units.U; ++u) {
        if (!units.there[u]) continue;
        const Join<float> join = join_of(a, units.weight[u]);
        const Bits live{units.live[u]}, corrected{a.all_samples ? counted : units.live[u] & counted};
        FRACTAL_UNROLL
        for (int v = 0; v < V; ++v) {
          float z[K][NP];
          normalise(units.y[u], v, norm, z);
          join.backward(z, K, static_cast<float>(grad[u].v[v]), a.gate_output, z, live);
          FRACTAL_UNROLL
          for (int b = 0; b < K; ++b) FRACTAL_UNROLL
          for (int e = 0; e < NP; ++e) {
            T& y = units.y[u][b].at(e, v);
            const float d = static_cast<float>(y) - norm.mean[b][v % P];
            float dy = corrected(b) ? centre[b][v % P] + slope[b][v % P] * d : 0.f;
            if (live(b)) dy += z[b][e] * norm.scale[b][v % P];
            y = T(dy);
          }
        }
        FRACTAL_UNROLL
        for (int b = 0; b < K; ++b)
          if (b < a.k) units.y[u][b].store(a, a.dy[b], units.at[u], c);
      }
    }
  }
}

}  // namespace fractal::cuda
