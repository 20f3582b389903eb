// The kernels for float.
#include "run.cuh"

template void fractal::cuda::run<float>(Kernel, const Plan&, const Args&, Stream);
