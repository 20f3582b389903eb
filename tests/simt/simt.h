// A SIMT runtime on the CPU: CUDA C++ kernels compiled as host C++17 run here, checked, without a GPU.
//
//   g++ -std=c++17 -DFRACTAL_SIMT -I tests/simt ...
//   simt::launch("name", kernel<float>, grid, block, shared_bytes, arguments...);   throws simt::Error
//
// The threads of a block are fibres that switch at barriers and at warp collectives only; blocks run one after another.
// FRACTAL_SIMT_ORDER=forward (the default), backward or random:SEED sets the order of threads and of blocks. Errors
// name the kernel, the block and the thread. Global memory is the host's: AddressSanitizer and
// UndefinedBehaviorSanitizer check it, and nothing looks for races there.
//
// Limits: what is not here fails to compile. All shared memory is dynamic; simt_shadow.h tells what its check misses.
// Threads that spin on memory, or wait for another block, hang. Barriers are told apart by their kind, not by their
// place in the source. Lanes of a mask beyond the end of the block are ignored, as on a GPU, and may not be read.
// rsqrtf and __fdividef are rounded better here than on a GPU.
#pragma once
#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt_engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // nothing: libstdc++ writes __attribute__((__noinline__)), which must stay valid
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

namespace simt {

// What an element of shared memory yields. Only a temporary converts: `auto v = p[i]` compiles but v cannot be used, so
// that nobody keeps a reference where the GPU's compiler makes a copy.
template <class T>
class Ref {
 public:
  using Value = std::remove_const_t<T>;
  static_assert(std::is_trivially_copyable_v<Value>);

  explicit Ref(ptrdiff_t offset) : offset_(offset) {}
  Ref(const Ref&) = delete;

  operator Value() && {
    Value value;
    std::memcpy(&value, detail::kernel().access<false>(offset_, sizeof value, alignof(Value)), sizeof value);
    return value;
  }
  void operator=(const Value& value) && {
    static_assert(!std::is_const_v<T>, "this shared memory is const here");
    std::memcpy(detail::kernel().access<true>(offset_, sizeof value, alignof(Value)), &value, sizeof value);
  }
  void operator=(Ref&& other) && { Ref{offset_} = static_cast<Value>(std::move(other)); }
  void operator+=(const Value& value) && { Ref{offset_} = static_cast<Value>(Value(Ref{offset_}) + value); }

 private:
  ptrdiff_t offset_;
};

// A pointer to shared memory. It may point anywhere; accesses are checked.
template <class T>
class Shared {
 public:
  Shared() = default;
  explicit Shared(ptrdiff_t offset) : offset_(offset) {}

  Ref<T> operator*() const { return Ref<T>(offset_); }
  Ref<T> operator[](ptrdiff_t i) const { return *(*this + i); }
  Shared operator+(ptrdiff_t n) const { return Shared(offset_ + n * static_cast<ptrdiff_t>(sizeof(T))); }
  Shared operator-(ptrdiff_t n) const { return *this + -n; }
  Shared& operator+=(ptrdiff_t n) { return *this = *this + n; }
  operator Shared<const T>() const { return Shared<const T>(offset_); }

 private:
  ptrdiff_t offset_ = 0;
};

template <class T>
Shared<T> shared(size_t byte_offset) {
  return Shared<T>(static_cast<ptrdiff_t>(byte_offset));
}

// Runs the whole grid on this OS thread. Arguments become the kernel's parameters once and are copied for each thread.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, SharedBytes shared_bytes, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  static_assert(((!std::is_reference_v<P> && std::is_trivially_copyable_v<P>) && ...), "kernels take plain values");
  using Arguments = std::tuple<void (*)(P...), std::tuple<P...>>;
  const Arguments arguments(kernel, std::tuple<P...>(std::forward<A>(args)...));
  const auto call = [](const void* erased) {
    const auto& [function, values] = *static_cast<const Arguments*>(erased);
    std::apply(function, values);
  };
  detail::engine().launch(name, grid, block, shared_bytes, call, &arguments);
}

// Of this OS thread's last launch; where that failed, of its blocks before.
inline const Statistics& last_launch() { return detail::engine().statistics(); }

namespace detail {

template <class T>
T shuffle(Op op, unsigned mask, T value, int argument, int width) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = kernel().sync_warp(op, mask, bits, argument, width);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace detail
}  // namespace simt

constexpr int warpSize = 32;

inline void __syncthreads() { simt::detail::kernel().sync_block(simt::detail::Op::sync, false); }
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(simt::detail::kernel().sync_block(simt::detail::Op::sync_count, predicate != 0));
}
inline int __syncthreads_and(int predicate) {
  return simt::detail::kernel().sync_block(simt::detail::Op::sync_and, predicate == 0) == 0;
}
inline int __syncthreads_or(int predicate) {
  return simt::detail::kernel().sync_block(simt::detail::Op::sync_or, predicate != 0) != 0;
}

inline void __syncwarp(unsigned mask = ~0u) { simt::detail::kernel().sync_warp(simt::detail::Op::warp, mask); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return simt::detail::shuffle(simt::detail::Op::idx, mask, value, source, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return simt::detail::shuffle(simt::detail::Op::up, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return simt::detail::shuffle(simt::detail::Op::down, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  return simt::detail::shuffle(simt::detail::Op::bfly, mask, value, lane_mask, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(simt::detail::kernel().sync_warp(simt::detail::Op::ballot, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::detail::kernel().sync_warp(simt::detail::Op::any, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::detail::kernel().sync_warp(simt::detail::Op::all, mask, predicate != 0));
}

// Atomic between OS threads too: several may launch at once.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace simt {

// Of a load or store of global memory: a GPU stops at an address that is not a multiple of its size, and a CPU does
// not.
template <class T>
T* aligned(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) throw std::runtime_error("misaligned global address");
  return address;
}

}  // namespace simt

// A macro, because newer C libraries declare a function of this name.
#define rsqrtf(x) __frsqrt_rn(x)
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fdividef(float x, float y) { return x / y; }

#define FRACTAL_SIMT_MIN_MAX(T)                       \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
FRACTAL_SIMT_MIN_MAX(int)
FRACTAL_SIMT_MIN_MAX(unsigned)
FRACTAL_SIMT_MIN_MAX(long)
FRACTAL_SIMT_MIN_MAX(unsigned long)
FRACTAL_SIMT_MIN_MAX(long long)
FRACTAL_SIMT_MIN_MAX(unsigned long long)
#undef FRACTAL_SIMT_MIN_MAX
