// Stacks and the switch between them: what one emulated CUDA thread runs on.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__) || defined(MAMBA2_EMULATE_UCONTEXT)
#include <ucontext.h>
#endif

namespace mamba2::emulation {

// Pages of its own with an unmapped page below, so that an overflow faults instead of corrupting.
class Stack {
 public:
  Stack() {
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    base_ = mmap(nullptr, kBytes + page_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, page_, PROT_NONE);
  }
  Stack(Stack&& other) noexcept : base_(other.base_), page_(other.page_) { other.base_ = nullptr; }
  Stack(const Stack&) = delete;
  ~Stack() {
    if (base_) munmap(base_, kBytes + page_);
  }
  char* bottom() const { return static_cast<char*>(base_) + page_; }
  char* top() const { return bottom() + kBytes; }
  static constexpr size_t kBytes = 128 * 1024;

 private:
  void* base_;
  size_t page_;
};

#if defined(__x86_64__) && !defined(MAMBA2_EMULATE_UCONTEXT)

// A suspended computation: its stack pointer, with the callee-saved registers on the stack.
struct Context {
  void* sp = nullptr;
};

// Saves the caller in *from and resumes *to. `noipa`: the compiler must not look inside and
// conclude that caller-saved registers survive.
#if defined(__clang__)
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa))
#endif
inline void switch_context(Context*, Context*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

// Makes *context start `entry` on `stack`; entry never returns.
inline void prepare_context(Context* context, const Stack& stack, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(stack.top());
  *--sp = nullptr;  // keeps the stack 16-byte aligned at the call of entry
  *--sp = nullptr;
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context->sp = sp;
}

#else

struct Context {
  ucontext_t uc;
};
inline void switch_context(Context* from, Context* to) { swapcontext(&from->uc, &to->uc); }
inline void prepare_context(Context* context, const Stack& stack, void (*entry)()) {
  getcontext(&context->uc);
  context->uc.uc_stack.ss_sp = stack.bottom();
  context->uc.uc_stack.ss_size = Stack::kBytes;
  context->uc.uc_link = nullptr;
  makecontext(&context->uc, entry, 0);
}

#endif

}  // namespace mamba2::emulation
