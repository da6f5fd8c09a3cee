// Launchers of the stages. Each queues one kernel on `stream` and returns a cudaError_t as int.
// Arrays between stages: delta and a_cumsum_log2 are fp32, (chunks, h, q), padded with delta = 0
// and a flat sum; chunks are numbered by chunks.cuh. Entries of chunks that do not exist stay
// unwritten.
#pragma once
#include <cstddef>

#include "chunks.cuh"
#include "params.h"
#include "plan.h"

namespace mamba2::ssd {

// ---- chunk_table.cu ----
// Device memory that the chunk table of a packed problem takes; 0 when the rows are dense.
std::size_t chunking_bytes(const Shape& shape, int q);
// Says in *out how chunks are found. Packed: fills the table, in `memory`, from cu_seqlens.
int make_chunking(const Inputs& in, int q, void* memory, Chunking* out, void* stream);

// Packed outputs: rows outside [first, last) belong to no sequence and are set to zero.
struct ZeroTargets {
  struct Target {
    StridedOut out;  // (1, l, h, width)
    int h, width;
    int element_bytes;  // 2, 4 or 8
  };
  Target at[8];
  int count = 0;
  void add(const StridedOut& out, int h, int width, DType dtype) {
    if (out) at[count++] = {out, h, width, static_cast<int>(size_of(dtype))};
  }
};
int zero_outside(const Shape& shape, const Chunking& chunking, const ZeroTargets& targets,
                 void* stream);

// ---- chunk_cumsum.cu ----
// q of `chunking` is 64, 128 or 256.
int chunk_cumsum(const Inputs& in, const Chunking& chunking, float* delta, float* a_cumsum_log2,
                 void* stream);

}  // namespace mamba2::ssd
