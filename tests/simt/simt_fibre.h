// Fibres: the threads of a block, each on a stack of its own that outlives the thread and the launch.
//
// A fibre is entered by the scheduler and leaves back to it. Its body loops for ever and runs one thread of a block
// after another, so that a thread without a barrier costs two switches and no set-up.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__) && !defined(__ILP32__) && !defined(FRACTAL_SIMT_UCONTEXT)
#define FRACTAL_SIMT_ASM 1
#else
#define FRACTAL_SIMT_ASM 0
#include <ucontext.h>

#include <cfenv>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FRACTAL_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FRACTAL_SIMT_ASAN 1
#endif
#endif
#ifdef FRACTAL_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt::detail {

#if FRACTAL_SIMT_ASM
using Context = void*;  // the stack pointer; everything else that a call preserves lies on the stack

// To the compiler this is a plain call, across which it keeps nothing in the registers that a call may change. Without
// noipa GCC concludes otherwise from the body; without no_stack_protector it writes a canary into the caller's frame.
#if defined(__clang__)
__attribute__((naked, noinline))
#else
__attribute__((naked, noipa, no_stack_protector))
#endif
inline void switch_stack(Context* /*save*/, Context /*load*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "subq $8, %rsp\n\t"
      "stmxcsr (%rsp)\n\t"
      "fnstcw 4(%rsp)\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "ldmxcsr (%rsp)\n\t"
      "fldcw 4(%rsp)\n\t"
      "addq $8, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#else
using Context = ucontext_t;
#endif

// A GPU knows no rounding mode of the caller's, and no thread sees what an earlier one on its stack has set.
inline void default_float_environment() {
#if FRACTAL_SIMT_ASM
  const uint32_t mxcsr = 0x1f80;
  const uint16_t control = 0x037f;
  asm volatile("ldmxcsr %0\n\tfldcw %1" : : "m"(mxcsr), "m"(control));
#else
  std::fesetenv(FE_DFL_ENV);
#endif
}

class Fibre {
 public:
  using Body = void (*)();  // must never return

  // Each stack starts at another cache line: stacks at equal distances would share a few sets of the cache.
  Fibre(Body body, size_t index) : body_(body), colour_(index % 64 * 64) {
    guard_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    map_ = mmap(nullptr, guard_ + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(map_, guard_, PROT_NONE);  // an overflow faults here and does not reach the next stack
    reset();
  }
  ~Fibre() {
    unpoison();
    munmap(map_, guard_ + kBytes);
  }
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Forgets whatever the stack holds, without running destructors: the next enter() starts the body afresh.
  void reset() {
    unpoison();
#if FRACTAL_SIMT_ASM
    char* top = bottom() + size();
    const uint64_t frame[] = {0x0000'037f'0000'1f80, 0, 0, 0, 0, 0, 0, reinterpret_cast<uint64_t>(&start), 0};
    context_ = std::memcpy(top - sizeof frame, frame, sizeof frame);  // start sees the stack as if called from 0
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom();
    context_.uc_stack.ss_size = size();
    context_.uc_link = nullptr;
    makecontext(&context_, &start, 0);
#endif
  }

  void enter() {
    entered_ = this;
#ifdef FRACTAL_SIMT_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, bottom(), size());
#endif
#if FRACTAL_SIMT_ASM
    switch_stack(&host_, context_);
#else
    swapcontext(&host_, &context_);
#endif
#ifdef FRACTAL_SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void leave() {
#ifdef FRACTAL_SIMT_ASAN
    __sanitizer_start_switch_fiber(&fake_, host_bottom_, host_size_);
#endif
#if FRACTAL_SIMT_ASM
    switch_stack(&context_, host_);
#else
    swapcontext(&context_, &host_);
#endif
#ifdef FRACTAL_SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_, &host_bottom_, &host_size_);
#endif
  }

 private:
  static constexpr size_t kBytes = 256 * 1024;  // AddressSanitizer's frames are large; pages never touched cost nothing

  static void start() {
    Fibre* self = entered_;
#ifdef FRACTAL_SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self->host_bottom_, &self->host_size_);
#endif
    self->body_();
    std::abort();
  }

  char* bottom() const { return static_cast<char*>(map_) + guard_; }
  size_t size() const { return kBytes - colour_; }
  void unpoison() {
#ifdef FRACTAL_SIMT_ASAN
    __asan_unpoison_memory_region(bottom(), kBytes);
#endif
  }

  static inline thread_local Fibre* entered_ = nullptr;

  Body body_;
  size_t colour_, guard_;
  void* map_;
  Context context_{}, host_{};
#ifdef FRACTAL_SIMT_ASAN
  void* fake_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
#endif
};

// Last in, first out: threads that run straight through all use one stack, which stays in the cache.
class FibrePool {
 public:
  explicit FibrePool(Fibre::Body body) : body_(body) {}

  Fibre* take() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<Fibre>(body_, all_.size()));
      free_.reserve(all_.size());
      return all_.back().get();
    }
    Fibre* fibre = free_.back();
    free_.pop_back();
    return fibre;
  }

  void give(Fibre* fibre) { free_.push_back(fibre); }

  void reset() {
    free_.clear();
    for (auto& fibre : all_) {
      fibre->reset();
      free_.push_back(fibre.get());
    }
  }

 private:
  Fibre::Body body_;
  std::vector<std::unique_ptr<Fibre>> all_;
  std::vector<Fibre*> free_;
};

}  // namespace simt::detail
