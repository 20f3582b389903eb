// The kernels for bfloat16.
#include <torch/headeronly/util/BFloat16.h>

#include "run.cuh"

template void fractal::cuda::run<c10::BFloat16>(Kernel, const Plan&, const Args&, Stream);
