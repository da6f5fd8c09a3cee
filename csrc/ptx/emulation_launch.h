// The scheduler: runs the blocks of a grid, one warp for a random while, then another.
#pragma once
#include <map>
#include <mutex>

#include "emulation_tma.h"
#include "emulation_wgmma.h"

namespace mamba2::emulation {

constexpr int kLaunchFailed = 719;        // cudaErrorLaunchFailure
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration
constexpr size_t kGuardBytes = 1024;      // beyond shared memory: found overwritten at the end
constexpr unsigned char kGuard = 0xa5;

inline void thread_main() {
  grid->body();
  Fiber* f = grid->current;
  check_stores_at_exit(*f);
  f->done = true;
  Block& b = *f->block;
  --b.live;
  release_if_complete(b.barriers[0], b.live);
  progress();
  for (;;) switch_context(&f->context, &grid->scheduler);
}

inline void start_block(Block& b, uint64_t number) {
  const dim3 s = grid->shape;
  b.index = {static_cast<unsigned>(number % s.x), static_cast<unsigned>(number / s.x % s.y),
             static_cast<unsigned>(number / s.x / s.y)};
  const auto threads = static_cast<size_t>(grid->threads), warps = (threads + 31) / 32;
  async_poison(b, b.smem, grid->smem_bytes);
  b.has_proxy_fence = false;
  std::memset(b.smem + grid->smem_bytes, kGuard, kGuardBytes);
  b.fibers = std::vector<Fiber>(threads);
  b.warps = std::vector<Warp>(warps);
  for (NamedBarrier& n : b.barriers) n = {};
  b.mbarriers.clear();
  b.warpgroup_products.assign((warps + 3) / 4, {});
  b.live = grid->threads;
  b.busy = true;
  b.waited_for_grid = b.acquired = false;
  b.free_registers = 0;
  while (b.stacks.size() < threads) b.stacks.emplace_back();
  // What the compiler may give each thread at most, and setmaxnreg redistributes.
  const int registers = std::min(256, 65536 / static_cast<int>(warps * 32) / 8 * 8);
  for (size_t i = 0; i < threads; ++i) {
    Warp& w = b.warps[i / 32];
    w.block = &b;
    w.index = static_cast<int>(i / 32);
    w.registers = registers;
    w.existing |= 1u << i % 32;
    Fiber& f = b.fibers[i];
    f.warp = &w;
    f.block = &b;
    f.thread = static_cast<int>(i);
    f.lane = static_cast<int>(i % 32);
    prepare_context(&f.context, b.stacks[i], thread_main);
    wake(&f);
  }
}

inline void finish_block(Block& b) {
  grid->ending = &b;
  if (b.tasks) fault("block ended with a bulk load in flight");
  check_mbarriers_at_exit(b);
  check_products_at_exit(b);
  for (size_t k = 0; k < kGuardBytes; ++k) {
    if (static_cast<unsigned char>(b.smem[grid->smem_bytes + k]) != kGuard) {
      fault("block wrote past its %zu bytes of shared memory", grid->smem_bytes);
    }
  }
  if (grid->programmatic && !b.waited_for_grid && !b.acquired) {
    fault("a block of a programmatic launch ended without griddepcontrol_wait or ld_acquire_gpu");
  }
  grid->ending = nullptr;
  b.busy = false;
}

inline void run_fiber(Fiber& f) {
  const Block& b = *f.block;
  grid->current = &f;
  threadIdx = {static_cast<unsigned>(f.thread), 0, 0};
  blockIdx = b.index;
  switch_context(&grid->scheduler, &f.context);
  grid->current = nullptr;
  if (!grid->fault.empty()) throw LaunchFault();
}

// Runs ready lanes of one warp, from a random lane on, until none is left or chance says so.
inline void run_warp(size_t at) {
  Warp& w = *grid->ready[at];
  const int start = static_cast<int>(random_bits() % 32);
  grid->preempted = false;
  while (w.ready && !grid->preempted) {
    const uint32_t rotated = w.ready >> start | (start ? w.ready << (32 - start) : 0);
    const int lane = (__builtin_ctz(rotated) + start) % 32;
    w.ready &= ~(1u << lane);
    run_fiber(w.block->fibers[static_cast<size_t>(w.index * 32 + lane)]);
    if (one_in(64)) break;
  }
  if (!w.ready) {
    w.queued = false;
    grid->ready[at] = grid->ready.back();
    grid->ready.pop_back();
  }
  Block& b = *w.block;
  if (b.live == 0) finish_block(b);
}

inline void run_task(size_t i) {
  Task t = std::move(grid->tasks[i]);
  grid->tasks.erase(grid->tasks.begin() + static_cast<std::ptrdiff_t>(i));
  --t.block->tasks;
  t.run();
  progress();
}
// Runs one task that is due, or any if `forced`; whether it did.
inline bool run_some_task(bool forced) {
  auto& tasks = grid->tasks;
  if (tasks.empty()) return false;
  const size_t start = random_bits() % tasks.size();
  for (size_t k = 0; k < tasks.size(); ++k) {
    const size_t i = (start + k) % tasks.size();
    if (tasks[i].due <= grid->ticks) {
      run_task(i);
      return true;
    }
  }
  if (forced) run_task(start);
  return forced;
}

inline std::string describe_waits() {
  std::map<std::string, std::pair<int, int>> waits;  // text: first thread, number of threads
  for (const Block& b : grid->blocks) {
    if (!b.busy) continue;
    for (const Fiber& f : b.fibers) {
      if (f.done) continue;
      std::string text = format("block (%u, %u, %u): %s", b.index.x, b.index.y, b.index.z,
                                f.waits_for ? f.waits_for : "running");
      const auto m = b.mbarriers.find(f.detail);
      if (f.waits_for && !std::strcmp(f.waits_for, "mbarrier") && m != b.mbarriers.end()) {
        text += format(" at %u (phase %u, %d of %d arrivals and %lld bytes missing)", f.detail,
                       m->second.phase, m->second.pending, m->second.count,
                       static_cast<long long>(m->second.bytes));
      } else if (f.waits_for && !std::strcmp(f.waits_for, "named barrier")) {
        const NamedBarrier& n = b.barriers[f.detail];
        text += format(" %u (%d of %d arrived)", f.detail, n.arrived, n.expected);
      }
      auto [at, fresh] = waits.try_emplace(text, f.thread, 0);
      ++at->second.second;
    }
  }
  std::string all;
  for (const auto& [text, who] : waits) {
    if (all.size() > 2000) return all + "; ...";
    all += format("; %d threads from %d: ", who.second, who.first) + text;
  }
  return all;
}

inline void run_grid() {
  for (;;) {
    bool busy = false;
    uint64_t live = 0;
    for (Block& b : grid->blocks) {
      if (!b.busy && grid->next_block < grid->block_count) start_block(b, grid->next_block++);
      busy |= b.busy;
      live += static_cast<uint64_t>(b.live);
    }
    if (!busy) break;
    bool any_done = false;
    while (!any_done) {
      ++grid->ticks;
      const bool spinning = grid->idle_spins > 2 * live;
      if (!grid->tasks.empty()) run_some_task(grid->ready.empty() || spinning);
      if (grid->ready.empty() || grid->idle_spins > 20000 + 200 * live) {
        if (grid->ready.empty() && !grid->tasks.empty()) continue;
        grid->fault = "deadlock" + describe_waits();
        throw LaunchFault();
      }
      const size_t at = random_bits() % grid->ready.size();
      Block& b = *grid->ready[at]->block;
      run_warp(at);
      any_done = !b.busy;
    }
  }
  if (grid->programmatic && !grid->waited)
    fault("no block of a programmatic launch called griddepcontrol_wait");
}

// Runs `body` once per thread of the grid. Returns 0 or an error code; last_error() says why.
inline int run(const dim3& shape, int threads, size_t smem_bytes, bool programmatic,
               std::function<void()> body) {
  static std::mutex mutex;
  static std::vector<Stack> stacks;  // kept for the next launch
  const std::lock_guard<std::mutex> lock(mutex);
  Options& o = options();
  if (threads < 1 || threads > 1024 || smem_bytes > kMaxSharedBytes || shape.y > 65535 ||
      shape.z > 65535) {
    last_error() = format("%d threads, %zu bytes of shared memory, grid (%u, %u, %u)", threads,
                          smem_bytes, shape.x, shape.y, shape.z);
    return kInvalidConfiguration;
  }
  Grid g;
  g.shape = shape;
  g.threads = threads;
  g.smem_bytes = smem_bytes;
  g.programmatic = programmatic;
  g.body = std::move(body);
  g.timing = o.timing;
  g.random_state = (o.seed + o.launches++) * 0x9e3779b97f4a7c15ull | 1;
  g.block_count = uint64_t{shape.x} * shape.y * shape.z;
  const uint64_t resident = static_cast<uint64_t>(std::max(1, o.resident_blocks));
  g.blocks = std::vector<Block>(std::min(g.block_count, resident));
  const size_t bytes = (smem_bytes + kGuardBytes + 1023) / 1024 * 1024;
  for (Block& b : g.blocks) {
    b.smem = static_cast<char*>(std::aligned_alloc(1024, 2 * bytes));
    if (!b.smem) throw std::bad_alloc();
    b.async_smem = b.smem + bytes;
    for (int i = 0; i < threads && !stacks.empty(); ++i) {
      b.stacks.push_back(std::move(stacks.back()));
      stacks.pop_back();
    }
  }
  grid = &g;
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = shape;
  for (int i = 0; i < 8; ++i) random_bits();
  try {
    run_grid();
  } catch (const LaunchFault&) {
    last_error() =
        g.fault + format(" [seed %llu]", static_cast<unsigned long long>(o.seed + o.launches - 1));
  }
  grid = nullptr;
  for (Block& b : g.blocks) {
    std::free(b.smem);
    for (Stack& s : b.stacks) stacks.push_back(std::move(s));
  }
  return g.fault.empty() ? 0 : kLaunchFailed;
}

}  // namespace mamba2::emulation
