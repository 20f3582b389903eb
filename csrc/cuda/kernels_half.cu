// The kernels for half.
#include <torch/headeronly/util/Half.h>

#include "run.cuh"

template void fractal::cuda::run<c10::Half>(Kernel, const Plan&, const Args&, Stream);
