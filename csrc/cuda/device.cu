#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <stdexcept>

#include "device.h"

namespace fractal::cuda {

namespace {

__global__ void nothing() {}

// Looked up when it is needed: only CUDA builds of PyTorch have it, and this library is to load with any.
Stream current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get == nullptr) throw std::runtime_error("fractal_kernels cuda: the installed PyTorch has no CUDA");
  void* stream = nullptr;
  if (get(device, &stream) != 0)
    throw std::runtime_error("fractal_kernels cuda: PyTorch has no current stream on device " + std::to_string(device));
  return static_cast<Stream>(stream);
}

std::string dotted(int version) {  // 13000 is 13.0
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

Device::Device(int32_t index)
    : index(index),
      stream(current_stream(index)),
      guard(std::make_shared<torch::stable::accelerator::DeviceGuard>(index)) {}

int processors(int32_t device) {
  static std::array<std::atomic<int>, 64> known{};  // asking the driver takes longer than a launch
  std::atomic<int>& count = known.at(device);
  if (count == 0) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device), "number of multiprocessors");
    count = value;
  }
  return count;
}

int architecture(int32_t device) {
  static std::array<std::atomic<int>, 64> known{};
  std::atomic<int>& number = known.at(device);
  if (number == 0) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, nothing), "architecture of the kernels");
    number = attributes.ptxVersion;
  }
  return number;
}

std::string problem(int32_t device) {
  int driver = 0, before = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver; install one";
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "the NVIDIA driver is for CUDA " + dotted(driver) + " and the kernels were built by CUDA " +
           dotted(CUDART_VERSION) + "; update the driver, or build with an older nvcc";
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing);
  cudaDeviceProp properties{};
  if (error != cudaSuccess) cudaGetDeviceProperties(&properties, device);
  cudaSetDevice(before);
  cudaGetLastError();
  if (error == cudaSuccess) return "";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    const std::string arch = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    return "no kernels were built for compute capability " + arch + "; build again with TORCH_CUDA_ARCH_LIST=" + arch;
  }
  return std::string("CUDA says: ") + cudaGetErrorString(error);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not find it
  throw std::runtime_error(std::string("fractal_kernels cuda: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace fractal::cuda
