// The CPU kernels for avx512. The target is set after the standard headers, so that no inline function
// that other translation units share is compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2,fma,f16c")
#endif
#include "conv.h"
#include "job.h"  // under the target: a template takes that of its definition

#define FRACTAL_VEC_BYTES 64
#define FRACTAL_INLINE __attribute__((always_inline))
#define FRACTAL_UNROLL_BRANCHES 1

namespace fractal::cpu::avx512 {
namespace {
#include "vec.h"
}  // namespace
#include "conv.inc"
#include "kernels.inc"
}  // namespace fractal::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
