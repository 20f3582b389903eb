// The Python module fractal_kernels._cuda. Importing it loads the library, whose static initialisers register the
// operators.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/version.h>

#include <string>

#include "device.h"

#define FRACTAL_STRINGIFY(...) #__VA_ARGS__
#define FRACTAL_STRING(...) FRACTAL_STRINGIFY(__VA_ARGS__)

namespace py = pybind11;

namespace {

std::string dotted(int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); }

py::dict build_info() {
  py::dict info;
  info["cuda"] = dotted(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  info["architectures"] = FRACTAL_STRING(FRACTAL_ARCHITECTURES);  // from setup.py
  info["torch_target"] = dotted(TORCH_FEATURE_VERSION >> 56, TORCH_FEATURE_VERSION >> 48 & 0xff);
  info["torch_built_against"] = TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of fractal_kernels; loading the module registers torch.ops.fractal_kernels_cuda.*";
  m.def("build_info", &build_info, "How this extension was built.");
  m.def("problem", &fractal::cuda::problem, "Why its kernels cannot run on a device and what to do, or nothing.",
        py::arg("device"));
}
