// The Python module fractal_kernels._C. Importing it loads the library, whose static initialisers register the
// operators; build_info() says how it was built. No Python and no pybind11 anywhere else in csrc.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/version.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

std::string dotted(unsigned long long version) {
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

// What is compiled in, not what this machine can run: the choice is made at run time.
#if defined(__x86_64__)
constexpr const char* kSimd[] = {"avx512", "avx2", "baseline"};
#else
constexpr const char* kSimd[] = {"baseline"};
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["torch_target"] = dotted(TORCH_FEATURE_VERSION);  // the oldest PyTorch that can load this build
  info["torch_built_against"] = TORCH_VERSION;
  py::list simd;
  for (const char* name : kSimd) simd.append(name);
  info["simd"] = simd;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fractal_kernels; loading the module registers torch.ops.fractal_kernels.*";
  m.def("build_info", &build_info, "How this extension was built.");
  m.def(
      "simd_in_use", [] { return std::string(fractal::cpu::selected_isa().name); },
      "The instruction set that the CPU kernels run with on this machine.");
}
