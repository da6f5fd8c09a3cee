// What the emulated card knows: threads, warps, blocks, barriers, and work in flight. Plain data;
// the headers beside this one act on it.
#pragma once
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation_fiber.h"

namespace mamba2::emulation {

// When asynchronous work (copies, matrix products) happens between its issue and its wait.
enum class Timing : int { random = 0, early = 1, late = 2 };

struct Options {
  int resident_blocks = 4;  // blocks that run at the same time
  uint64_t seed = 1;        // launch k after set() draws from seed + k
  Timing timing = Timing::random;
  uint64_t launches = 0;
  int most_released = 0x7fffffff;  // flags stay at that: whoever waits for more waits for ever
};

// A copy issued by cp.async and not yet performed.
struct ThreadCopy {
  void* smem;
  const void* gmem;
  bool valid;
  int group;
};
// A bulk or tensor store: first its shared memory is read, later global memory is written.
struct BulkStore {
  std::function<void(std::vector<char>&)> read;
  std::function<void(const std::vector<char>&)> write;
  std::vector<char> data;
  bool was_read = false;
  bool waited_read = false;  // the thread knows that it was read
  int group = 0;
};
// Asynchronous work that the scheduler performs at or after a tick.
struct Task {
  struct Block* block;
  uint64_t due;
  std::function<void()> run;
};

struct Fiber {
  Context context;
  struct Warp* warp = nullptr;
  struct Block* block = nullptr;
  int thread = 0, lane = 0;
  bool done = false;
  const char* waits_for = nullptr;  // for the report of a deadlock
  uint32_t detail = 0;

  bool acquired = false;  // has read a flag, and not fenced what it asks the engines for since

  std::vector<ThreadCopy> copies;
  int copy_groups = 0;
  std::vector<BulkStore> stores;
  int store_groups = 0;
  std::vector<struct MbarrierState*> unfenced;  // mbarriers initialised since the last fence
  // wgmma, this lane's counts
  int products = 0, committed_products = 0, product_groups = 0;
  bool fenced = false;
};

// Lanes of a warp that meet in one instruction; the last to come performs it for all.
struct Meeting {
  const char* what;
  uint32_t mask, arrived;
  void* args[32];
};

// One accumulator tile of a warp, (16, n), while a product on it is in flight; kept a while after.
struct AccumulatorTile {
  float* lane[32] = {};
  int n = 0;
  int last_product = -1;
  bool in_flight = true;
  std::vector<float> value;
};
struct Product {
  uint64_t a, b;
  int n;
  bool a_in_registers, transpose_a, transpose_b, accumulate, half_type;
  bool same_as(const Product& o) const {
    return a == o.a && b == o.b && n == o.n && a_in_registers == o.a_in_registers &&
           transpose_a == o.transpose_a && transpose_b == o.transpose_b &&
           accumulate == o.accumulate && half_type == o.half_type;
  }
};
struct PendingProduct {
  Product product;
  AccumulatorTile* tile = nullptr;
  uint32_t lanes = 0;  // that have issued it
  int group = -1;
  bool executed = false;
  uint32_t a[32][4];
};

struct Warp {
  struct Block* block = nullptr;
  int index = 0;
  uint32_t existing = 0, ready = 0;
  bool queued = false;
  std::vector<Meeting> meetings;
  std::deque<PendingProduct> products;  // not yet waited for
  int first_product = 0;                // number of products.front()
  std::vector<std::unique_ptr<AccumulatorTile>> tiles;
  int registers = 0;  // per thread, as set by setmaxnreg
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::vector<Fiber*> waiters;
};

struct MbarrierState {
  int count = 0, pending = 0;
  int64_t bytes = 0;              // expected minus arrived, in this phase
  uint32_t phase = 0;             // number of completed phases
  bool fenced = false;            // the asynchronous engines know it
  bool expects_bytes = false;     // in this phase
  bool unobserved_bytes = false;  // bytes of a completed phase that nobody waited for
  std::vector<Fiber*> waiters;
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Stack> stacks;
  char* smem = nullptr;
  char* async_smem = nullptr;    // the same as the asynchronous engines see it
  bool has_proxy_fence = false;  // some thread fenced since the two were made equal
  int live = 0, tasks = 0;
  bool busy = false, waited_for_grid = false, acquired = false;
  NamedBarrier barriers[16];
  std::unordered_map<uint32_t, MbarrierState> mbarriers;  // by shared-window address
  std::vector<std::vector<Product>> warpgroup_products;
  int free_registers = 0;  // given up by setmaxnreg_dec
  std::vector<Fiber*> register_waiters;
};

struct Grid {
  dim3 shape;
  int threads = 0;
  size_t smem_bytes = 0;
  bool programmatic = false, waited = false;  // some thread of it, for the kernels in front
  std::function<void()> body;
  std::vector<Block> blocks;  // resident
  std::vector<Warp*> ready;
  std::vector<Task> tasks;
  Context scheduler;
  Fiber* current = nullptr;       // null while the scheduler runs
  const Block* ending = nullptr;  // being checked at its end
  uint64_t random_state = 0, ticks = 0, idle_spins = 0;
  uint64_t next_block = 0, block_count = 0;
  Timing timing = Timing::random;
  bool preempted = false;  // the last switch asked for another warp to run
  std::string fault;
};

inline Options& options() {
  static Options o = [] {
    Options v;
    if (const char* s = std::getenv("MAMBA2_EMULATE_SEED")) v.seed = std::strtoull(s, nullptr, 10);
    if (const char* s = std::getenv("MAMBA2_EMULATE_BLOCKS")) v.resident_blocks = std::atoi(s);
    if (const char* s = std::getenv("MAMBA2_EMULATE_TIMING")) {
      v.timing = *s == 'e' ? Timing::early : *s == 'l' ? Timing::late : Timing::random;
    }
    return v;
  }();
  return o;
}
inline std::string& last_error() {
  static std::string s;
  return s;
}
inline Grid* grid = nullptr;  // the launch in progress

// Shared-window addresses start here: the hardware keeps the first 1024 bytes to itself.
constexpr uint32_t kSharedWindow = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;

}  // namespace mamba2::emulation

// CUDA's built-in variables of the running thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
