// The CPU kernels for baseline. The target is set after the headers, so that no shared inline function is compiled for
// it.
#include <cstdint>
#include <limits>
#include <type_traits>

#include "job.h"

#define FRACTAL_VEC_BYTES 16
#define FRACTAL_INLINE __attribute__((always_inline))
// Only an x86-64 without AVX2, from before 2013, runs these: instances for a known number of branches are not worth the
// time to compile them.
#if defined(__x86_64__)
#define FRACTAL_UNROLL_BRANCHES 0
#else
#define FRACTAL_UNROLL_BRANCHES 1
#endif

namespace fractal::cpu::baseline {
namespace {
#include "vec.h"
}  // namespace
#include "kernels.inc"
}  // namespace fractal::cpu::baseline
