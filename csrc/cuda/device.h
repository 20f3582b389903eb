// The device that a call runs on.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "platform.cuh"

#if defined(FRACTAL_SIMT)
#define FRACTAL_NAMESPACE fractal_kernels_simt
#define FRACTAL_DISPATCH_KEY CPU  // the test suite's runtime works on the CPU's tensors
#else
#define FRACTAL_NAMESPACE fractal_kernels_cuda
#define FRACTAL_DISPATCH_KEY CUDA
#endif

namespace fractal::cuda {

struct Device {
  explicit Device(int32_t index);  // makes it the current device, as long as this lives
  int32_t index;
  Stream stream;  // the one that is current in PyTorch
  std::shared_ptr<void> guard;
};

int processors(int32_t device);

// That the kernels which run on the current device were compiled for: 90 where __CUDA_ARCH__ was 900.
int architecture(int32_t device);

// Why kernels cannot run on a device and what to do, or an empty string.
std::string problem(int32_t device);

}  // namespace fractal::cuda
