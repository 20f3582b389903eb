// The launchers of the 3x3 convolution (conv.h): checks what the kernels rely on and cuts the work.
#include "conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "isa.h"

namespace fractal::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Of the inputs of a block: they stay in the second cache, if channels are few.
constexpr int64_t kBlockFloats = 1 << 17;
constexpr int64_t kPassFloats = 1 << 20;  // of a pass of the weight's gradient: they stay in the third
constexpr int64_t kBandFloats = 6144;     // of the rows of a direct convolution: they stay in the first
constexpr int64_t kLeastParts = 8, kMaxParts = 32;
constexpr int64_t kTilesOfWeight = 32;
// Of a weight's gradient: to bring its sums from core to core costs more than its products.
constexpr int64_t kFewTiles = 16;
constexpr int64_t kKept = 1 << 24;  // floats of a buffer that a thread keeps, at most

struct Free {
  std::vector<std::pair<int64_t, float*>> list;  // as many as were in use at once
  ~Free() {
    for (auto& [size, data] : list) release(data);
  }
  static void release(float* data) { ::operator delete(data, std::align_val_t(64)); }
};
thread_local Free free_buffers;

// A tensor [N, C, H, W] of a dtype whose channels are innermost, without gaps.
void* dense(const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 4, "conv3x3: expected ", name,
                  " of 4 dimensions and a dtype that goes with the others'");
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == stride, "conv3x3: expected ", name, " dense in channels_last");
    stride *= t.size(d);
  }
  return t.data_ptr();
}

// Transforms run along input channels, a cache line of them at a time.
bool few_channels(int64_t in) { return in < kLine; }

Conv make_conv(const Tensor& x, int64_t in, int64_t out) {
  STD_TORCH_CHECK(in > 0 && (in % kLine == 0 || few_channels(in)) && out > 0 && out % kLine == 0,
                  "conv3x3: expected channels in multiples of ", kLine, ", got ", in, " and ", out);
  Conv conv{};
  conv.N = x.size(0), conv.H = x.size(2), conv.W = x.size(3);
  conv.in = in, conv.out = out;
  const auto cut = [&](int tile) {
    conv.tile = tile, conv.across = (conv.W + tile - 1) / tile;
    conv.tiles = conv.N * ((conv.H + tile - 1) / tile) * conv.across;
    return conv.tiles * points(tile);
  };
  // The less work: a product for every tile and point, and a weight's transform takes as long as those of
  // kTilesOfWeight.
  const int64_t of_4 = cut(4) + points(4) * kTilesOfWeight, of_2 = cut(2) + points(2) * kTilesOfWeight;
  if (of_4 < of_2) cut(4);
  return conv;
}

const ConvKernels& kernels(ScalarType images, ScalarType weights) {
  constexpr auto kFloat = ScalarType::Float, kBFloat = ScalarType::BFloat16, kHalf = ScalarType::Half;
  constexpr ScalarType kOfBoth[kConvDtypes][2] = {
      {kFloat, kFloat}, {kBFloat, kBFloat}, {kHalf, kHalf}, {kBFloat, kFloat}, {kHalf, kFloat}};
  const ConvKernels* found = selected_isa().conv;
  STD_TORCH_CHECK(found != nullptr, "conv3x3: no kernel for this processor's instruction set");
  for (int i = 0; i < kConvDtypes; ++i)
    if (kOfBoth[i][0] == images && kOfBoth[i][1] == weights) return found[i];
  STD_TORCH_CHECK(false, "conv3x3: expected x float32, bfloat16 or float16, and weights of its dtype or float32");
}

const Winograd& winograd(const ConvKernels& k, const Conv& conv) {
  return conv.tile == 4 ? k.tiles_of_4 : k.tiles_of_2;
}

template <class F>
void parallel(int64_t items, const F& f) {
  if (items > 0) torch::stable::parallel_for(0, items, 1, f);
}

int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

Direct make_direct(const Conv& conv) {
  Direct job{};
  job.N = conv.N, job.H = conv.H, job.W = conv.W, job.in = conv.in, job.out = conv.out;
  job.x = conv.x, job.y = conv.y;
  job.pitch = (job.W + 2 + kRowsOfBlock) * job.in;
  job.band = std::clamp<int64_t>(kBandFloats / std::max<int64_t>(job.pitch, 1) - 2, 1, 8);
  job.bands = (job.H + job.band - 1) / job.band;
  return job;
}

void direct(const ConvKernels& k, const Conv& conv, const void* w) {
  const Direct job = make_direct(conv);
  const Buffer u(9 * job.in * job.out);
  k.direct_weights(w, job.out, job.in, u.data);
  parallel(job.N * job.bands, [&](int64_t begin, int64_t end) { k.direct_forward(job, u.data, begin, end); });
}

void direct_weight(const ConvKernels& k, const Conv& conv, const void* grad, void* dw) {
  Direct job = make_direct(conv);
  job.grad = grad;
  job.sum_row = round_up(3 * job.in, kLine);
  job.parts = std::clamp<int64_t>(job.N * job.bands / 4, 1, kMaxParts);
  const Buffer sums(job.parts * 3 * job.out * job.sum_row);
  job.sums = sums.data;
  parallel(job.parts, [&](int64_t begin, int64_t end) { k.direct_gradient(job, begin, end); });
  parallel(job.out, [&](int64_t begin, int64_t end) { k.direct_sum(job, dw, begin, end); });
}

// y = conv(x, weight [out, in, 3, 3]); turned: y, of `in` channels, is the gradient of x, from the gradient of y.
void conv3x3(Tensor y, Tensor x, Tensor weight, bool turned) {
  const int64_t out = weight.size(0), in = weight.size(1);
  Conv conv = make_conv(x, turned ? out : in, turned ? in : out);
  STD_TORCH_CHECK(x.size(1) == conv.in && y.size(1) == conv.out && y.size(0) == conv.N && y.size(2) == conv.H &&
                      y.size(3) == conv.W && weight.size(2) == 3 && weight.size(3) == 3,
                  "conv3x3: shapes of y, x and weight do not agree");
  const ScalarType dtype = x.scalar_type();
  const ConvKernels& k = kernels(dtype, weight.scalar_type());
  conv.x = dense("x", x, dtype), conv.y = dense("y", y, dtype);
  const void* w = dense("weight", weight, weight.scalar_type());
  if (conv.tiles == 0) return;
  if (few_channels(conv.in)) {
    STD_TORCH_CHECK(!turned, "conv3x3: expected channels of the gradient in multiples of ", kLine, ", got ", out);
    return direct(k, conv, w);
  }
  const Winograd& of = winograd(k, conv);
  const Filters filters{w, out, in, turned};
  const int64_t lines = conv.out / kLine;
  if (conv.tiles <= conv.out) {  // transformed weights, which are more than transformed tiles, do not leave their core
    conv.block = round_up(conv.tiles, kRowsOfBlock);
    const Buffer v(points(conv.tile) * k.plane(conv.block, conv.in));
    parallel(conv.tiles, [&](int64_t begin, int64_t end) { of.inputs(conv, v.data, begin, end); });
    parallel(lines,
             [&](int64_t begin, int64_t end) { of.channels(conv, filters, v.data, begin * kLine, end * kLine); });
    return;
  }
  const Buffer u(points(conv.tile) * weight_rows(conv.in) * conv.out);
  parallel(lines, [&](int64_t begin, int64_t end) { of.weights(filters, u.data, begin * kLine, end * kLine); });
  // Large blocks read the weights less often, but every thread is to have as many; the cut does not change a sum.
  const int64_t largest = std::clamp<int64_t>(kBlockFloats / points(conv.tile) / conv.in, 32, 256),
                threads = torch::stable::get_num_threads();
  conv.blocks = std::min(round_up((conv.tiles - 1) / largest + 1, threads), (conv.tiles - 1) / kRowsOfBlock + 1);
  conv.block = round_up((conv.tiles - 1) / conv.blocks + 1, kRowsOfBlock);
  parallel(conv.blocks, [&](int64_t begin, int64_t end) { of.forward(conv, u.data, begin, end); });
}

// Where the transformed tiles of a pass are.
struct Transformed {
  const Buffer inputs, grads;
  Transformed(const ConvKernels& k, WeightGradient& job)
      : inputs(points(job.x.tile) * k.plane(job.x.block, job.x.in)),
        grads(points(job.x.tile) * k.plane(job.x.block, job.columns)) {
    job.inputs = inputs.data, job.grads = grads.data;
  }
};

// Adds up the products of tiles [begin, end) in job.sums, a pass at a time.
template <class Parallel>
void sum_tiles(const ConvKernels& k, WeightGradient job, int64_t begin, int64_t end, const Parallel& run) {
  const Winograd& of = winograd(k, job.x);
  const int64_t planes = points(job.x.tile), block = job.x.block = std::min(job.x.block, end - begin);
  const Transformed transformed(k, job);
  job.add = false;
  for (job.first = begin; job.first < end; job.first += block, job.add = true) {
    job.count = std::min(block, end - job.first);
    run(job.count, [&](int64_t b, int64_t e) { of.gradient_tiles(job, b, e); });
    run(planes * ((job.columns + kGroup - 1) / kGroup), [&](int64_t b, int64_t e) { of.gradient_product(job, b, e); });
  }
}

// dweight [out, in, 3, 3], from x and the gradient of the output. One pass after another over all tiles; or the sum
// over parts of the batch, each of one thread. The cut depends on shapes only.
void conv3x3_weight(Tensor dweight, Tensor x, Tensor grad) {
  const int64_t out = dweight.size(0), in = dweight.size(1);
  WeightGradient job{};
  job.x = make_conv(x, in, out), job.columns = out;
  STD_TORCH_CHECK(x.size(1) == in && grad.size(1) == out && grad.size(0) == job.x.N && grad.size(2) == job.x.H &&
                      grad.size(3) == job.x.W && dweight.size(2) == 3 && dweight.size(3) == 3,
                  "conv3x3_weight: shapes of dweight, x and grad do not agree");
  const ScalarType dtype = x.scalar_type();
  const ConvKernels& k = kernels(dtype, dweight.scalar_type());
  job.x.x = dense("x", x, dtype), job.grad = dense("grad", grad, dtype);
  void* dw = dense("dweight", dweight, dweight.scalar_type());
  if (few_channels(in)) return direct_weight(k, job.x, job.grad, dw);
  const Winograd& of = winograd(k, job.x);
  const int64_t tiles = job.x.tiles, of_tile = points(job.x.tile), size = of_tile * in * out,
                floats = of_tile * (in + out);
  if (of.gradient_channels != nullptr && tiles <= kFewTiles) {  // the sums do not leave their core
    job.x.block = job.count = tiles, job.parts = 1;
    const Transformed transformed(k, job);
    parallel(tiles, [&](int64_t begin, int64_t end) { of.gradient_tiles(job, begin, end); });
    parallel(out / kLine,
             [&](int64_t begin, int64_t end) { of.gradient_channels(job, dw, begin * kLine, end * kLine); });
    return;
  }
  // Passes move the transformed values from core to core, parts their sums: parts where these are the fewer, unless
  // they are so few that cores would have none.
  const int64_t most = std::min(tiles * floats / (8 * size), kMaxParts);
  for (job.parts = 1; most >= kLeastParts && 2 * job.parts <= most;) job.parts *= 2;
  const Buffer sums(job.parts * size);
  job.sums = sums.data;
  if (job.parts == 1) {
    job.x.block = std::max<int64_t>(kPassFloats / floats, 64);
    sum_tiles(k, job, 0, tiles, [](int64_t items, const auto& f) { parallel(items, f); });
  } else {
    job.x.block = std::max<int64_t>(kBlockFloats / floats, 64);
    parallel(job.parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        WeightGradient own = job;
        own.sums += part * size;
        sum_tiles(k, own, tiles * part / job.parts, tiles * (part + 1) / job.parts,
                  [](int64_t items, const auto& f) { f(0, items); });
      }
    });
  }
  parallel(out, [&](int64_t begin, int64_t end) { of.gradient_weights(job, dw, begin, end); });
}

}  // namespace

Buffer::Buffer(int64_t size) : data(nullptr), size_(size) {
  auto& list = free_buffers.list;
  if (!list.empty()) {  // the smallest that is large enough, or the largest
    auto best = list.begin();
    for (auto it = best; it != list.end(); ++it)
      if (best->first < size ? it->first > best->first : it->first >= size && it->first < best->first) best = it;
    if (best->first >= size)
      size_ = best->first, data = best->second;
    else
      Free::release(best->second);
    list.erase(best);
  }
  if (data == nullptr) data = static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t(64)));
}

Buffer::~Buffer() {
  try {
    if (size_ <= kKept) free_buffers.list.emplace_back(size_, data), data = nullptr;
  } catch (...) {  // no memory for the list
  }
  if (data != nullptr) Free::release(data);
}

}  // namespace fractal::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fractal_kernels_cpu, m) {
  m.def("conv3x3(Tensor(a!) y, Tensor x, Tensor weight, bool turned) -> ()");
  m.def("conv3x3_weight(Tensor(a!) dweight, Tensor x, Tensor grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fractal_kernels_cpu, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&fractal::cpu::conv3x3));
  m.impl("conv3x3_weight", TORCH_BOX(&fractal::cpu::conv3x3_weight));
}
