// Faults, randomness, and how an emulated thread waits and is woken.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "emulation_state.h"

namespace mamba2::emulation {

struct LaunchFault {};

inline std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
inline std::string format(const char* text, ...) {
  char buffer[512];
  va_list args;
  va_start(args, text);
  vsnprintf(buffer, sizeof buffer, text, args);
  va_end(args);
  return buffer;
}

// Ends the launch with a message. A faulty thread is left where it stands: nothing unwinds it.
template <class... Args>
[[noreturn]] void fault(const char* text, Args... args) {
  if (grid->fault.empty()) {
    grid->fault = format(text, args...);
    const Fiber* f = grid->current;
    if (const Block* at = f ? f->block : grid->ending) {
      const uint3 b = at->index;
      grid->fault += format(" [block (%u, %u, %u)", b.x, b.y, b.z);
      grid->fault += f ? format(", thread %d]", f->thread) : "]";
    }
  }
  if (!grid->current) throw LaunchFault();
  for (;;) switch_context(&grid->current->context, &grid->scheduler);
}

inline uint64_t random_bits() {
  uint64_t& s = grid->random_state;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s * 0x2545f4914f6cdd1dull >> 16;
}
inline bool one_in(uint32_t n) { return random_bits() % n == 0; }

// Something happened that another thread may be waiting for.
inline void progress() { grid->idle_spins = 0; }

inline void wake(Fiber* f) {
  Warp* w = f->warp;
  f->waits_for = nullptr;
  w->ready |= 1u << f->lane;
  if (!w->queued) {
    w->queued = true;
    grid->ready.push_back(w);
  }
  progress();
}
inline void wake_all(std::vector<Fiber*>& waiters) {
  for (Fiber* f : waiters) wake(f);
  waiters.clear();
}

// Stops the running thread until it is woken.
inline void suspend(const char* what, uint32_t detail = 0) {
  Fiber* f = grid->current;
  f->waits_for = what;
  f->detail = detail;
  switch_context(&f->context, &grid->scheduler);
}
inline void wait_in(std::vector<Fiber*>& waiters, const char* what, uint32_t detail = 0) {
  waiters.push_back(grid->current);
  suspend(what, detail);
}
// Lets other warps run; the thread stays ready.
inline void yield() {
  Fiber* f = grid->current;
  f->warp->ready |= 1u << f->lane;
  grid->preempted = true;
  switch_context(&f->context, &grid->scheduler);
}
inline void yield_sometimes() {
  if (one_in(16)) yield();
}
// Whoever lets others go on may fall behind them.
inline void yield_after_release() {
  if (one_in(2)) yield();
}
// One turn of a loop that polls memory.
inline void spin(const char* what) {
  ++grid->idle_spins;
  grid->current->waits_for = what;
  yield();
  grid->current->waits_for = nullptr;
}

// Lanes of `mask` meet; `perform(args)` runs once, with every lane's `arg`, before any goes on.
template <class F>
void meet(const char* what, uint32_t mask, void* arg, F&& perform) {
  Fiber* f = grid->current;
  Warp& w = *f->warp;
  mask &= w.existing;
  if (!(mask >> f->lane & 1)) fault("%s: the calling lane is not in the mask %08x", what, mask);
  Meeting* m = nullptr;
  for (Meeting& open : w.meetings) {
    if (!std::strcmp(open.what, what) && open.mask == mask && !(open.arrived >> f->lane & 1))
      m = &open;
  }
  if (!m) {
    w.meetings.push_back({what, mask, 0, {}});
    m = &w.meetings.back();
  }
  m->arrived |= 1u << f->lane;
  m->args[f->lane] = arg;
  if (m->arrived != mask) {
    suspend(what, mask);
    return;
  }
  Meeting complete = *m;
  w.meetings.erase(w.meetings.begin() + (m - w.meetings.data()));
  perform(complete.args);
  for (int i = 0; i < 32; ++i) {
    if (i != f->lane && (mask >> i & 1)) wake(&w.block->fibers[w.index * 32 + i]);
  }
}

// All 32 lanes meet, as `.sync.aligned` instructions demand.
template <class F>
void meet_warp(const char* what, void* arg, F&& perform) {
  if (grid->current->warp->existing != 0xffffffffu) fault("%s: the warp lacks lanes", what);
  meet(what, 0xffffffffu, arg, perform);
}

// ---- shared memory ----
inline uint32_t window_address(const void* p, size_t bytes, const char* what) {
  const char* base = grid->current->block->smem;
  const char* c = static_cast<const char*>(p);
  if (c < base || c + bytes > base + grid->smem_bytes) {
    fault("%s: address outside the block's %zu bytes of shared memory", what, grid->smem_bytes);
  }
  return kSharedWindow + static_cast<uint32_t>(c - base);
}
inline char* window_pointer(const Block& block, uint32_t address, size_t bytes, const char* what) {
  if (address < kSharedWindow || address + bytes > kSharedWindow + grid->smem_bytes) {
    fault("%s: shared-window address %u outside the block's %zu bytes", what, address,
          grid->smem_bytes);
  }
  return block.smem + (address - kSharedWindow);
}
inline void require_aligned(const void* p, size_t to, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % to) fault("%s: address not a multiple of %zu", what, to);
}
// Undefined content: what a reader finds who does not wait.
inline void poison(void* p, size_t bytes) { std::memset(p, 0xff, bytes); }

// The asynchronous engines write shared memory: they see that at once.
inline void async_write(const Block& block, char* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  std::memcpy(block.async_smem + (to - block.smem), from, bytes);
}
inline void async_poison(const Block& block, void* to, size_t bytes) {
  poison(to, bytes);
  poison(block.async_smem + (static_cast<char*>(to) - block.smem), bytes);
}
// They read it: ordinary stores must have been fenced. (Whose stores they were is not known, so any
// thread's fence since the last such read serves for all.)
inline void async_read(Block& block, void* to, const char* from, size_t bytes) {
  if (std::memcmp(from, block.async_smem + (from - block.smem), bytes) != 0) {
    if (!block.has_proxy_fence) {
      fault(
          "shared memory that ordinary stores wrote is read by an asynchronous engine without "
          "fence_proxy_async_shared");
    }
    std::memcpy(block.async_smem, block.smem, grid->smem_bytes);
    block.has_proxy_fence = false;
  }
  std::memcpy(to, from, bytes);
}

// 128-byte swizzle: the 16-byte unit is exchanged with the row of 128 bytes, on address bits.
constexpr uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- asynchronous work of the scheduler ----
inline void schedule(std::function<void()> run) {
  Fiber* f = grid->current;
  const bool random = grid->timing == Timing::random;
  const int style = random ? static_cast<int>(random_bits() % 4) : 0;
  if (grid->timing == Timing::early || (random && style == 0)) {
    run();
    return;
  }
  const uint64_t late = ~uint64_t{0};
  const uint64_t delay = style == 1 ? random_bits() % 16 : style == 2 ? random_bits() % 256 : 0;
  ++f->block->tasks;
  grid->tasks.push_back({f->block, delay ? grid->ticks + delay : late, std::move(run)});
}
// Whether work that a wait could still delay is done at once.
inline bool at_once() {
  return grid->timing == Timing::early || (grid->timing == Timing::random && one_in(2));
}

}  // namespace mamba2::emulation
