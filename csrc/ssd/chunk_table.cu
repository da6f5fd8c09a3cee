// The chunk table of packed sequences: which tokens each chunk holds (chunks.cuh).
// cu_seqlens is read on the device: values are clamped to [0, l] and made monotone by a running
// maximum. Sequence i has ceil(length / q) chunks; the host's bound l / q + nseq may exceed their
// number, and the entries left over say i_seq = -1.
#include "../core/launch.h"
#include "../ptx/common.cuh"
#include "launch.h"

namespace mamba2::ssd {
namespace {

constexpr int kThreads = 1024;

struct TableParams {
  const void* cu_seqlens;  // (nseq + 1) int32 or int64
  bool cu_seqlens_64;
  int nseq, l, q, chunks;
  int4* table;       // (chunks)
  int* first_chunk;  // (nseq + 1)
  int* first_token;  // (nseq + 1)
};

struct TableShared {
  int of_warp[kThreads / 32];
};

MAMBA2_DEVICE int clamped_cu(const TableParams& params, int i) {
  const int64_t v = params.cu_seqlens_64 ? static_cast<const int64_t*>(params.cu_seqlens)[i]
                                         : static_cast<const int*>(params.cu_seqlens)[i];
  return static_cast<int>(v < 0 ? 0 : v > params.l ? params.l : v);
}

// Inclusive scan over the block's threads, continued from `carry`, which becomes the last value.
template <class Op>
MAMBA2_DEVICE int block_scan(int v, int& carry, TableShared& shared, Op op) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  MAMBA2_UNROLL for (int d = 1; d < 32; d *= 2) {
    const int before = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v = op(before, v);
  }
  if (lane == 31) shared.of_warp[warp] = v;
  __syncthreads();
  int total = carry;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) v = op(total, v);
    total = op(total, shared.of_warp[w]);
  }
  __syncthreads();
  carry = total;
  return v;
}

// grid: 1. Sequences in blocks of 1024, then the chunks, each finding its sequence by bisection.
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1) chunk_table_kernel(TableParams params) {
  TableShared& shared = *static_cast<TableShared*>(ptx::dynamic_smem());
  const auto larger = [](int a, int b) { return a > b ? a : b; };
  const auto sum = [](int a, int b) { return a + b; };
  int token_carry = 0, chunk_carry = 0;
  for (int base = 0; base <= params.nseq; base += kThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const int begin =
        block_scan(i <= params.nseq ? clamped_cu(params, i) : 0, token_carry, shared, larger);
    const int end = i < params.nseq ? larger(begin, clamped_cu(params, i + 1)) : begin;
    const int chunks = ceil_div(end - begin, params.q);
    const int through = block_scan(chunks, chunk_carry, shared, sum);
    if (i <= params.nseq) {
      params.first_token[i] = begin;
      params.first_chunk[i] = through - chunks;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < params.chunks; i += kThreads) {
    if (i >= chunk_carry) {
      params.table[i] = int4{-1, 0, 0, 0};
      continue;
    }
    int i_seq = 0;  // the last sequence that starts at or before chunk i
    for (int past = params.nseq; past - i_seq > 1;) {
      const int middle = (i_seq + past) / 2;
      (params.first_chunk[middle] <= i ? i_seq : past) = middle;
    }
    const int i_c = i - params.first_chunk[i_seq];
    const int token = params.first_token[i_seq] + i_c * params.q;
    const int left = params.first_token[i_seq + 1] - token;
    const bool is_last = left <= params.q;
    params.table[i] = int4{i_seq, token, is_last ? left : params.q, i_c << 1 | (is_last ? 1 : 0)};
  }
}

// Outputs with rows that may belong to no sequence.
struct ZeroTargets {
  struct Target {
    StridedOut out;  // (1, l, h, width)
    int h, width;
    int element_bytes;  // 2, 4 or 8
  };
  Target at[5];
  int count = 0;
  void add(const StridedOut& out, int h, int width, DType dtype) {
    if (out) at[count++] = {out, h, width, static_cast<int>(size_of(dtype))};
  }
};
struct ZeroParams {
  const int* first_token;  // (nseq + 1)
  int nseq, l;
  ZeroTargets targets;
};

template <class Word>
MAMBA2_DEVICE void zero_row(const ZeroTargets::Target& target, int64_t token) {
  Word* row = static_cast<Word*>(target.out.ptr) + token * target.out.l;
  for (int i = threadIdx.x; i < target.h * target.width; i += blockDim.x) {
    row[i / target.width * target.out.h + i % target.width] = 0;
  }
}

// grid: blocks stride over the rows that no sequence holds.
__global__ void zero_outside_kernel(MAMBA2_GRID_CONSTANT const ZeroParams params) {
  const int first = params.first_token[0];
  const int skipped = params.first_token[params.nseq] - first;
  for (int i = blockIdx.x; i < params.l - skipped; i += gridDim.x) {
    const int64_t token = i < first ? i : i + skipped;
    for (int k = 0; k < params.targets.count; ++k) {
      const ZeroTargets::Target& target = params.targets.at[k];
      if (target.element_bytes == 2) {
        zero_row<uint16_t>(target, token);
      } else if (target.element_bytes == 4) {
        zero_row<uint32_t>(target, token);
      } else {
        zero_row<uint64_t>(target, token);
      }
    }
  }
}

// grid: blocks stride over the words of the chunks that do not exist.
__global__ void zero_beyond_last_chunk_kernel(const int* chunk_count, int chunks, uint32_t* kept,
                                              int64_t words_per_chunk) {
  const int64_t end = chunks * words_per_chunk, stride = int64_t(gridDim.x) * blockDim.x;
  const int64_t first = *chunk_count * words_per_chunk + int64_t(blockIdx.x) * blockDim.x;
  for (int64_t i = first + threadIdx.x; i < end; i += stride) kept[i] = 0;
}

int zero_outside(const Shape& shape, const Chunking& chunking, const ZeroTargets& targets,
                 void* stream) {
  const Range range("zero_outside");
  if (!shape.packed || targets.count == 0) return 0;
  const ZeroParams params{chunking.first_token, static_cast<int>(shape.nseq),
                          static_cast<int>(shape.l), targets};
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(shape.l < 1024 ? shape.l : 1024));
  at.threads = 256;
  return launch(zero_outside_kernel, at, stream, params);
}

}  // namespace

std::size_t chunking_bytes(const Shape& shape, int q) {
  if (!shape.packed) return 0;
  const std::size_t table = sizeof(int4) * shape.chunks(q);
  return round_up(table + 2 * sizeof(int) * (shape.nseq + 1), std::size_t(1024));
}

int make_chunking(const Inputs& in, int q, void* memory, Chunking* out, void* stream) {
  const Range range("chunk_table");
  const Shape& shape = in.shape;
  *out = Chunking{};
  out->q = q;
  out->l = shape.l;
  out->chunks_per_row = static_cast<int>(ceil_div(shape.l, q));
  out->by_row = Divisor(out->chunks_per_row);
  if (!shape.packed) return 0;

  const int chunks = static_cast<int>(shape.chunks(q)), nseq = static_cast<int>(shape.nseq);
  int4* table = static_cast<int4*>(memory);
  int* first_chunk = reinterpret_cast<int*>(table + chunks);
  int* first_token = first_chunk + nseq + 1;
  out->table = table;
  out->first_chunk = first_chunk;
  out->first_token = first_token;
  const TableParams params{
      in.cu_seqlens, in.cu_seqlens_64, nseq,       static_cast<int>(shape.l), q, chunks,
      table,         first_chunk,      first_token};
  LaunchShape at;
  at.grid = dim3(1);
  at.threads = kThreads;
  at.smem_bytes = sizeof(TableShared);
  return launch(chunk_table_kernel, at, stream, params);
}

int zero_outside(const ForwardParams& params, const Chunking& chunking, void* stream) {
  const Shape& shape = params.in.shape;
  ZeroTargets targets;
  targets.add(params.y, shape.h, shape.p, params.in.dtype);
  return zero_outside(shape, chunking, targets, stream);
}

int zero_outside(const BackwardParams& params, const Chunking& chunking, void* stream) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  ZeroTargets targets;
  targets.add(params.dx, shape.h, shape.p, in.dtype);
  targets.add(params.d_dt, shape.h, 1, in.dt_dtype);
  targets.add(params.dB, shape.g, shape.n, in.dtype);
  targets.add(params.dC, shape.g, shape.n, in.dtype);
  targets.add(params.dz, shape.h, shape.p, in.dtype);
  return zero_outside(shape, chunking, targets, stream);
}

int zero_beyond_last_chunk(const Chunking& chunking, const Shape& shape, void* kept,
                           int64_t chunk_bytes, void* stream) {
  if (!shape.packed || kept == nullptr) return 0;
  const int chunks = static_cast<int>(shape.chunks(chunking.q));
  LaunchShape at;
  at.grid = dim3(256);
  at.threads = 256;
  return launch(zero_beyond_last_chunk_kernel, at, stream, chunking.first_chunk + shape.nseq,
                chunks, static_cast<uint32_t*>(kept), chunk_bytes / int64_t(sizeof(uint32_t)));
}

}  // namespace mamba2::ssd
