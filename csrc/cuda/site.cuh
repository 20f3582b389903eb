// A thread's share of the tensors. Its unit of work is a vector of V elements along one axis: V channels of a site
// (channels_last), or V sites of a channel (contiguous). A site is a pixel or, with pooling, a window of 2x2.
// V = 1 reads any strides, one element at a time.
#pragma once
#include "args.h"
#include "platform.cuh"

namespace fractal::cuda {

enum class Axis { kChannels, kPixels };

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {  // one load or store
  T v[V];

  using W = Word<sizeof(T) * V>;
  __device__ __forceinline__ void load(const T* from) {
    const W word = *reinterpret_cast<const W*>(from);
    memcpy(v, &word, sizeof(v));
  }
  __device__ __forceinline__ void store(T* to) const {
    W word;
    memcpy(&word, v, sizeof(v));
    store_word(reinterpret_cast<W*>(to), word);
  }
};

// What a thread reads of one branch for one unit. NP: elements of a site, 1 or the 4 of a window.
template <class T, int NP, Axis A, int V>
struct Tile {
  static constexpr bool kRows = NP == 4 && A == Axis::kPixels;  // a window's row is one load of neighbours
  static constexpr int kPacks = kRows ? 2 : NP, kWidth = kRows ? 2 * V : V;
  Pack<T, kWidth> pack[kPacks];

  __device__ __forceinline__ T& at(int e, int v) {
    return kRows ? pack[e / 2 % kPacks].v[(2 * v + e % 2) % kWidth] : pack[e % kPacks].v[v];
  }

  __device__ __forceinline__ void clear() {
    FRACTAL_UNROLL
    for (int i = 0; i < kPacks; ++i) FRACTAL_UNROLL
    for (int v = 0; v < kWidth; ++v) pack[i].v[v] = T(0.f);
  }

  // f(pack, where it is in memory) for the packs that are inside the tensor.
  template <class F>
  __device__ __forceinline__ void each(const Args& a, const View& view, const Walk& at, int c, const F& f) {
    T* base = static_cast<T*>(view.data) + at.n * view.n + c * view.c;
    if (NP == 1) {
      f(pack[0], base + (A == Axis::kPixels ? int64_t(at.w) * V : at.w * view.w));
      return;
    }
    const int h = 2 * at.h, w = 2 * at.w * (A == Axis::kPixels ? V : 1);
    base += h * view.h + w * view.w;
    FRACTAL_UNROLL
    for (int i = 0; i < kPacks; ++i) {
      const int row = kRows ? i : i / 2, column = kRows ? 0 : i % 2;
      if (h + row < a.H && w + column < a.W) f(pack[i], base + row * view.h + column * view.w);
    }
  }

  __device__ __forceinline__ void load(const Args& a, const View& view, const Walk& at, int c) {
    each(a, view, at, c, [](Pack<T, kWidth>& p, const T* from) { p.load(from); });
  }

  __device__ __forceinline__ void store(const Args& a, const View& view, const Walk& at, int c) {
    each(a, view, at, c, [](const Pack<T, kWidth>& p, T* to) { p.store(to); });
  }
};

// Where the unit's vector is in the output or its gradient, which has a site for every window.
template <class T, Axis A, int V>
__device__ __forceinline__ T* output_at(const Args& a, const Walk& at, int c) {
  T* base = static_cast<T*>(a.out.data) + at.n * a.out.n + c * a.out.c + at.h * a.out.h;
  return base + (A == Axis::kPixels ? int64_t(at.w) * V : at.w * a.out.w);
}

// Whether the unit's windows have all four elements. An odd edge makes no output.
template <int NP>
__device__ __forceinline__ bool whole(const Args& a, const Walk& at) {
  return NP == 1 || (2 * at.h + 1 < a.H && 2 * at.w + 1 < a.W);
}

__device__ __forceinline__ Walk first_unit(const Args& a) {
  const int64_t unit = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, sample = int64_t(a.rows) * a.columns;
  const int64_t n = unit / sample;
  const int within = static_cast<int>(unit - n * sample);
  return {n, within / a.columns, within % a.columns};
}

__device__ __forceinline__ void advance(const Args& a, Walk& at) {  // without a division
  at.w += a.step.w;
  const int row = at.w >= a.columns;
  at.w -= row ? a.columns : 0;
  at.h += a.step.h + row;
  const int sample = at.h >= a.rows;
  at.h -= sample ? a.rows : 0;
  at.n += a.step.n + sample;
}

// The first channel of this thread in a group of channels.
template <Axis A, int V>
__device__ __forceinline__ int channel(int group) {
  return (group * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * (A == Axis::kChannels ? V : 1);
}

// Which branches live in a sample, a bit each; read again only where the sample changes.
template <int K>
struct Live {
  int64_t sample = -1;
  unsigned bits = 0;

  __device__ __forceinline__ unsigned operator()(const Args& a, int64_t n) {
    if (n == sample) return bits;
    bits = (1u << a.k) - 1;
    if (a.mask != nullptr) FRACTAL_UNROLL
    for (int b = 0; b < K; ++b)
      if (b < a.k) bits ^= a.mask[b * a.mask_k + n * a.mask_n] ? 0u : 1u << b;
    sample = n;
    return bits;
  }
};

// Of K branches and the P channels of a thread: z = (y - mean)*scale + shift.
template <int K, int P>
struct Norm {
  float mean[K][P], scale[K][P], shift[K][P];

  __device__ __forceinline__ Norm(const Args& a, int c) {
    FRACTAL_UNROLL
    for (int b = 0; b < K; ++b) FRACTAL_UNROLL
    for (int p = 0; p < P; ++p) {
      const bool has = b < a.k && a.mean[b] != nullptr;
      const float r = has ? invstd(a, b, c + p) : 1.f;
      mean[b][p] = has ? a.mean[b][c + p] : 0.f;
      scale[b][p] = has && a.weight[b] != nullptr ? r * a.weight[b][c + p] : r;
      shift[b][p] = has && a.bias[b] != nullptr ? a.bias[b][c + p] : 0.f;
    }
  }

  static __device__ __forceinline__ float invstd(const Args& a, int b, int c) { return rsqrtf(a.var[b][c] + a.eps); }
};

__device__ __forceinline__ Join<float> join_of(const Args& a, unsigned live) {
  const int count = bit_count(live);
  return {a.sum ? 1.f : 1.f / (count > 0 ? count : 1), a.floor_branch, a.floor_output, a.pool_before};
}

}  // namespace fractal::cuda
