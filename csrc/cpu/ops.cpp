// The CPU launchers: checks what the kernels rely on, lays out the job, cuts it into units, and finalises reductions.
// Outputs are allocated by the caller (fractal_kernels/library.py), which also guarantees the layout.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../schemas.h"
#include "../tensors.h"
#include "isa.h"
#include "job.h"

namespace fractal::cpu {

using torch::headeronly::ScalarType;

namespace {

constexpr int64_t kUnitBytes = 16384;  // of one branch: a unit stays in L1 for the second pass of the statistics
constexpr int64_t kGrain = 16384;      // elements of one branch that are worth a thread
constexpr int64_t kBlockRows = 128;    // pixels of a partial of a reduction, so that merging stays a small part of it
constexpr int64_t kMaxBlocks = 64;     // one thread merges them
constexpr int64_t kShortRow = 128;     // bytes of a row of channels
constexpr int64_t kPastCaches = 24 << 20;  // tensors of this size together are taken to leave none of the output in one

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, "fractal_kernels cpu: expected float32, float64, bfloat16 or float16");
  }
}

Job make_job(Kernel kernel, const Tensor& like, Geometry g, const Tensors& ys, int64_t k,
             const std::optional<Tensor>& mask, int64_t flags, bool channels_last) {
  STD_TORCH_CHECK(k >= 1 && k <= kMaxBranches, "fractal_kernels cpu: expected 1 to 8 branches, got ", k);
  Job job{};
  job.kernel = kernel;
  job.dtype = dtype_of(like);
  job.channels_last = channels_last;
  job.pool = flags & (kPoolBefore | kPoolAfter);
  job.flags = flags;
  job.k = static_cast<int>(k);
  job.N = g.N, job.C = g.C, job.H = g.H, job.W = g.W;
  job.Ho = job.pool ? g.H / 2 : g.H;
  job.Wo = job.pool ? g.W / 2 : g.W;
  job.reads_y = !ys.empty();
  for (size_t b = 0; b < ys.size(); ++b) {
    STD_TORCH_CHECK(ys[b].scalar_type() == like.scalar_type(), "fractal_kernels cpu: branches of different dtypes");
    job.y[b] = view_of(ys[b], job.pool);
  }
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->size(0) == k,
                    "fractal_kernels cpu: expected a contiguous bool mask with one row per branch");
    job.mask = static_cast<const bool*>(mask->data_ptr());
    job.mask_k = mask->dim() == 2 ? mask->size(1) : 1;
    job.mask_n = mask->dim() == 2 ? 1 : 0;
  }
  const int64_t bytes = std::max<int64_t>(1, job.C * static_cast<int64_t>(like.element_size()));
  job.unit_rows = std::max<int64_t>(1, kUnitBytes / bytes);
  job.short_rows = bytes <= kShortRow;
  bool one_axis = kernel == Kernel::kStats && channels_last && job.mask_n == 0;
  for (int b = 0; b < job.k; ++b) one_axis &= job.N == 1 || job.y[b].n == job.W * job.y[b].w;
  if (one_axis) job.W = job.Wo = job.N * job.W, job.N = 1;  // samples follow each other: longer units
  if (!channels_last)
    job.units_per_sample = job.C;
  else if (job.pool)
    job.units_per_sample = job.Ho;
  else
    job.units_per_sample = (job.Wo + job.unit_rows - 1) / job.unit_rows;
  job.units = job.Wo * job.Ho == 0 ? 0 : job.N * job.units_per_sample;
  return job;
}

// Cuts the units into `count` runs; the cut depends on shapes only, so that sums do not depend on the thread count.
struct Blocks {
  int64_t count, units;
  Blocks(const Job& job) : units(job.units) {
    count = std::min({units, kMaxBlocks, std::max<int64_t>(1, job.N * job.H * job.W / kBlockRows)});
  }
  int64_t begin(int64_t block) const { return units * block / count; }
};

template <class F>
void parallel(const Job& job, int64_t items, const F& f) {
  if (items == 0) return;
  const int64_t per_item = std::max<int64_t>(1, job.N * job.C * job.H * job.W * job.k / items);
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, kGrain / per_item), f);
}

// A store to memory that is not in a cache reads it first; past the caches it does not. In place it was just read.
bool past_caches(const Job& job, const View* outputs, int count) {
  const int64_t element = job.dtype == DType::kDouble ? 8 : job.dtype == DType::kFloat ? 4 : 2;
  const int64_t tensors = count + (job.reads_y ? job.k : 0) + (job.kernel == Kernel::kApply ? 1 : 0);
  if (job.pool || job.N * job.C * job.W * element * tensors < kPastCaches) return false;
  constexpr int64_t kAlign = 64;
  for (int b = 0; b < count; ++b) {
    const View& v = outputs[b];
    if (v.data == job.y[b].data) return false;
    if (reinterpret_cast<uintptr_t>(v.data) % kAlign) return false;
    for (int64_t stride : {job.N > 1 ? v.n : 0, job.channels_last ? v.w : v.c})
      if (stride * element % kAlign) return false;
  }
  return true;
}

void run_units(Job& job) {
  job.flat = job.channels_last && !job.pool && job.params == nullptr && job.out.w == job.C;
  for (int b = 0; b < job.k; ++b) {
    job.flat &= !job.reads_y || job.y[b].w == job.C;
    job.flat &= job.kernel == Kernel::kForward || job.dy[b].w == job.C;
  }
  const bool forward = job.kernel == Kernel::kForward;
  job.past_caches = past_caches(job, forward ? &job.out : job.dy, forward ? 1 : job.k);
  job.short_rows &= !job.past_caches;  // such stores are to fill one line after the other
  const RunFn run = selected_isa().run;
  parallel(job, job.units, [&](int64_t begin, int64_t end) { run(job, 0, begin, end, nullptr); });
}

// Per-channel parameters in the accumulator type.
template <class A>
struct Params {
  std::vector<A> all, invstd;  // [k][kParams][C], [k][C]

  Params(Job& job, const Tensors& means, const Tensors& vars, const Tensors& weights, const Tensors& biases,
         double eps) {
    if (means.empty()) return;
    const int64_t C = job.C;
    all.resize(job.k * kParams * C), invstd.resize(job.k * C);
    for (int b = 0; b < job.k; ++b) {
      const A* var = row(vars, b);
      const A* weight = row(weights, b);
      const A* bias = row(biases, b);
      A* const to = all.data() + b * kParams * C;
      std::memcpy(to + kMean * C, row(means, b), C * sizeof(A));
      for (int64_t c = 0; c < C; ++c) {
        const A r = A(1) / std::sqrt(var[c] + static_cast<A>(eps));
        invstd[b * C + c] = r;
        to[kScale * C + c] = weight ? r * weight[c] : r;
        to[kShift * C + c] = bias ? bias[c] : A(0);
      }
    }
    job.params = all.data();
  }

  static const A* row(const Tensors& list, int b) {
    return list.empty() ? nullptr : static_cast<const A*>(list[b].data_ptr());
  }

  // dy = scale*(dz - sum_dz/count - xhat*sum_dzx/count), xhat = (y - mean)*invstd
  void correct(Job& job, const Tensors& sums) {
    if (sums.empty()) return;
    const int64_t C = job.C;
    const A* dz = static_cast<const A*>(sums[0].data_ptr());
    const A* dzx = static_cast<const A*>(sums[1].data_ptr());
    const A* count = static_cast<const A*>(sums[2].data_ptr());
    for (int b = 0; b < job.k; ++b) {
      A* const of = all.data() + b * kParams * C;
      job.corrected[b] = count[b] > A(0);
      for (int64_t c = 0; c < C; ++c) {
        const A factor = -of[kScale * C + c] / std::max(count[b], A(1));
        of[kOffset * C + c] = factor * dz[b * C + c];
        of[kSlope * C + c] = factor * dzx[b * C + c] * invstd[b * C + c];
      }
    }
    job.corrects = true;
  }
};

template <class F>
void with_accumulator(DType dtype, const F& f) {
  if (dtype == DType::kDouble)
    f(double{});
  else
    f(float{});
}

// Merges partials, channels [C] at a time, in the order they come, in double: Chan, Golub, LeVeque 1983.
struct Moments {
  std::vector<double> count, mean, m2;
  explicit Moments(int64_t C) : count(C), mean(C), m2(C) {}

  // Of n values of channel c each, their mean relative to `origin` and sum of squared deviations.
  template <class A>
  void merge(int64_t first, int64_t channels, double n, const A* means, const A* origins, const A* m2s) {
    if (n == 0) return;
    const double total = count[first] + n, fraction = n / total, product = count[first] * fraction;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = double(means[c]) + origins[c] - mean[first + c];
      mean[first + c] += delta * fraction;
      m2[first + c] += m2s[c] + delta * delta * product;
      count[first + c] = total;
    }
  }
};

// Running means, then variances, of all branches; or none. A branch without values keeps its own.
struct Running {
  const Tensors& tensors;
  double momentum;
  const std::optional<Tensor>& momenta;

  template <class A>
  void update(int b, const A* mean, const A* var, A values, int64_t C) const {
    if (tensors.empty() || values == 0) return;
    const A keep = momenta ? static_cast<const A*>(momenta->data_ptr())[b] : static_cast<A>(momentum);
    const A unbiased = values / std::max(values - 1, A(1));
    auto* means = static_cast<A*>(tensors[b].data_ptr());
    auto* vars = static_cast<A*>(tensors[tensors.size() / 2 + b].data_ptr());
    for (int64_t c = 0; c < C; ++c) {
      means[c] = (1 - keep) * means[c] + keep * mean[c];
      vars[c] = (1 - keep) * vars[c] + keep * (unbiased * var[c]);
    }
  }
};

template <class A>
void channel_stats_typed(const Job& job, Tensor& mean, Tensor& var, Tensor& count, const Running& running) {
  const RunFn run = selected_isa().run;
  const Blocks blocks(job);
  const int64_t C = job.C, stride = 1 + 3 * C;
  std::vector<A> partial(job.channels_last ? blocks.count * stride : 3 * job.units);
  for (int b = 0; b < job.k; ++b) {
    if (job.channels_last)
      parallel(job, blocks.count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          partial[i * stride] = 0;
          run(job, b, blocks.begin(i), blocks.begin(i + 1), partial.data() + i * stride);
        }
      });
    else
      parallel(job, job.units, [&](int64_t begin, int64_t end) { run(job, b, begin, end, partial.data()); });
    auto* mean_out = static_cast<A*>(mean.data_ptr()) + b * C;
    auto* var_out = static_cast<A*>(var.data_ptr()) + b * C;
    Moments m(C);
    if (job.channels_last)
      for (int64_t i = 0; i < blocks.count; ++i) {
        const A* p = partial.data() + i * stride;
        m.merge(0, C, p[0], p + 1, p + 1 + 2 * C, p + 1 + C);
      }
    else
      for (int64_t u = 0; u < job.units; ++u) {  // units are (sample, channel)
        const A* p = partial.data() + u;
        if (job.live(b, u / C)) m.merge(u % C, 1, job.Wo, p, p + 2 * job.units, p + job.units);
      }
    for (int64_t c = 0; c < C; ++c) {
      mean_out[c] = static_cast<A>(m.mean[c]);
      var_out[c] = m.count[c] > 0 ? static_cast<A>(m.m2[c] / m.count[c]) : A(0);
    }
    double total = 0;
    for (int64_t n = 0; n < job.N; ++n) total += job.live(b, n) ? job.Wo : 0;
    static_cast<A*>(count.data_ptr())[b] = static_cast<A>(total);
    running.update(b, mean_out, var_out, static_cast<A>(total), C);
  }
}

void channel_stats(Tensor mean, Tensor var, Tensor count, Tensors ys, std::optional<Tensor> mask, Tensors running,
                   double momentum, std::optional<Tensor> momenta, bool channels_last) {
  const Job job = make_job(Kernel::kStats, ys[0], geometry_of(ys[0], false), ys, ys.size(), mask, 0, channels_last);
  const Running updated{running, momentum, momenta};
  with_accumulator(job.dtype, [&](auto a) { channel_stats_typed<decltype(a)>(job, mean, var, count, updated); });
}

void join_forward(Tensor out, Tensors ys, std::optional<Tensor> mask, Tensors means, Tensors vars, Tensors weights,
                  Tensors biases, double eps, int64_t flags, bool channels_last) {
  const bool pool = flags & (kPoolBefore | kPoolAfter);
  Job job = make_job(Kernel::kForward, out, geometry_of(ys[0], pool), ys, ys.size(), mask, flags, channels_last);
  job.out = view_of(out, job.pool);
  with_accumulator(job.dtype, [&](auto a) {
    const Params<decltype(a)> params(job, means, vars, weights, biases, eps);
    run_units(job);
  });
}

template <class A>
void reduce_typed(const Job& job, const Params<A>& params, Tensor& sum_dz, Tensor& sum_dzx) {
  const RunFn run = selected_isa().run;
  const Blocks blocks(job);
  const int64_t C = job.C, k = job.k, stride = k * 2 * C;
  std::vector<A> partial(job.channels_last ? blocks.count * stride : job.units * k * 2);
  if (job.channels_last)
    parallel(job, blocks.count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        run(job, 0, blocks.begin(i), blocks.begin(i + 1), partial.data() + i * stride);
    });
  else
    parallel(job, job.units, [&](int64_t begin, int64_t end) { run(job, 0, begin, end, partial.data()); });
  std::vector<double> total(2 * k * C);  // of the layout of a block's partial
  if (job.channels_last)
    for (int64_t i = 0; i < blocks.count; ++i)
      for (int64_t j = 0; j < stride; ++j) total[j] += partial[i * stride + j];
  else
    for (int64_t u = 0; u < job.units; ++u)
      for (int64_t j = 0; j < 2 * k; ++j) total[j * C + u % C] += partial[u * 2 * k + j];
  auto* dz = static_cast<A*>(sum_dz.data_ptr());
  auto* dzx = static_cast<A*>(sum_dzx.data_ptr());
  for (int64_t b = 0; b < k; ++b)
    for (int64_t c = 0; c < C; ++c) {
      dz[b * C + c] = static_cast<A>(total[2 * b * C + c]);
      const double sum = total[(2 * b + 1) * C + c];  // invstd of a dropped branch may be infinite
      dzx[b * C + c] = sum == 0 ? A(0) : static_cast<A>(sum * params.invstd[b * C + c]);
    }
}

void join_backward_reduce(Tensor sum_dz, Tensor sum_dzx, Tensor grad, Tensors ys, std::optional<Tensor> mask,
                          Tensors means, Tensors vars, Tensors weights, Tensors biases, double eps, int64_t flags,
                          bool channels_last) {
  const bool pool = flags & (kPoolBefore | kPoolAfter);
  Job job = make_job(Kernel::kReduce, grad, geometry_of(ys[0], pool), ys, ys.size(), mask, flags, channels_last);
  job.out = view_of(grad, job.pool);
  with_accumulator(job.dtype, [&](auto a) {
    const Params<decltype(a)> params(job, means, vars, weights, biases, eps);
    reduce_typed(job, params, sum_dz, sum_dzx);
  });
}

void join_backward_apply(Tensors dys, Tensor grad, Tensors ys, std::optional<Tensor> mask, Tensors means, Tensors vars,
                         Tensors weights, Tensors biases, Tensors sums, double eps, int64_t flags, bool channels_last) {
  const bool pool = flags & (kPoolBefore | kPoolAfter);
  Job job = make_job(Kernel::kApply, grad, geometry_of(dys[0], pool), ys, dys.size(), mask, flags, channels_last);
  job.out = view_of(grad, job.pool);
  for (size_t b = 0; b < dys.size(); ++b) job.dy[b] = view_of(dys[b], job.pool);
  with_accumulator(job.dtype, [&](auto a) {
    Params<decltype(a)> params(job, means, vars, weights, biases, eps);
    params.correct(job, sums);
    run_units(job);
  });
}

// Of this machine, widest first.
std::vector<Isa> supported_isas() {
  std::vector<Isa> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    list.push_back({"avx512", avx512::run, avx512::conv_kernels});
  if (avx2) list.push_back({"avx2", avx2::run, avx2::conv_kernels});
#endif
  list.push_back({"baseline", baseline::run, nullptr});
  return list;
}

}  // namespace

const Isa& selected_isa() {
  static const Isa isa = [] {
    const char* name = std::getenv("FRACTAL_CPU_ISA");  // for tests: a narrower set than the machine has
    for (const Isa& candidate : supported_isas())
      if (name == nullptr || std::string(name) == candidate.name) return candidate;
    return supported_isas().back();
  }();
  return isa;
}

}  // namespace fractal::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fractal_kernels_cpu, m) { fractal::define_launchers(m); }

STABLE_TORCH_LIBRARY_IMPL(fractal_kernels_cpu, CPU, m) {
  m.impl("channel_stats", TORCH_BOX(&fractal::cpu::channel_stats));
  m.impl("join_forward", TORCH_BOX(&fractal::cpu::join_forward));
  m.impl("join_backward_reduce", TORCH_BOX(&fractal::cpu::join_backward_reduce));
  m.impl("join_backward_apply", TORCH_BOX(&fractal::cpu::join_backward_apply));
}
