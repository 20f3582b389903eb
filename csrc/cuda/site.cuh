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
    const W word = load_word(reinterpret_cast<const W*>(from));
    memcpy(v, &word, sizeof(v));
  }
  __device__ __forceinline__ void store(T* to) const {
    W word;
    memcpy(&word, v, sizeof(v));
    store_word(reinterpret_cast<W*>(to), word);
  }
};

__device__ __forceinline__ int64_t wide(int i) { return i; }

template <Axis A, int V>
__device__ __forceinline__ int64_t channel_offset(const Strided& view, int c) {
  return A == Axis::kChannels && V > 1 ? c : c * view.c;  // vectors are of neighbouring channels
}

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
  __device__ __forceinline__ void each(const Args& a, const Strided& view, const Walk& at, int c, const F& f) {
    T* base = static_cast<T*>(view.data) + channel_offset<A, V>(view, c) + at.n * view.n;
    if (NP == 1) {
      f(pack[0], base + wide(at.w) * (A == Axis::kPixels ? V : view.w));
      return;
    }
    const int h = 2 * at.h, w = 2 * at.w * (A == Axis::kPixels ? V : 1);
    base += wide(h) * view.h + wide(w) * view.w;
    FRACTAL_UNROLL
    for (int i = 0; i < kPacks; ++i) {
      const int row = kRows ? i : i / 2, column = kRows ? 0 : i % 2;
      if (h + row < a.H && w + column < a.W) f(pack[i], base + (wide(row) * view.h + wide(column) * view.w));
    }
  }

  __device__ __forceinline__ void load(const Args& a, const Strided& view, const Walk& at, int c) {
    each(a, view, at, c, [](Pack<T, kWidth>& p, const T* from) { p.load(from); });
  }

  __device__ __forceinline__ void store(const Args& a, const Strided& view, const Walk& at, int c) {
    each(a, view, at, c, [](const Pack<T, kWidth>& p, T* to) { p.store(to); });
  }
};

// Where the unit's vector is in the output or its gradient, which has a site for every window.
template <class T, Axis A, int V>
__device__ __forceinline__ T* output_at(const Args& a, const Walk& at, int c) {
  T* base = static_cast<T*>(a.out.data) + channel_offset<A, V>(a.out, c) + at.n * a.out.n + wide(at.h) * a.out.h;
  return base + wide(at.w) * (A == Axis::kPixels ? V : a.out.w);
}

// Whether the unit's windows have all four elements. An odd edge makes no output.
template <int NP>
__device__ __forceinline__ bool whole(const Args& a, const Walk& at) {
  return NP == 1 || (2 * at.h + 1 < a.H && 2 * at.w + 1 < a.W);
}

__device__ __forceinline__ Walk first_unit(const Args& a) {
  const int64_t unit = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, sample = int64_t(a.rows) * a.columns;
  const int n = static_cast<int>(unit / sample), within = static_cast<int>(unit - n * sample);
  return {n, within / a.columns, within % a.columns};
}

template <int NP>
__device__ __forceinline__ void advance(const Args& a, Walk& at) {  // without a division
  at.w += a.step.w;
  int more = at.w >= a.columns;
  at.w -= more ? a.columns : 0;
  if (NP == 4) {  // else a sample is one row
    at.h += a.step.h + more;
    more = at.h >= a.rows;
    at.h -= more ? a.rows : 0;
  }
  at.n += a.step.n + more;
}

// The first channel of this thread in a group of channels.
template <Axis A, int V>
__device__ __forceinline__ int channel(int group) {
  return (group * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * (A == Axis::kChannels ? V : 1);
}

// Which branches live in a sample, a bit each, and what their sum is multiplied with; read again only where the mask is
// another one.
template <int K>
struct Live {
  int sample = -1;
  unsigned bits;
  float weight;

  __device__ __forceinline__ explicit Live(const Args& a) {
    if (a.mask_n == 0) read(a, 0);
  }

  __device__ __forceinline__ void to(const Args& a, int n) {
    if (a.mask_n != 0 && n != sample) read(a, n);
  }

  __device__ __forceinline__ void read(const Args& a, int n) {
    bits = (1u << a.k) - 1;
    if (a.mask != nullptr) FRACTAL_UNROLL
    for (int b = 0; b < K; ++b)
      if (b < a.k) bits ^= a.mask[b * a.mask_k + n * a.mask_n] ? 0u : 1u << b;
    weight = a.weights[bit_count(bits)];
    sample = n;
  }
};

struct Bits {
  unsigned bits;
  __device__ __forceinline__ bool operator()(int b) const { return bits >> b & 1; }
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

__device__ __forceinline__ Join<float> join_of(const Args& a, float weight) {
  return {weight, a.branch, a.output, a.pool_before};
}

}  // namespace fractal::cuda
