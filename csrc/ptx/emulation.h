// The ptx layer on the host: under MAMBA2_EMULATE, kernels are compiled as plain C++ and run with
// one fiber per CUDA thread, in random order, with asynchronous work done early or late at random.
// It is a test instrument: it finds races, wrong phases, layouts and waits (docs/emulation.md).
//   emulation_fiber.h     stacks and context switches      emulation_state.h    the card's state
//   emulation_core.h      faults, waiting, waking          emulation_builtins.h CUDA C++ built-ins
//   emulation_sm80.h      common.cuh and sm80.cuh          emulation_mbarrier.h mbarriers
//   emulation_tma.h       bulk and tensor copies           emulation_wgmma.h    wgmma
//   emulation_launch.h    blocks, the scheduler
#pragma once
#if !defined(MAMBA2_EMULATE)
#error "emulation.h is for MAMBA2_EMULATE builds"
#endif
#include "emulation_launch.h"
