// join_forward, join_backward_reduce and join_backward_apply.
//
// Grid: x walks the units of sites with a stride, y the groups of channels; blocks of kThreads threads. Every tensor is
// passed once: forward reads the live y and writes out, reduce reads grad and the live y, apply reads those again and
// writes dy. A thread loads `unroll` units of all live branches before it uses the first. Its channels' parameters and
// sums stay in registers. What a mask drops is not loaded; it counts as z = 0, which adds nothing to a join.
// Arithmetic is float32. Sums: thread, warp (shuffles), block (shared memory), one partial for each block of a column,
// always in the same order.
#pragma once
#include "site.cuh"

namespace fractal::cuda {

// Blocks that fit on a multiprocessor together: what bounds the registers of a thread.
constexpr int blocks_forward(int k, int np) { return np == 4 || k > 3 ? 2 : k == 3 ? 3 : 4; }
constexpr int blocks_apply(int k, int np) { return np == 4 || k > 2 ? 2 : 3; }
constexpr int blocks_reduce(int k, int np, Axis axis) {
  if (axis == Axis::kChannels) return k == 1 ? 3 : 2;
  return k > 3 ? 2 : np == 4 ? 4 : k == 1 ? 4 : 3;
}

constexpr int unroll(int k, int np, int v) { return np == 4 || k > 4 ? 1 : k == 1 || v == 1 ? 4 : 2; }

template <class T, int K, int NP, Axis A, int V>
struct Units {  // that a thread takes at once
  static constexpr int U = unroll(K, NP, V);
  Tile<T, NP, A, V> y[U][K];
  Walk at[U];
  unsigned live[U];
  bool there[U];

  // reads_all: dropped branches too.
  __device__ __forceinline__ void load(const Args& a, Walk& walk, Live<K>& mask, int c, bool reads_all) {
    FRACTAL_UNROLL
    for (int u = 0; u < U; ++u) {
      at[u] = walk;
      there[u] = walk.n < a.N;
      live[u] = there[u] ? mask(a, walk.n) : 0;
      advance(a, walk);
    }
    FRACTAL_UNROLL
    for (int u = 0; u < U; ++u) FRACTAL_UNROLL
    for (int b = 0; b < K; ++b) {
      const bool reads = a.reads_y && there[u] && ((live[u] >> b & 1) || (reads_all && b < a.k));
      if (NP == 4 || !reads) y[u][b].clear();
      if (reads) y[u][b].load(a, a.y[b], at[u], c);
    }
  }
};

template <class T, int K, int NP, Axis A, int V, int P>
__device__ __forceinline__ void normalise(Tile<T, NP, A, V> (&y)[K], int v, unsigned live, const Norm<K, P>& norm,
                                          float (&z)[K][NP]) {
  FRACTAL_UNROLL
  for (int b = 0; b < K; ++b) FRACTAL_UNROLL
  for (int e = 0; e < NP; ++e) {
    const float d = static_cast<float>(y[b].at(e, v)) - norm.mean[b][v % P];
    z[b][e] = live >> b & 1 ? d * norm.scale[b][v % P] + norm.shift[b][v % P] : 0.f;
  }
}

template <class T, int K, int NP, Axis A, int V>
__global__ void __launch_bounds__(kThreads, blocks_forward(K, NP)) join_forward(const __grid_constant__ Args a) {
  constexpr int P = A == Axis::kChannels ? V : 1;
  for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
    const int c = channel<A, V>(group);
    if (c >= a.C) return;
    const Norm<K, P> norm(a, c);
    Units<T, K, NP, A, V> units;
    Live<K> mask;
    for (Walk walk = first_unit(a); walk.n < a.N;) {
      units.load(a, walk, mask, c, false);
      FRACTAL_UNROLL
      for (int u = 0; u < units.U; ++u) {
        if (!units.there[u]) continue;
        const Join<float> join = join_of(a, units.live[u]);
        Pack<T, V> out;
        FRACTAL_UNROLL
        for (int v = 0; v < V; ++v) {
          float z[K][NP];
          normalise(units.y[u], v, units.live[u], norm, z);
          out.v[v] = T(join.forward(z, K));
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
__global__ void __launch_bounds__(kThreads, blocks_reduce(K, NP, A))
    join_backward_reduce(const __grid_constant__ Args a) {
  constexpr int P = A == Axis::kChannels ? V : 1;
  for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
    const int c = channel<A, V>(group);
    float sums[2 * K * P] = {};  // of dz and of dz*(y - mean), of each branch and channel
    if (c < a.C) {
      const Norm<K, P> norm(a, c);
      Units<T, K, NP, A, V> units;
      Pack<T, V> grad[units.U];
      Live<K> mask;
      for (Walk walk = first_unit(a); walk.n < a.N;) {
        units.load(a, walk, mask, c, false);
        FRACTAL_UNROLL
        for (int u = 0; u < units.U; ++u)
          if (units.there[u]) grad[u].load(output_at<T, A, V>(a, units.at[u], c));
        FRACTAL_UNROLL
        for (int u = 0; u < units.U; ++u) {
          if (!units.there[u]) continue;
          const Join<float> join = join_of(a, units.live[u]);
          FRACTAL_UNROLL
          for (int v = 0; v < V; ++v) {
            float z[K][NP];
            normalise(units.y[u], v, units.live[u], norm, z);
            join.backward(z, K, static_cast<float>(grad[u].v[v]), a.gate_output, z);
            FRACTAL_UNROLL
            for (int b = 0; b < K; ++b) FRACTAL_UNROLL
            for (int e = 0; e < NP; ++e) {
              const float dz = units.live[u] >> b & 1 ? z[b][e] : 0.f;
              const float d = static_cast<float>(units.y[u][b].at(e, v)) - norm.mean[b][v % P];
              sums[(2 * b) * P + v % P] += dz;
              sums[(2 * b + 1) * P + v % P] += units.live[u] >> b & 1 ? dz * d : 0.f;
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
__global__ void __launch_bounds__(kThreads, blocks_apply(K, NP)) join_backward_apply(const __grid_constant__ Args a) {
  constexpr int P = A == Axis::kChannels ? V : 1;
  for (int group = blockIdx.y; group < a.groups; group += gridDim.y) {
    const int c = channel<A, V>(group);
    if (c >= a.C) return;
    const Norm<K, P> norm(a, c);
    float centre[K][P], slope[K][P];  // dy = scale*dz + centre + slope*(y - mean)
    FRACTAL_UNROLL
    for (int b = 0; b < K; ++b) {
      const bool has = b < a.k && a.count != nullptr;
      const float inverse = has ? -1.f / fmaxf(a.count[b], 1.f) : 0.f;  // a division for a branch, not for a channel
      FRACTAL_UNROLL
      for (int p = 0; p < P; ++p) {
        const float factor = norm.scale[b][p] * inverse;
        centre[b][p] = has ? factor * a.sum_dz[int64_t(b) * a.C + c + p] : 0.f;
        slope[b][p] = has ? factor * a.sum_dzx[int64_t(b) * a.C + c + p] * Norm<K, P>::invstd(a, b, c + p) : 0.f;
      }
    }
    Units<T, K, NP, A, V> units;
    Pack<T, V> grad[units.U];
    Live<K> mask;
    for (Walk walk = first_unit(a); walk.n < a.N;) {
      units.load(a, walk, mask, c, a.all_samples);
      FRACTAL_UNROLL
      for (int u = 0; u < units.U; ++u) {
        grad[u] = {};
        if (units.there[u] && whole<NP>(a, units.at[u])) grad[u].load(output_at<T, A, V>(a, units.at[u], c));
      }
      FRACTAL_UNROLL
      for (int u = 0; u < units.U; ++u) {
        if (!units.there[u]) continue;
        const unsigned live = units.live[u], corrected = a.count == nullptr ? 0u : a.all_samples ? ~0u : live;
        const Join<float> join = join_of(a, live);
        FRACTAL_UNROLL
        for (int v = 0; v < V; ++v) {
          float z[K][NP];
          normalise(units.y[u], v, live, norm, z);
          join.backward(z, K, static_cast<float>(grad[u].v[v]), a.gate_output, z);
          FRACTAL_UNROLL
          for (int b = 0; b < K; ++b) FRACTAL_UNROLL
          for (int e = 0; e < NP; ++e) {
            T& y = units.y[u][b].at(e, v);
            const float d = static_cast<float>(y) - norm.mean[b][v % P];
            float dy = live >> b & 1 ? z[b][e] * norm.scale[b][v % P] : 0.f;
            if (corrected >> b & 1) dy += centre[b][v % P] + slope[b][v % P] * d;
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
