// What test_layer.py calls through ctypes.
#include "self_test.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using mamba2::self_test::Fault;

EXPORT int wgmma_gemm(const mamba2::self_test::Gemm* g, int fault) {
  return mamba2::self_test::wgmma_gemm(*g, static_cast<Fault>(fault));
}
EXPORT int mma_gemm(const mamba2::self_test::Gemm* g, int fault) {
  return mamba2::self_test::mma_gemm(*g, static_cast<Fault>(fault));
}
EXPORT int tickets(const mamba2::self_test::Tickets* p, int fault) {
  return mamba2::self_test::tickets(*p, static_cast<Fault>(fault));
}
EXPORT int operands(const mamba2::self_test::Operands* o, int fault) {
  return mamba2::self_test::operands(*o, static_cast<Fault>(fault));
}
EXPORT int progress(const mamba2::self_test::Progress* p, int fault) {
  return mamba2::self_test::progress(*p, static_cast<Fault>(fault));
}
EXPORT int preparation(const mamba2::self_test::Prepared* p) {
  return mamba2::self_test::preparation(*p);
}
EXPORT const char* last_error() { return mamba2::emulation::last_error().c_str(); }
EXPORT void schedule(uint64_t seed, int timing, int resident_blocks) {
  auto& o = mamba2::emulation::options();
  o.seed = seed;
  o.launches = 0;
  o.timing = static_cast<mamba2::emulation::Timing>(timing);
  o.resident_blocks = resident_blocks;
}
// 0 when make_tensor_map takes this tensor.
EXPORT int tensor_map(uint64_t base, int rank, const int64_t* dims, const int64_t* byte_strides,
                      const int* box, int swizzle) {
  mamba2::ptx::TensorMap map;
  return mamba2::make_tensor_map(&map, mamba2::DType::bf16, reinterpret_cast<void*>(base), rank,
                                 dims, byte_strides, box, swizzle != 0);
}
