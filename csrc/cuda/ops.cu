// The CUDA launchers: what a launch is told, and where the partials of reductions are. Outputs are allocated by the
// caller (fractal_kernels/library.py), which also guarantees the layout. Nothing here reads device memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>
#include <optional>
#include <vector>

#include "../schemas.h"
#include "../tensors.h"
#include "device.h"
#include "merge.cuh"
#include "run.cuh"

namespace fractal::cuda {

extern template void run<float>(Kernel, const Plan&, const Args&, Stream);
extern template void run<c10::Half>(Kernel, const Plan&, const Args&, Stream);
extern template void run<c10::BFloat16>(Kernel, const Plan&, const Args&, Stream);

namespace {

using torch::headeronly::ScalarType;

float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

struct Norms {
  const Tensors &means, &vars, &weights, &biases;
  double eps;
};

constexpr int64_t kMost = std::numeric_limits<int>::max() - (1 << 20);  // counted in 32 bits, a step past the end too

// The view of a tensor [N][C] and a plane, as the kernels take it.
Strided strided(const Tensor& t, bool pool) {
  const View v = view_of(t, pool);
  const auto narrow = [](int64_t size, int64_t stride) {
    STD_TORCH_CHECK(size <= 1 || (stride >= 0 && stride <= kMost), "fractal_kernels cuda: expected pixels at most ",
                    kMost, " elements apart, got ", stride);
    return size <= 1 ? 0 : static_cast<int>(stride);
  };
  const int64_t rows = pool ? t.size(2) : 1, columns = pool ? t.size(3) : pixels_of(t);
  return {v.data, v.n, v.c, narrow(rows, v.h), narrow(columns, v.w)};
}

// One call of a kernel: the device's current stream, the arguments, and the plan once make() is called.
struct Call {
  Call(Kernel kernel, const Tensor& like, const Geometry& g, int64_t k, const Tensors& ys,
       const std::optional<Tensor>& mask, int64_t flags, bool channels_last)
      : kernel(kernel),
        type(like.scalar_type()),
        size(like.element_size()),
        channels_last(channels_last),
        pool(flags & (kPoolBefore | kPoolAfter)),
        device(like.get_device_index()) {
    STD_TORCH_CHECK(k >= 1 && k <= kMaxBranches, "fractal_kernels cuda: expected 1 to 8 branches, got ", k);
    STD_TORCH_CHECK(g.N <= kMost && g.H * g.W <= kMost && g.C <= kMost, "fractal_kernels cuda: expected at most ",
                    kMost, " samples, channels, and pixels in a sample, got ", g.N, ", ", g.C, " and ", g.H * g.W);
    STD_TORCH_CHECK(ys.empty() ? kernel == Kernel::kApply : static_cast<int64_t>(ys.size()) == k,
                    "fractal_kernels cuda: expected ", k, " branches, got ", ys.size());
    a.N = static_cast<int>(g.N), a.k = static_cast<int>(k), a.C = static_cast<int>(g.C);
    a.H = static_cast<int>(g.H), a.W = static_cast<int>(g.W);
    for (size_t b = 0; b < ys.size(); ++b) {
      STD_TORCH_CHECK(ys[b].scalar_type() == type, "fractal_kernels cuda: branches of different dtypes");
      check_device(ys[b]);
      a.y[b] = strided(ys[b], pool);
    }
    a.reads_y = !ys.empty();
    if (mask.has_value()) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->size(0) == k &&
                          (mask->dim() == 1 || (mask->dim() == 2 && mask->size(1) == g.N)),
                      "fractal_kernels cuda: expected a bool mask [branches] or [branches, samples]");
      check_device(*mask);
      a.mask = static_cast<const uint8_t*>(mask->data_ptr());
      a.mask_k = mask->stride(0), a.mask_n = mask->dim() == 2 ? mask->stride(1) : 0;
    }
    constexpr Activation<float> relu{0.f, 0.f};
    constexpr Activation<float> none{-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
    a.branch = flags & kReluBranch ? relu : none, a.output = flags & kReluOutput ? relu : none;
    a.gate_output = flags & kReluOutput;
    a.pool_before = flags & kPoolBefore;
    for (int live = 0; live <= kMaxBranches; ++live) a.weights[live] = flags & kSum ? 1.f : 1.f / std::max(live, 1);
  }

  void check_device(const Tensor& t) const {
    STD_TORCH_CHECK(t.get_device_index() == device.index, "fractal_kernels cuda: expected all tensors on device ",
                    device.index, ", got one on ", t.get_device_index());
  }

  const float* floats(const Tensor& t, int64_t numbers) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() >= numbers,
                    "fractal_kernels cuda: expected at least ", numbers, " contiguous float32 parameters or sums");
    check_device(t);
    return static_cast<const float*>(t.data_ptr());
  }

  void set(const float* (&to)[kMaxBranches], const Tensors& from, bool optional) const {
    STD_TORCH_CHECK((optional && from.empty()) || from.size() == static_cast<size_t>(a.k),
                    "fractal_kernels cuda: expected parameters of ", a.k, " branches, got ", from.size());
    for (size_t b = 0; b < from.size(); ++b) to[b] = floats(from[b], a.C);
  }

  void set_norms(const Norms& n) {
    const bool optional = kernel != Kernel::kReduce;
    set(a.mean, n.means, optional), set(a.var, n.vars, n.means.empty());
    set(a.weight, n.weights, true), set(a.bias, n.biases, true);
    a.eps = static_cast<float>(n.eps);
  }

  void make(bool edges) {  // edges: windows that are cut off too
    const int more = edges ? 1 : 0;
    plan = make_plan(kernel, a, size, pool ? 4 : 1, pool ? (a.H + more) / 2 : a.H, pool ? (a.W + more) / 2 : a.W,
                     channels_last, processors(device.index), architecture(device.index));
  }

  void start() {
    if ((kernel == Kernel::kForward || kernel == Kernel::kApply) && a.N == 0) return;
    if (type == ScalarType::Float)
      run<float>(kernel, plan, a, device.stream);
    else if (type == ScalarType::Half)
      run<c10::Half>(kernel, plan, a, device.stream);
    else if (type == ScalarType::BFloat16)
      run<c10::BFloat16>(kernel, plan, a, device.stream);
    else
      STD_TORCH_CHECK(false, "fractal_kernels cuda: expected float32, bfloat16 or float16");
  }

  // Starts merge(arguments) over `rows` rows of all channels.
  template <class... P, class... B>
  void merge(const char* name, void (*kernel)(P...), unsigned rows, size_t item, B... arguments) {
    const unsigned width = kMergeWidth, groups = (a.C + width - 1) / width;
    launch(device.stream, name, kernel, dim3(groups, rows), dim3(width, kMergeRows), width * kMergeRows * item,
           P(arguments)...);
  }

  Kernel kernel;
  ScalarType type;
  int size;
  bool channels_last, pool;
  Device device;
  Args a{};
  Plan plan{};
};

namespace launchers {  // the kernels have these names too

void channel_stats(Tensor mean, Tensor var, Tensor count, Tensors ys, std::optional<Tensor> mask, Tensors running,
                   double momentum, std::optional<Tensor> momenta, bool channels_last) {
  const int64_t k = ys.size();
  STD_TORCH_CHECK(k >= 1, "fractal_kernels cuda: expected 1 to 8 branches, got 0");
  Call call(Kernel::kStats, ys[0], geometry_of(ys[0], false), k, ys, mask, 0, channels_last);
  call.make(false);
  const int rows = call.plan.blocks_x, C = call.a.C;
  const Tensor partial = new_empty(mean, {rows, k, 3, C}), number = new_empty(mean, {rows, k});
  call.a.partial = mutable_floats(partial), call.a.number = mutable_floats(number);
  STD_TORCH_CHECK(running.empty() || running.size() == static_cast<size_t>(2 * k), "fractal_kernels cuda: expected ",
                  2 * k, " running statistics, got ", running.size());
  Running updated{};
  updated.momentum = static_cast<float>(momentum);
  if (momenta.has_value()) updated.momenta = call.floats(*momenta, k);
  for (size_t i = 0; i < running.size(); ++i) {
    call.floats(running[i], C);
    (i < size_t(k) ? updated.mean[i] : updated.var[i - k]) = mutable_floats(running[i]);
  }
  call.start();
  call.merge("merge_stats", merge_stats, k, sizeof(Moments), call.a.partial, call.a.number, mutable_floats(mean),
             mutable_floats(var), mutable_floats(count), updated, rows, C);
}

void join_forward(Tensor out, Tensors ys, std::optional<Tensor> mask, Tensors means, Tensors vars, Tensors weights,
                  Tensors biases, double eps, int64_t flags, bool channels_last) {
  STD_TORCH_CHECK(!ys.empty(), "fractal_kernels cuda: expected 1 to 8 branches, got 0");
  const Geometry g = geometry_of(ys[0], flags & (kPoolBefore | kPoolAfter));
  Call call(Kernel::kForward, out, g, ys.size(), ys, mask, flags, channels_last);
  call.a.out = strided(out, call.pool);
  call.set_norms({means, vars, weights, biases, eps});
  call.make(false);
  call.start();
}

void join_backward_reduce(Tensor sum_dz, Tensor sum_dzx, Tensor grad, Tensors ys, std::optional<Tensor> mask,
                          Tensors means, Tensors vars, Tensors weights, Tensors biases, double eps, int64_t flags,
                          bool channels_last) {
  const int64_t k = ys.size();
  STD_TORCH_CHECK(!ys.empty(), "fractal_kernels cuda: expected 1 to 8 branches, got 0");
  const Geometry g = geometry_of(ys[0], flags & (kPoolBefore | kPoolAfter));
  Call call(Kernel::kReduce, grad, g, k, ys, mask, flags, channels_last);
  call.a.out = strided(grad, call.pool);
  call.set_norms({means, vars, weights, biases, eps});
  call.make(false);
  const int rows = call.plan.blocks_x, C = call.a.C;
  const Tensor partial = new_empty(sum_dz, {rows, 2 * k, C});
  call.a.partial = mutable_floats(partial);
  call.start();
  call.merge("merge_sums", merge_sums, 2 * k, sizeof(float), call.a.partial, mutable_floats(sum_dz),
             mutable_floats(sum_dzx), rows, C);
}

void join_backward_apply(Tensors dys, Tensor grad, Tensors ys, std::optional<Tensor> mask, Tensors means, Tensors vars,
                         Tensors weights, Tensors biases, Tensors sums, double eps, int64_t flags, bool channels_last) {
  STD_TORCH_CHECK(!dys.empty(), "fractal_kernels cuda: expected 1 to 8 branches, got 0");
  const Geometry g = geometry_of(dys[0], flags & (kPoolBefore | kPoolAfter));
  Call call(Kernel::kApply, grad, g, dys.size(), ys, mask, flags, channels_last);
  call.a.out = strided(grad, call.pool);
  for (size_t b = 0; b < dys.size(); ++b) call.a.dy[b] = strided(dys[b], call.pool);
  call.set_norms({means, vars, weights, biases, eps});
  if (!sums.empty()) {
    STD_TORCH_CHECK(sums.size() == 3, "fractal_kernels cuda: expected 3 sums, got ", sums.size());
    const int64_t k = call.a.k, total = k * call.a.C;
    call.a.sum_dz = call.floats(sums[0], total), call.a.sum_dzx = call.floats(sums[1], total);
    call.a.count = call.floats(sums[2], k);
    call.a.all_samples = mask.has_value() && mask->dim() == 2 && !(flags & kStatsLive);
  }
  call.make(true);
  call.start();
}

}  // namespace launchers

}  // namespace

}  // namespace fractal::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(FRACTAL_NAMESPACE, m) { fractal::define_launchers(m); }

STABLE_TORCH_LIBRARY_IMPL(FRACTAL_NAMESPACE, FRACTAL_DISPATCH_KEY, m) {
  m.impl("channel_stats", TORCH_BOX(&fractal::cuda::launchers::channel_stats));
  m.impl("join_forward", TORCH_BOX(&fractal::cuda::launchers::join_forward));
  m.impl("join_backward_reduce", TORCH_BOX(&fractal::cuda::launchers::join_backward_reduce));
  m.impl("join_backward_apply", TORCH_BOX(&fractal::cuda::launchers::join_backward_apply));
}
