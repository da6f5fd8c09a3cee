// norm_linear_add_norm on tensor cores (see norm_linear_add_norm.h for the equations), in two
// kernels that each begin while the one in front ends:
//   multiply_parts  (x gate norm_weight) weight^T, not yet normed, and the rows' sums of squares. A
//                   block has 64 rows, 64 outputs and a slice of the channels: the slices spread a
//                   small product over the card. Grid: (outputs / 64, slices, rows / 64). Shared
//                   memory: a ring of 4 chunks of 64 channels of weights, x and z, 24 KB each. The
//                   first weights are on their way before it waits for the kernel in front
//   add_parts       adds the slices up, divides by the root mean square, adds to the residual and
//                   norms it. Grid: rows; a thread has 4 consecutive channels, and more of them
//                   where there are more than 2048. Shared memory: a sum a warp
// Because a row is divided after the product, no kernel has to see the row before: what is rounded
// to weight's dtype is x gate norm_weight. Bound by the latency of two trips to memory.
// For bf16 (fp16 could overflow before it is divided), an fp32 residual, one group of channels, no
// bias, and rows that are a whole number of 16 aligned bytes.
// Deterministic; a row's result does not depend on the others.
#include "norm_linear_add_norm.h"

#include "../add_norm/add_norm.cuh"
#include "../core/activations.cuh"
#include "../core/launch.h"
#include "row_product.cuh"

namespace mamba2::norm_linear {
namespace {

constexpr int kOutputs = 64, kChunk = 64;  // of a block; channels at a time
constexpr int kStages = 4;
constexpr int kMaxSlices = 8;

// How the channels are cut: by their number and that of the outputs alone.
struct Slices {
  int count, chunks;  // of each, the last one perhaps fewer

  explicit Slices(const Params& params) {
    const int all = ceil_div(params.d, kChunk), wanted = kSms / ceil_div(params.o, kOutputs);
    const int most = wanted < 1 ? 1 : wanted < kMaxSlices ? wanted : kMaxSlices;
    chunks = ceil_div(all, most);
    count = ceil_div(all, chunks);
  }
};

// What multiply_parts leaves to add_parts.
struct Parts {
  float* products;  // (slices, b, o)
  float* squares;   // (slices, b)
};
Parts parts_in(const Params& params, const Slices& slices, void* workspace) {
  float* products = static_cast<float*>(workspace);
  return {products, products + slices.count * params.b * params.o};
}

// ---- the product ----

using RowTile = tile::SharedTile<T, kRows, kChunk>;
struct Stage {
  tile::SharedTile<T, kOutputs, kChunk> weight;
  RowTile x, z;
};

// The vectors that a thread copies, and then gates: one unit of rows row(0), row(1), ...
struct OwnVectors {
  static constexpr int kCount = kRows * RowTile::kUnits / kThreads;
  static MAMBA2_DEVICE int row(int i) {
    return static_cast<int>(threadIdx.x) / RowTile::kUnits + i * (kThreads / RowTile::kUnits);
  }
  static MAMBA2_DEVICE int column() {
    return static_cast<int>(threadIdx.x) % RowTile::kUnits * kVec;
  }
};

// Weights of the norm for the thread's channels, as they lie in memory; 0 behind them.
MAMBA2_DEVICE Packed<T, kVec> load_norm_weight(const Params& params, int k) {
  Packed<T, kVec> weight;
  weight.zero();
  if (k < params.d) weight.load(static_cast<const T*>(params.norm_weight.ptr) + k);
  return weight;
}

// x becomes x gate norm_weight in its place; adds up the squares of what the norm is of.
MAMBA2_DEVICE void gate_own(const Params& params, Stage& stage,
                            const Packed<T, kVec>& packed_norm_weight,
                            float (&squares)[OwnVectors::kCount]) {
  float norm_weight[kVec];
  packed_norm_weight.unpack(norm_weight);
  MAMBA2_UNROLL
  for (int i = 0; i < OwnVectors::kCount; ++i) {
    T* s_x = stage.x.at(OwnVectors::row(i), OwnVectors::column());
    float v[kVec], z[kVec];
    load_vector(s_x, v);
    if (params.z.ptr) load_vector(stage.z.at(OwnVectors::row(i), OwnVectors::column()), z);
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) {
      Gate<float> gate;
      if (params.z.ptr) gate = gate_of(fast::silu(z[c]), params.norm_before_gate);
      v[c] *= gate.inside;
      squares[i] += v[c] * v[c];
      v[c] *= norm_weight[c] * gate.outside;
    }
    Packed<T, kVec> rounded;
    rounded.pack(v);
    *reinterpret_cast<uint4*>(s_x) = {rounded.words[0], rounded.words[1], rounded.words[2],
                                      rounded.words[3]};
  }
}

// The rows' sums of squares over the slice, by the block of the first outputs.
MAMBA2_DEVICE void store_squares(const Part& part, float (&squares)[OwnVectors::kCount],
                                 float* g_squares) {
  MAMBA2_UNROLL
  for (int i = 0; i < OwnVectors::kCount; ++i) {
    MAMBA2_UNROLL
    for (int step = RowTile::kUnits / 2; step > 0; step /= 2) {
      squares[i] += __shfl_xor_sync(kAllLanes, squares[i], step);
    }
    const bool mine = OwnVectors::column() == 0 && OwnVectors::row(i) < part.rows;
    if (mine && part.first_output == 0) g_squares[part.first_row + OwnVectors::row(i)] = squares[i];
  }
}

__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 2)
    multiply_parts(MAMBA2_GRID_CONSTANT const Params params, Slices slices, Parts parts) {
  Stage* s_stages = static_cast<Stage*>(ptx::dynamic_smem());  // (kStages)
  const int slice = static_cast<int>(blockIdx.y);
  const Part part(params, kOutputs, slice * slices.chunks * kChunk, slices.chunks * kChunk);
  const int chunks = part.chunks(kChunk);
  const auto request_rows = [&](int c, Stage& stage) {
    part.request_rows(params.x, c * kChunk, stage.x);
    if (params.z.ptr) part.request_rows(params.z, c * kChunk, stage.z);
  };
  if (!params.early_weights) ptx::griddepcontrol_wait();
  MAMBA2_UNROLL
  for (int c = 0; c < kStages; ++c) {
    if (c < chunks) part.request_weight(params, c * kChunk, s_stages[c].weight);
  }
  Packed<T, kVec> norm_weight = load_norm_weight(params, part.first_k + OwnVectors::column());
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  MAMBA2_UNROLL
  for (int c = 0; c < kStages; ++c) {
    if (c < chunks) request_rows(c, s_stages[c]);
    ptx::cp_async_commit_group();
  }

  WarpSums<kOutputs> warp;
  float squares[OwnVectors::kCount] = {};
  MAMBA2_NO_UNROLL
  for (int c = 0; c < chunks; ++c) {
    Stage& stage = s_stages[c % kStages];
    ptx::cp_async_wait_group<kStages - 1>();
    gate_own(params, stage, norm_weight, squares);
    __syncthreads();
    norm_weight = load_norm_weight(params, part.first_k + (c + 1) * kChunk + OwnVectors::column());
    warp.multiply(stage.x, stage.weight);
    if (c + kStages < chunks) {
      __syncthreads();  // all have read the stage
      part.request_weight(params, (c + kStages) * kChunk, stage.weight);
      request_rows(c + kStages, stage);
    }
    ptx::cp_async_commit_group();
  }
  float* g_products = parts.products + (slice * params.b + part.first_row) * params.o;
  WarpSums<kOutputs>::for_places([&](int i, int row, int output) {
    const int at = part.first_output + output;
    if (row >= part.rows || at >= params.o) return;
    const float2 sums{warp.pair(i)[0], warp.pair(i)[1]};
    *reinterpret_cast<float2*>(g_products + int64_t(row) * params.o + at) = sums;
  });
  store_squares(part, squares, parts.squares + slice * params.b);
}

// ---- the sum and the next norm ----

constexpr int kMaxThreads = 512;
constexpr int kSumVec = 4;

struct SumParams {
  Parts parts;
  int slices;
  int product_d;  // channels of the first norm
  double product_eps;
  bool early_weights;
  add_norm::ForwardParams next;
};

// A thread's channels of the residual and of every slice, as they lie in memory.
struct Summands {
  Packed<float, kSumVec> residual, part[kMaxSlices];

  MAMBA2_DEVICE void load(const SumParams& params, const float* g_residual, int64_t row, int k) {
    const add_norm::ForwardParams& next = params.next;
    const float* g_product = params.parts.products + row * next.d + k;
    residual.load(g_residual + k);
    MAMBA2_UNROLL
    for (int s = 0; s < kMaxSlices; ++s) {
      part[s].zero();
      if (s < params.slices) part[s].load(g_product + s * next.b * next.d);
    }
  }
  // Their sum, the slices times `scale`; returns its squares' sum.
  MAMBA2_DEVICE float add(float scale, float (&v)[kSumVec]) const {
    float added[kSumVec] = {}, of_slice[kSumVec], sum = 0;
    MAMBA2_UNROLL
    for (int s = 0; s < kMaxSlices; ++s) {
      part[s].unpack(of_slice);
      MAMBA2_UNROLL
      for (int c = 0; c < kSumVec; ++c) added[c] += of_slice[c];
    }
    residual.unpack(v);
    MAMBA2_UNROLL
    for (int c = 0; c < kSumVec; ++c) {
      v[c] += scale * added[c];
      sum += v[c] * v[c];
    }
    return sum;
  }
};

__global__ void MAMBA2_LAUNCH_BOUNDS(kMaxThreads, 1)
    add_parts(MAMBA2_GRID_CONSTANT const SumParams params) {
  const add_norm::ForwardParams& next = params.next;
  float* s_sums = static_cast<float*>(ptx::dynamic_smem());
  const int64_t row = blockIdx.x;
  float* g_residual = static_cast<float*>(next.residual_out) + row * next.residual_out_stride;
  T* g_y = static_cast<T*>(next.y) + row * next.d;
  const int slab = static_cast<int>(blockDim.x) * kSumVec;
  const int own_k = static_cast<int>(threadIdx.x) * kSumVec;  // stays in registers
  const bool has_own = own_k < next.d;

  if (!params.early_weights) ptx::griddepcontrol_wait();
  float weight[kSumVec] = {}, v[kSumVec];
  if (has_own) load_any(next.weight, own_k, weight);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  Summands own;
  if (has_own) own.load(params, g_residual, row, own_k);  // before anything that waits
  float squares = 0, sum = 0;
  MAMBA2_UNROLL
  for (int s = 0; s < kMaxSlices; ++s) {
    if (s < params.slices) squares += params.parts.squares[s * next.b + row];
  }
  const float scale = add_norm::inverse_rms(squares, params.product_d, params.product_eps);
  MAMBA2_NO_UNROLL
  for (int k = own_k + slab; k < next.d; k += slab) {
    Summands others;
    others.load(params, g_residual, row, k);
    sum += others.add(scale, v);
    store_vector(g_residual + k, v);
  }
  if (has_own) {
    sum += own.add(scale, v);
    store_vector(g_residual + own_k, v);
  }
  sum = add_norm::sum_over_block(sum, s_sums);
  const float r = add_norm::inverse_rms(sum, next.d, next.eps);
  MAMBA2_NO_UNROLL
  for (int k = own_k; k < next.d; k += slab) {
    if (k != own_k) {
      load_vector(g_residual + k, v);
      load_any(next.weight, k, weight);
    }
    MAMBA2_UNROLL
    for (int c = 0; c < kSumVec; ++c) weight[c] *= r * v[c];
    store_vector(g_y + k, weight);
  }
}

}  // namespace

bool fits_rows(const Params& product, const add_norm::ForwardParams& next) {
  const bool dtypes = product.dtype == DType::bf16 && product.x_dtype == DType::bf16 &&
                      product.out_dtype == DType::f32 && next.dtype == DType::bf16 &&
                      next.weight.dtype != DType::f64 && product.norm_weight.dtype == DType::bf16;
  const bool simple = product.s == product.d && !product.bias && product.add &&
                      product.d % kVec == 0 && product.o % kSumVec == 0 &&
                      ceil_div(product.b, int64_t{kRows}) <= 65535;
  const Matrix residual{product.out.ptr, product.out.stride};
  return dtypes && simple && is_aligned(product.x, sizeof(T)) && is_aligned(product.z, sizeof(T)) &&
         is_aligned({product.weight}, sizeof(T)) &&
         is_aligned({product.norm_weight.ptr}, sizeof(T)) && is_aligned(residual, sizeof(float));
}

std::size_t rows_workspace_bytes(const Params& product) {
  return sizeof(float) * Slices(product).count * product.b * (product.o + 1);
}

int run_rows(const Params& product, const add_norm::ForwardParams& next, void* workspace,
             void* stream) {
  const Slices slices(product);
  const Parts parts = parts_in(product, slices, workspace);
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(ceil_div(product.o, kOutputs)),
                 static_cast<unsigned>(slices.count),
                 static_cast<unsigned>(ceil_div(product.b, int64_t{kRows})));
  at.threads = kThreads;
  at.smem_bytes = sizeof(Stage) * kStages;
  at.programmatic = true;
  if (const int error = launch(multiply_parts, at, stream, product, slices, parts)) return error;
  at.grid = dim3(static_cast<unsigned>(next.b));
  const int threads = round_up(ceil_div(next.d, kSumVec), 32);
  at.threads = threads < kMaxThreads ? threads : kMaxThreads;
  at.smem_bytes = sizeof(float) * at.threads / 32;
  const SumParams sum{parts, slices.count, product.d, product.eps, product.early_weights, next};
  return launch(add_parts, at, stream, sum);
}

}  // namespace mamba2::norm_linear
