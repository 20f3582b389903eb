// The members of simt::detail::Engine, in a file of their own for their length only.
#pragma once
#include "simt_engine.h"

namespace simt::detail {

inline void Engine::launch(const char* name, dim3 grid, dim3 block, SharedBytes shared, Call call,
                           const void* arguments) {
  if (running) fail(current_, kBadLaunch, "a kernel cannot launch kernel '%s'", name);
  order_ = Order(std::getenv("FRACTAL_SIMT_ORDER"));
  name_ = name;
  kind_ = nullptr;
  statistics_ = Statistics{};
  check(grid, block, shared);
  const struct Running {
    explicit Running(Engine* engine) { running = engine; }
    ~Running() { running = nullptr; }
  } scope(this);
  call_ = call;
  arguments_ = arguments;
  bytes_ = statistics_.shared_bytes = shared.bytes;
  shared_.resize((bytes_ + sizeof(Line) - 1) / sizeof(Line));
  shadow_.start_launch(bytes_);
  threads_.assign(size_t{block.x} * block.y * block.z, Thread{});
  for (unsigned t = 0; t < threads_.size(); ++t)
    threads_[t].index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
  order_of_threads_.resize(threads_.size());
  for (size_t i = 0; i < threads_.size(); ++i)
    order_of_threads_[i] = static_cast<uint16_t>(order_.at(i, threads_.size()));
  blockDim = block;
  gridDim = grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order_of_blocks(order_.random() ? blocks : 0);
  std::iota(order_of_blocks.begin(), order_of_blocks.end(), uint64_t{0});
  order_.shuffle(order_of_blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order_.random() ? order_of_blocks[i] : order_.at(i, blocks);
    blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y));
    run_block();
    statistics_.blocks += 1;
    statistics_.threads += threads_.size();
  }
}

inline void Engine::check(dim3 grid, dim3 block, SharedBytes shared) const {
  char why[160] = "";
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!block.x || !block.y || !block.z || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 ||
      threads > kMaxThreads)
    std::snprintf(why, sizeof why, "block (%u,%u,%u), expected 1 to 1024 threads, at most 64 in z", block.x, block.y,
                  block.z);
  else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    std::snprintf(why, sizeof why, "grid (%u,%u,%u), expected 1 to 2147483647, 65535, 65535", grid.x, grid.y, grid.z);
  else if (shared.allowed > max_shared_bytes)
    std::snprintf(why, sizeof why, "%zu shared bytes allowed, at most %zu can be", shared.allowed, max_shared_bytes);
  else if (shared.bytes > shared.allowed)
    std::snprintf(why, sizeof why, "%zu shared bytes, %zu allowed", shared.bytes, shared.allowed);
  if (*why) throw Error(std::string("simt: ") + kBadLaunch + " of kernel '" + name_ + "': " + why);
}

// Every pass runs each thread that can run up to its next barrier or collective, or to its end.
inline void Engine::run_block() {
  for (Line& line : shared_) std::memset(line.bytes, 0xff, sizeof line.bytes);  // NaN
  shadow_.start_block();
  for (Thread& thread : threads_) thread.state = State::ready;
  done_ = arrived_ = 0;
  std::memset(waiting_, 0, sizeof waiting_);
  while (done_ < threads_.size()) {
    bool progress = false;
    if (order_.random()) order_.shuffle(order_of_threads_);
    for (const unsigned t : order_of_threads_) {
      if (threads_[t].state != State::ready) continue;
      progress = true;
      run_thread(t);
    }
    if (!progress) stalled();
  }
}

inline void Engine::run_thread(unsigned t) {
  Thread& thread = threads_[t];
  current_ = t;
  threadIdx = thread.index;
  if (!thread.fibre) thread.fibre = pool_.take();
  on_fibre_ = true;
  thread.fibre->enter();
  on_fibre_ = false;
  if (kind_) raise();
  if (thread.state == State::done) {
    ++done_;
    pool_.give(std::exchange(thread.fibre, nullptr));
  }
}

inline void Engine::body() {
  for (;;) {
    Engine& self = *running;
    default_float_environment();
    const auto threw = [&self](const char* what) {
      self.kind_ = "exception";
      self.failed_ = self.current_;
      std::snprintf(self.detail_, sizeof self.detail_, "%s", what);
    };
    try {
      self.call_(self.arguments_);
    } catch (const std::exception& e) {
      threw(e.what());
    } catch (...) {
      threw("not a std::exception");
    }
    Thread& thread = self.threads_[self.current_];
    thread.state = State::done;
    thread.fibre->leave();
  }
}

inline unsigned Engine::sync_block(Op op, bool predicate) {
  Thread& self = threads_[current_];
  if (arrived_++ == 0) first_ = current_;
  const Op other = threads_[first_].op;
  if (first_ != current_ && op != other)
    fail(current_, kDivergence, "it waits at %s, thread %s at %s", name_of(op), where(first_).text, name_of(other));
  self.op = op;
  self.value = predicate;
  self.state = State::waiting;
  if (arrived_ < threads_.size()) {
    self.fibre->leave();
  } else {
    arrived_ = 0;
    uint64_t total = 0;
    for (const Thread& thread : threads_) total += thread.value;
    for (Thread& thread : threads_) {
      thread.state = State::ready;
      thread.result = total;
    }
    ++statistics_.barriers;
    shadow_.sync_block();
  }
  return static_cast<unsigned>(self.result);
}

inline uint64_t Engine::sync_warp(Op op, uint32_t mask, uint64_t value, int argument, int width) {
  Thread& self = threads_[current_];
  const unsigned warp = current_ / kWarp;
  const uint32_t lane = uint32_t{1} << current_ % kWarp, members = mask & lanes(warp);
  if (!(mask & lane)) fail(current_, kind_of(op), "its own lane is not in the mask 0x%08x of %s", mask, name_of(op));
  if (width < 1 || width > static_cast<int>(kWarp) || (width & (width - 1)))
    fail(current_, kind_of(op), "the width of %s is %d, expected a power of two up to 32", name_of(op), width);
  self.op = op;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  self.width = width;
  self.state = State::waiting;
  waiting_[warp] |= lane;
  bool last = (waiting_[warp] & members) == members;
  for (unsigned l = 0; last && l < kWarp; ++l)
    if (members >> l & 1) last = self.meets(threads_[warp * kWarp + l]);
  if (last)
    complete(warp, op, members);
  else
    self.fibre->leave();
  return self.result;
}

inline void Engine::complete(unsigned warp, Op op, uint32_t members) {
  Thread* const lane = &threads_[warp * kWarp];
  uint32_t ballot = 0;
  for (unsigned l = 0; l < kWarp; ++l)
    if (members >> l & 1) ballot |= uint32_t{lane[l].value != 0} << l;
  for (int l = 0; l < static_cast<int>(kWarp); ++l) {
    if (!(members >> l & 1)) continue;
    lane[l].state = State::ready;
    if (op >= Op::ballot) {
      lane[l].result = op == Op::ballot ? ballot : op == Op::any ? ballot != 0 : ballot == members;
      continue;
    }
    const int64_t argument = lane[l].argument, first = l & -lane[l].width, last = l | (lane[l].width - 1);
    int64_t source = op == Op::idx    ? first + (argument & (lane[l].width - 1))
                     : op == Op::up   ? l - argument
                     : op == Op::down ? l + argument
                     : op == Op::bfly ? l ^ argument
                                      : l;
    const bool own = op == Op::up ? source < first || argument < 0 : source < 0 || source > last;
    if (own) source = l;
    if (!(members >> source & 1))
      fail(warp * kWarp + static_cast<unsigned>(l), kAbsentLane, "%s reads lane %d, which is not of its mask or block",
           name_of(op), static_cast<int>(source));
    lane[l].result = lane[source].value;
  }
  waiting_[warp] &= ~members;
  if (op != Op::warp) ++statistics_.shuffles;
  if (members == lanes(warp)) shadow_.sync_warp(warp);
}

// No thread can run, and not all have returned: somebody waits for a thread that will never come.
inline void Engine::stalled() {
  for (unsigned t = 0; t < threads_.size(); ++t) {
    const Thread& self = threads_[t];
    if (self.state != State::waiting || self.op < Op::warp) continue;
    const unsigned first = t / kWarp * kWarp;
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!((self.mask & lanes(t / kWarp)) >> l & 1) || self.meets(threads_[first + l])) continue;
      const Thread& other = threads_[first + l];
      if (other.state == State::done)
        fail(t, kind_of(self.op), "it waits at %s for lane %u, thread %s, which has returned", name_of(self.op), l,
             where(first + l).text);
      fail(t, kDivergence, "it waits at %s, mask 0x%08x, for lane %u, thread %s, which waits at %s, mask 0x%08x",
           name_of(self.op), self.mask, l, where(first + l).text, name_of(other.op), other.mask);
    }
  }
  for (unsigned t = 0; t < threads_.size(); ++t)
    if (threads_[t].state == State::done)
      fail(first_, kDivergence, "it waits at %s, thread %s has returned", name_of(threads_[first_].op), where(t).text);
  std::abort();
}

// The stacks of a failed block are never returned to: destructors of its threads' locals do not run.
inline void Engine::fail(unsigned thread, const char* kind, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(detail_, sizeof detail_, format, values);
  va_end(values);
  kind_ = kind;
  failed_ = thread;
  if (on_fibre_) threads_[current_].fibre->leave();
  raise();
}

inline void Engine::raise() {
  pool_.reset();
  throw Error(std::string("simt: ") + kind_ + " in kernel '" + name_ + "', block " + text_of(blockIdx).text +
              ", thread " + where(failed_).text + ": " + detail_);
}

inline void Engine::fail_address(bool write, ptrdiff_t offset, size_t size, size_t alignment, bool inside) {
  const char* verb = write ? "writes" : "reads";
  if (!inside)
    fail(current_, "out of bounds", "it %s %zu bytes at shared byte offset %td, the launch has %zu", verb, size, offset,
         bytes_);
  fail(current_, "misaligned", "it %s at shared byte offset %td, which is not a multiple of %zu", verb, offset,
       alignment);
}

inline void Engine::fail_hazard() {
  const Hazard& hazard = shadow_.hazard();
  if (hazard.kind == Hazard::kUninitialised)
    fail(current_, "uninitialised read", "nothing in this block has written shared byte offset %zu", hazard.offset);
  const bool reads = hazard.kind == Hazard::kReadAfterWrite, read = hazard.kind == Hazard::kWriteAfterRead;
  fail(current_, "race", "it %s shared byte offset %zu, thread %s has %s it, and nothing synchronises the two",
       reads ? "reads" : "writes", hazard.offset, where(hazard.other).text, read ? "read" : "written");
}

}  // namespace simt::detail
