// mbarriers on the host: phases, arrivals, transaction bytes; and setmaxnreg.
#pragma once
#include "emulation_core.h"

namespace mamba2::emulation {

// The words of an mbarrier in shared memory; anything else there means that it was overwritten.
inline uint64_t mbarrier_mark(uint32_t address) { return 0x6d62617272000000ull | address; }

inline MbarrierState& mbarrier_at(uint64_t* word, const char* what) {
  const uint32_t address = window_address(word, 8, what);
  require_aligned(word, 8, what);
  auto& all = grid->current->block->mbarriers;
  const auto found = all.find(address);
  if (found == all.end()) fault("%s: no mbarrier was initialised at %u", what, address);
  if (*word != mbarrier_mark(address)) fault("%s: mbarrier at %u was overwritten", what, address);
  return found->second;
}

inline bool complete_if_due(MbarrierState& b) {
  if (b.pending != 0 || b.bytes != 0) return false;
  b.pending = b.count;
  ++b.phase;
  b.unobserved_bytes = b.expects_bytes;
  b.expects_bytes = false;
  wake_all(b.waiters);
  return true;
}
inline void expect_bytes(MbarrierState& b, uint32_t bytes) {
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fault("mbarrier: more than 2^20 - 1 bytes expected");
  b.expects_bytes |= bytes != 0;
}
inline void arrive(MbarrierState& b, uint32_t bytes) {
  if (b.pending == 0) fault("mbarrier: more arrivals than its count of %d", b.count);
  expect_bytes(b, bytes);
  --b.pending;
  progress();
  if (complete_if_due(b)) {
    yield_after_release();
  } else {
    yield_sometimes();
  }
}
inline void complete_bytes(MbarrierState& b, int64_t bytes) {
  b.bytes -= bytes;
  complete_if_due(b);
}

// Whether the phase of this parity is complete.
inline bool passed(MbarrierState& b, uint32_t parity) {
  if (parity > 1) fault("mbarrier: parity %u is neither 0 nor 1", parity);
  if ((b.phase & 1) == parity) return false;
  b.unobserved_bytes = false;
  return true;
}

// The barrier of a load, which the asynchronous engine must know of.
inline MbarrierState& load_barrier(uint64_t* word, const char* what) {
  MbarrierState& b = mbarrier_at(word, what);
  if (!b.fenced) fault("%s: mbarrier used without fence_mbarrier_init after its init", what);
  return b;
}

inline void check_mbarriers_at_exit(const Block& block) {
  for (const auto& [address, b] : block.mbarriers) {
    if (b.bytes != 0) {
      fault("block ended with %lld transaction bytes outstanding on the mbarrier at %u",
            static_cast<long long>(b.bytes), address);
    }
    if (b.pending != b.count) {
      fault("block ended with %d of %d arrivals on the mbarrier at %u", b.count - b.pending,
            b.count, address);
    }
    if (b.unobserved_bytes) {
      fault("block ended before anyone waited for the bytes of the mbarrier at %u", address);
    }
  }
}

// Registers move between the warps of a block: what one gives up another may take.
inline void set_registers(int registers, bool increase) {
  static constexpr const char* kNames[2] = {"setmaxnreg.dec", "setmaxnreg.inc"};
  const char* what = kNames[increase];
  if (registers % 8 || registers < 24 || registers > 256) {
    fault("%s: %d registers is not a multiple of 8 from 24 to 256", what, registers);
  }
  meet_warp(what, nullptr, [](void**) {});
  Fiber* f = grid->current;
  if (f->lane != 0) {
    meet_warp("setmaxnreg", nullptr, [](void**) {});
    return;
  }
  Block& block = *f->block;
  Warp& w = *f->warp;
  const int change = 32 * (registers - w.registers);
  if (increase ? change < 0 : change > 0) {
    fault("%s: from %d to %d registers", what, w.registers, registers);
  }
  while (change > block.free_registers) wait_in(block.register_waiters, what);
  block.free_registers -= change;
  w.registers = registers;
  if (change < 0) wake_all(block.register_waiters);
  meet_warp("setmaxnreg", nullptr, [](void**) {});
}

}  // namespace mamba2::emulation

namespace mamba2::ptx {

using Mbarrier = uint64_t;

inline void mbarrier_init(Mbarrier* b, int count) {
  using namespace emulation;
  const uint32_t address = window_address(b, 8, "mbarrier_init");
  require_aligned(b, 8, "mbarrier_init");
  if (count < 1 || count >= 1 << 20) fault("mbarrier_init: count %d", count);
  const auto [at, fresh] = grid->current->block->mbarriers.try_emplace(address);
  if (!fresh) fault("mbarrier_init: the mbarrier at %u is in use", address);
  at->second.count = at->second.pending = count;
  grid->current->unfenced.push_back(&at->second);
  *b = mbarrier_mark(address);
  progress();
}
inline void fence_mbarrier_init() {
  auto& unfenced = emulation::grid->current->unfenced;
  for (emulation::MbarrierState* b : unfenced) b->fenced = true;
  unfenced.clear();
}
inline void mbarrier_arrive(Mbarrier* b) {
  emulation::arrive(emulation::mbarrier_at(b, "mbarrier_arrive"), 0);
}
inline void mbarrier_arrive_expect_tx(Mbarrier* b, uint32_t bytes) {
  emulation::arrive(emulation::mbarrier_at(b, "mbarrier_arrive_expect_tx"), bytes);
}
inline void mbarrier_expect_tx(Mbarrier* b, uint32_t bytes) {
  emulation::expect_bytes(emulation::mbarrier_at(b, "mbarrier_expect_tx"), bytes);
}
inline void mbarrier_wait(Mbarrier* b, uint32_t parity) {
  using namespace emulation;
  MbarrierState& state = mbarrier_at(b, "mbarrier_wait");
  while (!passed(state, parity)) {
    wait_in(state.waiters, "mbarrier", window_address(b, 8, "mbarrier_wait"));
  }
}

inline bool mbarrier_passed(Mbarrier* b, uint32_t parity) {
  return emulation::passed(emulation::mbarrier_at(b, "mbarrier_passed"), parity);
}

template <int kRegisters>
void setmaxnreg_inc() {
  emulation::set_registers(kRegisters, true);
}
template <int kRegisters>
void setmaxnreg_dec() {
  emulation::set_registers(kRegisters, false);
}

}  // namespace mamba2::ptx
