// Tensor maps: how the tensor copy engine walks a strided tensor of 16-bit elements. Host side.
#pragma once
#include <cstdint>

#include "../ptx/sm90.cuh"
#include "dtype.h"
#include "launch_log.h"

#if !defined(MAMBA2_EMULATE)
#include <cuda_runtime_api.h>
#endif

namespace mamba2 {

// Whether the hardware can take this tensor and box; the same answer in both worlds.
inline bool tensor_map_is_legal(DType dtype, const void* base, int rank, const int64_t* dims,
                                const int64_t* byte_strides, const int* box, bool swizzle_128) {
  if (size_of(dtype) != 2 || rank < 1 || rank > 5) return false;
  if (reinterpret_cast<uintptr_t>(base) % 16) return false;
  for (int d = 0; d < rank; ++d) {
    if (dims[d] < 1 || dims[d] > int64_t{1} << 32) return false;
    if (box[d] < 1 || box[d] > 256) return false;
    if (d == 0) continue;
    const int64_t stride = byte_strides[d - 1];
    if (stride % 16 || stride < 0 || stride >= int64_t{1} << 40) return false;
  }
  // With the swizzle our tiles are rows of exactly 128 bytes.
  return swizzle_128 ? box[0] * 2 == 128 : box[0] * 2 % 16 == 0;
}

// Encodes a tensor of `rank` dimensions, innermost first: dims in elements, byte_strides of
// dimensions 1 .. rank-1, and the box that one copy moves. Elements out of bounds read as zero and
// are not written. Returns a cudaError_t as int.
#if defined(MAMBA2_EMULATE)

inline int make_tensor_map(ptx::TensorMap* map, DType dtype, const void* base, int rank,
                           const int64_t* dims, const int64_t* byte_strides, const int* box,
                           bool swizzle_128) {
  if (!tensor_map_is_legal(dtype, base, rank, dims, byte_strides, box, swizzle_128)) {
    emulation::last_error() = "make_tensor_map: the hardware does not take this tensor or box";
    return 1;  // cudaErrorInvalidValue
  }
  *map = ptx::TensorMap{};
  map->base = static_cast<char*>(const_cast<void*>(base));
  map->rank = rank;
  map->swizzle_128 = swizzle_128;
  for (int d = 0; d < rank; ++d) {
    map->dims[d] = dims[d];
    map->box[d] = box[d];
    map->strides[d] = d == 0 ? 2 : byte_strides[d - 1];
  }
  return 0;
}

#else

// The driver's encoder, found through the runtime so that nothing links libcuda.
using TensorMapEncoder = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                      const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
inline TensorMapEncoder tensor_map_encoder() {
  static const TensorMapEncoder encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                           cudaEnableDefault, &found);
    const bool ok = e == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<TensorMapEncoder>(entry) : nullptr;
  }();
  return encoder;
}

inline int make_tensor_map(ptx::TensorMap* map, DType dtype, const void* base, int rank,
                           const int64_t* dims, const int64_t* byte_strides, const int* box,
                           bool swizzle_128) {
  if (!tensor_map_is_legal(dtype, base, rank, dims, byte_strides, box, swizzle_128)) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (LaunchLog::current()) return 0;  // no kernel will read it, and there may be no driver
  const TensorMapEncoder encode = tensor_map_encoder();
  if (!encode) return static_cast<int>(cudaErrorNotSupported);
  cuuint64_t sizes[5], strides[4];
  cuuint32_t boxes[5], steps[5];
  for (int d = 0; d < rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(dims[d]);
    boxes[d] = static_cast<cuuint32_t>(box[d]);
    steps[d] = 1;
    if (d > 0) strides[d - 1] = static_cast<cuuint64_t>(byte_strides[d - 1]);
  }
  const CUresult r = encode(
      map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      static_cast<cuuint32_t>(rank), const_cast<void*>(base), sizes, strides, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle_128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<int>(r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}

#endif

}  // namespace mamba2
