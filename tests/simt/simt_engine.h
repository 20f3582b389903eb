// Runs a grid: the scheduler of a block's threads, its barriers and its warps' collectives, and every error's words.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt_fibre.h"
#include "simt_shadow.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr size_t default_shared_bytes = 48 * 1024, max_shared_bytes = 227 * 1024;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The bytes of a launch. More than 48 KiB must be allowed explicitly, as with cudaFuncSetAttribute:
// {bytes, simt::max_shared_bytes}.
struct SharedBytes {
  size_t bytes, allowed;
  constexpr SharedBytes(size_t bytes_, size_t allowed_ = default_shared_bytes) : bytes(bytes_), allowed(allowed_) {}
};

// Barriers of whole blocks, and shuffles and votes of warps, each counted once and not per thread.
struct Statistics {
  uint64_t blocks = 0, threads = 0, barriers = 0, shuffles = 0, shared_bytes = 0;
};

namespace detail {

enum class Op : uint8_t { sync, sync_and, sync_or, sync_count, warp, idx, up, down, bfly, ballot, any, all };

inline const char* name_of(Op op) {
  static const char* const names[] = {"__syncthreads",   "__syncthreads_and", "__syncthreads_or", "__syncthreads_count",
                                      "__syncwarp",      "__shfl_sync",       "__shfl_up_sync",   "__shfl_down_sync",
                                      "__shfl_xor_sync", "__ballot_sync",     "__any_sync",       "__all_sync"};
  return names[static_cast<int>(op)];
}

constexpr const char *kBadLaunch = "bad launch", *kDivergence = "barrier divergence",
                     *kAbsentLane = "shuffle from a lane that is not there";

inline uint64_t mixed(uint64_t& state) {  // SplitMix64
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

class Order {
 public:
  explicit Order(const char* text) {
    const std::string order = text && *text ? text : "forward";
    char* end = nullptr;
    if (order == "backward") {
      backward_ = true;
    } else if (order.rfind("random:", 0) == 0 && order.size() > 7) {
      random_ = true;
      state_ = std::strtoull(order.c_str() + 7, &end, 10);
    }
    if (end ? *end != 0 : !backward_ && order != "forward")
      throw Error("simt: FRACTAL_SIMT_ORDER is '" + order + "', expected forward, backward or random:SEED");
  }
  bool random() const { return random_; }
  size_t at(size_t i, size_t n) const { return backward_ ? n - 1 - i : i; }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[mixed(state_) % i]);
  }

 private:
  bool backward_ = false, random_ = false;
  uint64_t state_ = 0;
};

class Engine {
 public:
  using Call = void (*)(const void* arguments);

  void launch(const char* name, dim3 grid, dim3 block, SharedBytes shared, Call call, const void* arguments);
  const Statistics& statistics() const { return statistics_; }

  // What follows is called by the kernel's threads.
  unsigned sync_block(Op op, bool predicate);  // how many threads' predicates hold
  uint64_t sync_warp(Op op, uint32_t mask, uint64_t value = 0, int argument = 0, int width = kWarp);
  template <bool kWrite>
  void* access(ptrdiff_t offset, size_t size, size_t alignment) {
    const bool inside = offset >= 0 && static_cast<size_t>(offset) + size <= bytes_;
    if (!inside || static_cast<size_t>(offset) % alignment) fail_address(kWrite, offset, size, alignment, inside);
    if (!shadow_.access<kWrite>(static_cast<size_t>(offset), size, current_)) fail_hazard();
    return reinterpret_cast<unsigned char*>(shared_.data()) + offset;
  }

 private:
  enum class State : uint8_t { ready, waiting, done };
  struct Thread {
    dim3 index;
    Fibre* fibre = nullptr;
    State state = State::ready;
    Op op = Op::sync;  // it waits at this one, with what follows
    uint32_t mask = 0;
    int argument = 0, width = 0;
    uint64_t value = 0, result = 0;

    bool meets(const Thread& other) const {
      return other.state == State::waiting && other.op == op && other.mask == mask;
    }
  };
  struct alignas(128) Line {
    unsigned char bytes[128];
  };
  struct Where {  // no std::string: what a failed thread holds is never freed
    char text[40];
  };

  static void body();
  void check(dim3 grid, dim3 block, SharedBytes shared) const;
  void run_block();
  void run_thread(unsigned thread);
  void complete(unsigned warp, Op op, uint32_t members);
  [[noreturn]] void stalled();
  [[noreturn]] void raise();
  [[noreturn]] void fail_address(bool write, ptrdiff_t offset, size_t size, size_t alignment, bool inside);
  [[noreturn]] void fail_hazard();
  [[noreturn, gnu::format(printf, 4, 5)]] void fail(unsigned thread, const char* kind, const char* format, ...);

  static const char* kind_of(Op op) { return op == Op::warp ? kDivergence : kAbsentLane; }
  static Where text_of(dim3 index) {
    Where where;
    std::snprintf(where.text, sizeof where.text, "(%u,%u,%u)", index.x, index.y, index.z);
    return where;
  }
  Where where(unsigned thread) const { return text_of(threads_[thread].index); }
  uint32_t lanes(unsigned warp) const {
    const auto rest = static_cast<unsigned>(threads_.size()) - warp * kWarp;
    return rest >= kWarp ? ~uint32_t{0} : (uint32_t{1} << rest) - 1;
  }

  FibrePool pool_{&Engine::body};
  Shadow shadow_;
  std::vector<Line> shared_;
  std::vector<Thread> threads_;
  std::vector<uint16_t> order_of_threads_;
  Statistics statistics_;
  Order order_{nullptr};
  Call call_ = nullptr;
  const void* arguments_ = nullptr;
  const char* name_ = nullptr;
  size_t bytes_ = 0;
  unsigned current_ = 0;  // the running thread
  unsigned done_ = 0;
  unsigned arrived_ = 0, first_ = 0;            // at the block's barrier: how many, and who came first
  uint32_t waiting_[kMaxThreads / kWarp] = {};  // the lanes of each warp that wait for a collective of it
  bool on_fibre_ = false;
  const char* kind_ = nullptr;  // of the error; none yet
  unsigned failed_ = 0;         // by this thread
  char detail_[320] = {};
};

inline Engine& engine() {
  static thread_local Engine engine;
  return engine;
}

inline thread_local Engine* running = nullptr;  // set during a launch; cheaper to read than engine()

inline Engine& kernel() {
  if (!running) throw Error("simt: a device function was called outside a kernel");
  return *running;
}

}  // namespace detail
}  // namespace simt

#include "simt_run.h"
