// The CPU kernels for baseline. The target is set after the headers, so that no shared inline function is compiled for
// it.
#include <cstdint>
#include <limits>
#include <type_traits>

#include "job.h"

#define FRACTAL_VEC_BYTES 16
#define FRACTAL_INLINE __attribute__((always_inline))

namespace fractal::cpu::baseline {
namespace {
#include "vec.h"
}  // namespace
#include "kernels.inc"
}  // namespace fractal::cpu::baseline
