// Checks of the SIMT runtime itself: what must work, what must be found, and what must raise no false alarm.
#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "selftest_errors.h"

namespace {

unsigned rank() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

__device__ __forceinline__ float warp_sum(float v) {
  for (int m = 16; m; m /= 2) v += __shfl_xor_sync(kAll, v, m);
  return v;
}

__global__ void __launch_bounds__(1024) block_sum(const float* in, float* out, int n) {
  auto part = shared<float>(0);
  float v = 0;
  for (unsigned i = threadIdx.x; i < unsigned(n); i += blockDim.x) v += __ldg(in + size_t(n) * blockIdx.x + i);
  v = warp_sum(v);
  if (threadIdx.x % warpSize == 0) part[threadIdx.x / warpSize] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = warp_sum(threadIdx.x < blockDim.x / 32 ? float(part[threadIdx.x]) : 0.f);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
  }
}

void reductions() {
  for (const unsigned threads : {32u, 96u, 1024u})
    check(("block_sum_" + std::to_string(threads)).c_str(), [&]() -> string {
      constexpr int kBlocks = 7, kN = 3000;
      vector<float> in(kBlocks * kN), out(kBlocks);
      for (size_t i = 0; i < in.size(); ++i) in[i] = 1.f / float(i % 977 + 1);
      launch("block_sum", block_sum, kBlocks, threads, threads / 32 * sizeof(float), in.data(), out.data(), kN);
      for (int b = 0; b < kBlocks; ++b) {
        double sum = 0;
        for (int i = 0; i < kN; ++i) sum += in[size_t(b) * kN + i];
        uint32_t bits;
        std::memcpy(&bits, &out[b], 4);
        std::printf("bits block_sum %u %d %08x\n", threads, b, bits);
        if (std::abs(out[b] - sum) > 1e-5 * sum) return std::to_string(out[b]) + ", not " + std::to_string(sum);
      }
      return "";
    });
}

void intrinsics() {
  check("indices", [] {
    const dim3 grid(2, 3, 2), block(5, 3, 2);
    vector<unsigned> seen(12 * 30);
    const auto kernel = +[](unsigned* seen) {
      const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      __syncthreads();
      atomicAdd(seen + b * 30 + rank(), b * 30 + rank() + 1);
    };
    launch("indices", kernel, grid, block, 0, seen.data());
    vector<unsigned> expected(12 * 30);
    for (unsigned i = 0; i < expected.size(); ++i) expected[i] = i + 1;
    return same(seen, expected);
  });
  check("shuffles", [] {
    vector<int> got(5 * 32), expected(5 * 32);
    const auto kernel = +[](int* out) {
      const int l = int(threadIdx.x);
      out[l] = __shfl_sync(kAll, l, l * 3);
      out[32 + l] = __shfl_up_sync(kAll, l, 3, 8);
      out[64 + l] = __shfl_down_sync(kAll, l, 3, 16);
      out[96 + l] = __shfl_xor_sync(kAll, l, 5);
      out[128 + l] = int(__shfl_sync(kAll, double(l) / 2, 7, 8) * 2);
    };
    launch("shuffles", kernel, 1, 32, 0, got.data());
    for (int l = 0; l < 32; ++l) {
      expected[l] = l * 3 % 32;
      expected[32 + l] = l % 8 < 3 ? l : l - 3;
      expected[64 + l] = l % 16 > 12 ? l : l + 3;
      expected[96 + l] = l ^ 5;
      expected[128 + l] = l / 8 * 8 + 7;
    }
    return same(got, expected);
  });
  check("votes", [] {
    vector<unsigned> got(40 * 3), expected(40 * 3);
    const auto kernel = +[](unsigned* out) {  // the second warp has 8 lanes
      const unsigned t = threadIdx.x;
      out[t] = __ballot_sync(kAll, t % 3 == 0);
      out[40 + t] = unsigned(__any_sync(kAll, t == 39));
      out[80 + t] = unsigned(__all_sync(kAll, t >= 32));
    };
    launch("votes", kernel, 1, 40, 0, got.data());
    for (unsigned t = 0; t < 40; ++t) {
      expected[t] = t < 32 ? 0x49249249 : 0x92;
      expected[40 + t] = expected[80 + t] = t >= 32;
    }
    return same(got, expected);
  });
  check("halves_of_a_warp", [] {  // different numbers of collectives in the two halves, of different masks
    vector<int> got(32), expected(32);
    const auto kernel = +[](int* out) {
      const int l = int(threadIdx.x), half = l / 16;
      const unsigned mask = half ? 0xffff0000 : 0x0000ffff;
      int v = l;
      for (int i = 0; i <= half; ++i) v = __shfl_sync(mask, v + 100, l ^ 1);
      out[l] = v;
    };
    launch("halves", kernel, 1, 32, 0, got.data());
    for (int l = 0; l < 32; ++l) expected[l] = l < 16 ? (l ^ 1) + 100 : l + 200;
    return same(got, expected);
  });
  check("counting_barriers", [] {
    vector<int> got(70 * 3), expected(70 * 3);
    const auto kernel = +[](int* out) {
      const unsigned t = threadIdx.x;
      out[t * 3] = __syncthreads_count(t % 2 ? 4 : 0);
      out[t * 3 + 1] = __syncthreads_and(t != 69);
      out[t * 3 + 2] = __syncthreads_or(t == 69);
    };
    launch("counting", kernel, 1, 70, 0, got.data());
    for (int i = 0; i < 210; ++i) expected[i] = i % 3 == 0 ? 35 : i % 3 - 1;
    return same(got, expected);
  });
  check("maths", []() -> string {
    static_assert(min(3, -1) == -1 && max(3u, 4u) == 4u && max(int64_t{1}, int64_t{2}) == 2);
    if (rsqrtf(4.f) != 0.5f || __frsqrt_rn(0.25f) != 2.f || __fdividef(1.f, 4.f) != 0.25f) return "rsqrtf, __fdividef";
    if (fmaf(2.f, 3.f, 4.f) != 10.f || fminf(1.f, 2.f) != 1.f || fmaxf(1.f, 2.f) != 2.f) return "fmaf, fminf, fmaxf";
    struct __align__(16) Four {
      float v[4];
    };
    return alignof(Four) == 16 ? "" : "__align__";
  });
  check("last_block", [] {  // the ticket by which a grid's last block finishes the others' work
    vector<unsigned> parts(9), ticket(1);
    vector<int> total(1);
    const auto kernel = +[](unsigned* parts, unsigned* ticket, int* total) {
      parts[blockIdx.x] = blockIdx.x;
      __threadfence();
      if (atomicAdd(ticket, 1u) == gridDim.x - 1)
        for (unsigned b = 0; b < gridDim.x; ++b) atomicAdd(total, int(parts[b]));
    };
    launch("last_block", kernel, 9, 1, 0, parts.data(), ticket.data(), total.data());
    return same(total, {36});
  });
}

void memory() {
  check("elements", []() -> string {
    vector<float> got(1);
    const auto kernel = +[](float* out) {
      auto p = shared<float>(16);
      *p = 1;
      p[1] = p[0];
      p[1] += 2;
      *(p + 2) = p[1] * 2.f;
      simt::Shared<const float> q = p + 3;
      q += -1;
      auto bytes = shared<unsigned char>(0);
      bytes[15] = 7;
      auto pack = shared<Pack>(32);
      pack[1] = Pack{{1, 2, 3, 4}};
      auto wide = shared<double>(32);
      wide[0] = 0.5;
      out[0] = *q + float(bytes[15]) + Pack(pack[1]).v[3] + float(wide[0]) + *(q - 2);
    };
    launch("elements", kernel, 1, 1, 64, got.data());
    return same(got, {6 + 7 + 4 + 0.5f + 1});
  });
  check("no_false_alarm", []() -> string {
    vector<int> got(64);
    const auto kernel = +[](int* out) {
      auto p = shared<int>(0), warp = shared<int>(256);
      auto bytes = shared<uint16_t>(512);
      const unsigned t = threadIdx.x;
      p[t] = int(t);
      p[t] += 1;               // a thread's own words, again and again
      bytes[t] = uint16_t(t);  // neighbours in one word
      bytes[t] = uint16_t(bytes[t] + 1);
      warp[t] = int(t);
      __syncwarp();  // warp-synchronous exchange, both ways
      const int other = warp[t ^ 1];
      __syncwarp();
      warp[t ^ 1] = other;
      __shfl_sync(kAll, 0, 0);
      const int own = warp[t];
      __syncthreads();
      int sum = own;
      for (unsigned i = 0; i < 64; ++i) sum += p[i] + bytes[i];  // many readers
      __syncthreads();
      p[63 - t] = sum;
      __syncthreads();
      out[t] = p[t];
    };
    launch("no_false_alarm", kernel, 3, 64, 1024, got.data());
    vector<int> expected(64);
    for (int t = 0; t < 64; ++t) expected[t] = 2 * 2080 + 63 - t;
    return same(got, expected);
  });
}

void launches() {
  check("large_shared", [] {
    vector<int> got(1);
    const auto kernel = +[](int* out) {
      auto p = shared<int>(simt::max_shared_bytes - 4);
      *p = 3;
      *out = *p;
    };
    launch("large", kernel, 1, 1, {simt::max_shared_bytes, simt::max_shared_bytes}, got.data());
    return same(got, {3});
  });
  check("statistics", []() -> string {
    const auto kernel = +[] {
      __syncthreads();
      __syncwarp();
      __shfl_sync(kAll, 1, 0);
    };
    launch("statistics", kernel, dim3(3, 2), 64, 100);
    const simt::Statistics s = simt::last_launch();
    return same<uint64_t>({s.blocks, s.threads, s.barriers, s.shuffles, s.shared_bytes}, {6, 384, 6, 12, 100});
  });
  check("order", []() -> string {
    constexpr unsigned kBlocks = 3, kThreads = 50, kN = kBlocks * kThreads;
    const auto kernel =
        +[](unsigned* next, unsigned* order) { order[atomicAdd(next, 1u)] = blockIdx.x * blockDim.x + threadIdx.x; };
    vector<unsigned> runs[2];
    for (auto& order : runs) {
      unsigned next = 0;
      order.resize(kN);
      launch("order", kernel, kBlocks, kThreads, 0, &next, order.data());
    }
    const char* set = std::getenv("FRACTAL_SIMT_ORDER");
    const string name = set ? set : "forward";
    vector<unsigned> expected(kN), counts(kN);
    for (unsigned i = 0; i < kN; ++i) expected[i] = name == "backward" ? kN - 1 - i : i;
    for (const unsigned i : runs[0]) counts.at(i) += 1;
    if (runs[0] != runs[1]) return "two runs differ";
    if (name.rfind("random:", 0)) return same(runs[0], expected);
    return runs[0] == expected ? "not shuffled" : same(counts, vector<unsigned>(kN, 1));
  });
  check("bad_order", []() -> string {
    const char* set = std::getenv("FRACTAL_SIMT_ORDER");
    const string before = set ? set : "forward";
    int errors = 0;
    for (const char* order : {"sideways", "random:", "random:x", "random:1x"}) {
      setenv("FRACTAL_SIMT_ORDER", order, 1);
      try {
        launch("k", +[] {}, 1, 1, 0);
      } catch (const simt::Error& e) {
        errors += string(e.what()).find(string("'") + order + "'") != string::npos;
      }
    }
    setenv("FRACTAL_SIMT_ORDER", before.c_str(), 1);
    return errors == 4 ? "" : std::to_string(errors) + " of 4 found";
  });
}

int deep(int depth) {  // needs 1 KiB for each
  volatile char local[1024];
  for (volatile char& c : local) c = char(depth % 3);
  return depth ? deep(depth - 1) + local[depth] : 0;
}

void deep_stacks() {
  vector<int> got(64);
  const auto kernel = +[](int* out) {
    out[threadIdx.x] = deep(100);
    __syncthreads();
    out[threadIdx.x] += deep(100);
  };
  launch("deep", kernel, 2, 64, 0, got.data());
  for (const int depth : got)
    if (depth != 200) throw std::runtime_error("depth " + std::to_string(depth));
}

int abandoned(int depth) {
  volatile char local[100] = {};
  if (depth == 0) __syncthreads();  // never passed
  return depth ? abandoned(depth - 1) + local[depth] : 0;
}

void stacks() {
  check("stacks_of_failed_threads", []() -> string {  // are used again, without what AddressSanitizer knew of them
    try {
      launch(
          "abandoned",
          +[] {
            if (threadIdx.x) abandoned(20);
          },
          1, 64, 0);
    } catch (const simt::Error&) {
      deep_stacks();
      return "";
    }
    return "no error";
  });
  check("deep_stacks", [] {
    deep_stacks();
    return "";
  });
}

void machinery() {
  check("rounding_stays_with_its_thread", [] {
    vector<int> got(12);
    const auto kernel = +[](int* out, bool up) {
      if (up && threadIdx.x == 1) std::fesetround(FE_UPWARD);
      __syncthreads();
      volatile float one = 1, tiny = 1e-9f;
      out[threadIdx.x] = (std::fegetround() == FE_UPWARD) + (one + tiny > one);
    };
    const int before = std::fegetround();
    for (int i = 0; i < 3; ++i) launch("rounding", kernel, 1, 4, 0, got.data() + 4 * i, i == 1);
    return same(got, {0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0}) +
           (std::fegetround() == before ? "" : "the host's has changed");
  });
  check("os_threads", [] {
    vector<string> whys(4);
    vector<std::thread> threads;
    unsigned total = 0;
    for (auto& why : whys)
      threads.emplace_back([&why, &total] {
        const auto kernel = +[](unsigned* total) {
          auto p = shared<unsigned>(0);
          p[threadIdx.x] = 1;
          __syncthreads();
          atomicAdd(total, p[63 - threadIdx.x]);
        };
        const auto bad = +[] { shared<int>(0)[0] = int(threadIdx.x); };
        for (int i = 0; i < 20 && why.empty(); ++i) try {
            launch("k", kernel, 5, 64, 256, &total);
            launch("bad", bad, 1, 2, 4);
            why = "no race found";
          } catch (const simt::Error& e) {
            if (!std::strstr(e.what(), "race in kernel 'bad'")) why = e.what();
          }
      });
    for (auto& thread : threads) thread.join();
    return whys[0] + whys[1] + whys[2] + whys[3] + same<unsigned>({total}, {4 * 20 * 5 * 64});
  });
}

}  // namespace

// What the sanitizers must find in a kernel, on a fibre's stack that has been left and entered again.
void break_rules(const string& rule) {
  vector<int> out(64);
  const auto kernel = +[](int* out, int i) {
    int local[4] = {1, 2, 3, 4};
    const int* volatile hidden = local;  // from UndefinedBehaviorSanitizer: this one is for the other
    __syncthreads();
    out[threadIdx.x] = i < 64 ? hidden[i] : out[i];
  };
  const auto overflow = +[](int* out, int i) {
    __syncthreads();
    out[threadIdx.x] = i * int(threadIdx.x + 1);
  };
  if (rule == "heap") launch("heap", kernel, 1, 64, 0, out.data(), 64);
  if (rule == "stack") launch("stack", kernel, 1, 64, 0, out.data(), 4);
  if (rule == "integer") launch("integer", overflow, 1, 64, 0, out.data(), 0x7fffffff);
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what passed is seen even if a sanitizer ends the program
  if (argc > 1) {
    break_rules(argv[1]);
    return 0;
  }
  stacks();  // first, so that the second launch has no stacks but those of the first
  reductions();
  intrinsics();
  memory();
  launches();
  machinery();
  wrong_memory();
  divergence();
  wrong_launches();
  reductions();  // once more, after every kind of failure
  return failed;
}
