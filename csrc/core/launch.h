// The one place where a kernel is launched. Returns a cudaError_t as int; 0 is success.
#pragma once
#include "macros.h"
#include "nvtx.h"

#if defined(MAMBA2_EMULATE)
#include <tuple>

#include "../ptx/emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace mamba2 {

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  size_t smem_bytes = 0;      // dynamic shared memory
  bool programmatic = false;  // may start early: the kernel calls ptx::griddepcontrol_wait
  BlockTile tile = {};        // for `explain`
};

// Adds a launch to a log in its place.
inline void write_down(LaunchLog& log, const LaunchShape& at, const void* kernel) {
  int registers = -1;
#if !defined(MAMBA2_EMULATE)
  cudaFuncAttributes attributes{};
  if (log.card_is_here && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
    registers = attributes.numRegs;
#endif
  log.launches.push_back({log.stage,
                          {at.grid.x, at.grid.y, at.grid.z},
                          at.threads,
                          at.smem_bytes,
                          at.tile,
                          registers});
}

#if !defined(MAMBA2_EMULATE)
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), const LaunchShape& at, void* stream, Args&&... args) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return 0;
  if (LaunchLog* log = LaunchLog::current()) {
    write_down(*log, at, reinterpret_cast<const void*>(kernel));
    return 0;
  }
  if (at.smem_bytes > 48 * 1024) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(at.smem_bytes));
    if (e != cudaSuccess) return static_cast<int>(e);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = dim3(at.threads);
  config.dynamicSmemBytes = at.smem_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = at.programmatic ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}
inline const char* launch_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
#else
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), const LaunchShape& at, void* /*stream*/, Args&&... args) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return 0;
  if (LaunchLog* log = LaunchLog::current()) {
    write_down(*log, at, reinterpret_cast<const void*>(kernel));
    return 0;
  }
  const std::tuple<Params...> params(static_cast<Params>(args)...);
  return emulation::run(at.grid, at.threads, at.smem_bytes, at.programmatic,
                        [&] { std::apply(kernel, params); });
}
inline const char* launch_error_string(int) { return emulation::last_error().c_str(); }
#endif

}  // namespace mamba2
