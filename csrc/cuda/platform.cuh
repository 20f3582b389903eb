// What the kernels use of a GPU: CUDA's, or that of the test suite's runtime, which executes them on the host.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(FRACTAL_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

namespace fractal::cuda {

// What a thread moves by one instruction.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};

#if defined(FRACTAL_SIMT)
template <int Words>
struct alignas(4 * Words) Vector {
  uint32_t words[Words];
};
using Word8 = Vector<2>;
using Word16 = Vector<4>;
#else
using Word8 = uint2;
using Word16 = uint4;
#endif

template <>
struct WordOf<8> {
  using Type = Word8;
};
template <>
struct WordOf<16> {
  using Type = Word16;
};
template <int Bytes>
using Word = typename WordOf<Bytes>::Type;

// Of memory that nothing writes while the kernel runs: the loads need not wait for its stores.
template <class W>
__device__ __forceinline__ W load_word(const W* from) {
#if defined(FRACTAL_SIMT)
  return *simt::aligned(from);
#else
  return __ldg(from);
#endif
}

template <class W>
__device__ __forceinline__ void store_word(W* to, W word) {
#if defined(FRACTAL_SIMT)
  simt::aligned(to);
#endif
  *to = word;
}

#if !defined(FRACTAL_SIMT)
// The compiler takes such an assignment apart, now and then, into stores of 4 bytes. No memory is clobbered that a
// kernel reads, so the loads of what comes next may be issued before.
__device__ __forceinline__ void store_word(Word8* to, Word8 word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y));
}

__device__ __forceinline__ void store_word(Word16* to, Word16 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w));
}
#endif

#if defined(FRACTAL_SIMT)
template <class T>
using Shared = simt::Shared<T>;
template <class T>
Shared<T> shared() {
  return simt::shared<T>(0);
}
inline int bit_count(unsigned bits) { return __builtin_popcount(bits); }
using Stream = void*;
#else
template <class T>
using Shared = T*;
template <class T>
__device__ __forceinline__ T* shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}
__device__ __forceinline__ int bit_count(unsigned bits) { return __popc(bits); }
using Stream = cudaStream_t;
#endif

#if defined(FRACTAL_SIMT)
void note_kernel(void* kernel);  // so that a test can tell which instances ran
#else
void check(cudaError_t error, const char* what);  // throws std::runtime_error that names what was done
#endif

template <class... P>
void launch(Stream stream, const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
            P... args) {
#if defined(FRACTAL_SIMT)
  (void)stream;
  note_kernel(reinterpret_cast<void*>(kernel));
  simt::launch(name, kernel, grid, block, shared_bytes, args...);
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
#endif
}

}  // namespace fractal::cuda
