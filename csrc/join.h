// The maths of the four kernels for one site, shared by every compiled backend.
//
// A site is one output element: NP = 1 input element per branch, or the NP = 4 elements of a 2x2 pooling window.
// V is a scalar or a SIMD vector of independent sites; every function is branch-free in V.
//   z_b = (y_b - mean_b) * scale_b + shift_b          (centred first: exact where |mean| >> std)
//   out = pool(act_out(weight * sum_b pool(act_branch(z_b))))
// With and without an activation the instructions are the same, and NaN passes through.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FRACTAL_HD __host__ __device__ __forceinline__
#define FRACTAL_UNROLL _Pragma("unroll")
#else
#define FRACTAL_HD inline __attribute__((always_inline))
#define FRACTAL_UNROLL _Pragma("GCC unroll 4")  // -O2 keeps small arrays in memory without it
#endif

namespace fractal {

constexpr int kMaxBranches = 8;
constexpr float kInfinity = __builtin_huge_valf();

// The same bits as fractal_kernels.library.Flags.
enum Flag : int64_t {
  kSum = 1,         // reduction: sum instead of mean
  kReluBranch = 2,  // ReLU on each branch
  kReluOutput = 4,  // ReLU on the joined value
  kPoolBefore = 8,  // 2x2 max-pool of each branch, then join
  kPoolAfter = 16,  // 2x2 max-pool of the joined value
  kStatsLive = 32,  // statistics of a branch run over its live samples only
};

struct View {  // of a tensor: strides in elements
  void* data;
  int64_t n, c, h, w;
};

template <class V>
FRACTAL_HD V larger(V a, V m) {  // a NaN wins, as in PyTorch
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  V out;  // one instruction; comparisons and selections are four
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(m));
  return out;
#else
  return a > m ? a : (a == a ? m : a);
#endif
}

template <class V>
FRACTAL_HD V relu(V z, V floor) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return larger(z, floor);
#else
  return z < floor ? floor : z;
#endif
}

// Gradient through relu: 0 where z <= edge, as PyTorch has it.
template <class V>
FRACTAL_HD V gate(V z, V edge, V g) {
  return z <= edge ? V{} : g;
}

template <int NP, class V>
FRACTAL_HD V window_max(const V (&a)[NP]) {
  V m = a[0];
  FRACTAL_UNROLL
  for (int p = 1; p < NP; ++p) m = larger(a[p], m);
  return m;
}

// A maximum as its window's elements are compared with it: infinity for NaN, which only NaN is not below.
template <class V>
FRACTAL_HD V comparable(V m) {
#if defined(__CUDA_ARCH__)
  return fminf(m, kInfinity);  // of NaN and a number, the number
#else
  return m < V{} + kInfinity ? m : V{} + kInfinity;
#endif
}

// Splits g over the window: all of it goes to the first element that equals the maximum m, of a window that holds NaN
// to the first NaN (or an infinity before it). `out` may be `a`.
template <int NP, class V>
FRACTAL_HD void window_route(const V (&a)[NP], V m, V g, V (&out)[NP]) {
  const V top = comparable(m);
  FRACTAL_UNROLL
  for (int p = 0; p < NP; ++p) {
    const V value = a[p];
    out[p] = value < top ? V{} : g;
    g = value < top ? g : V{};
  }
}

template <class V>
struct Activation {
  V floor;  // 0 for ReLU, -infinity for none
  V edge;   // up to which there is no gradient: 0 for ReLU, NaN for none
};

struct All {  // branches live
  FRACTAL_HD constexpr bool operator()(int) const { return true; }
};

// `lives(b)`: whether a branch is in the join. What a dropped one has in `z` and, of no meaning, in `dz` is ignored.
template <class V>
struct Join {
  V weight;
  Activation<V> branch, output;
  bool pool_before;

  template <int NP, class L>
  FRACTAL_HD void joined(const V (*z)[NP], int k, L lives, V (&j)[NP]) const {
    FRACTAL_UNROLL
    for (int p = 0; p < NP; ++p) {
      j[p] = V{};
      FRACTAL_UNROLL
      for (int b = 0; b < k; ++b)
        if (lives(b)) j[p] += relu(z[b][p], branch.floor);
      j[p] *= weight;
    }
  }

  template <class L>
  FRACTAL_HD V joined_pooled(const V (*z)[4], int k, L lives) const {
    V j = V{};
    FRACTAL_UNROLL
    for (int b = 0; b < k; ++b)
      if (lives(b)) j += relu(window_max(z[b]), branch.floor);
    return j * weight;
  }

  template <class L = All>
  FRACTAL_HD V forward(const V (*z)[1], int k, L lives = {}) const {
    V j[1];
    joined(z, k, lives, j);
    return relu(j[0], output.floor);
  }

  template <class L = All>
  FRACTAL_HD V forward(const V (*z)[4], int k, L lives = {}) const {
    if (pool_before) return relu(joined_pooled(z, k, lives), output.floor);
    V j[4];
    joined(z, k, lives, j);
    return relu(window_max(j), output.floor);
  }

  // dz[b][p], the gradient at z[b][p], from the gradient g of the output. z and dz may be the same array.
  template <class L = All>
  FRACTAL_HD void backward(const V (*z)[1], int k, V g, bool gate_output, V (*dz)[1], L lives = {}) const {
    g *= weight;
    if (gate_output) {
      V j[1];
      joined(z, k, lives, j);
      g = gate(j[0], output.edge, g);
    }
    FRACTAL_UNROLL
    for (int b = 0; b < k; ++b) dz[b][0] = gate(z[b][0], branch.edge, g);
  }

  template <class L = All>
  FRACTAL_HD void backward(const V (*z)[4], int k, V g, bool gate_output, V (*dz)[4], L lives = {}) const {
    g *= weight;
    if (pool_before) {
      if (gate_output) g = gate(joined_pooled(z, k, lives), output.edge, g);
      FRACTAL_UNROLL
      for (int b = 0; b < k; ++b) {
        const V m = window_max(z[b]);
        window_route(z[b], m, gate(m, branch.edge, g), dz[b]);
      }
      return;
    }
    V j[4], routed[4];
    joined(z, k, lives, j);
    const V m = window_max(j);
    if (gate_output) g = gate(m, output.edge, g);
    window_route(j, m, g, routed);
    FRACTAL_UNROLL
    for (int b = 0; b < k; ++b) FRACTAL_UNROLL
    for (int p = 0; p < 4; ++p) dz[b][p] = gate(z[b][p], branch.edge, routed[p]);
  }
};

}  // namespace fractal
