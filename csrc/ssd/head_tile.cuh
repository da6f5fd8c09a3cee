// 16 heads x q tokens of a chunk, as the kernels around dt take them: dt lies heads first, two
// heads a thread; sums along the chunk are scans of lanes of a few tokens each. Shared memory turns
// one over into the other.
#pragma once
#include "chunks.cuh"
#include "steps.cuh"

namespace mamba2::ssd {

constexpr int kTileHeads = 16, kTilePairs = kTileHeads / 2;

// kRun: consecutive tokens of a lane. Runs of 8 are followed by a gap, and so is a row, so that
// neither eight pairs of heads and four tokens nor the lanes of half a warp meet in a bank.
template <int q, int kRun>
struct HeadTile {
  static constexpr int kGap = 2, kRunGap = kRun < 8 ? 0 : kGap;
  float rows[kTileHeads][q + q / kRun * kRunGap + kGap];
  MAMBA2_DEVICE float& at(int head, int t) { return rows[head][t + t / kRun * kRunGap]; }
  MAMBA2_DEVICE float at(int head, int t) const { return rows[head][t + t / kRun * kRunGap]; }
};

// A run, in global memory.
template <int kRun>
MAMBA2_DEVICE void load_run(float (&r)[kRun], const float* from) {
  MAMBA2_UNROLL for (int k = 0; k < kRun; k += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + k);
    r[k] = v.x, r[k + 1] = v.y, r[k + 2] = v.z, r[k + 3] = v.w;
  }
}
template <int kRun>
MAMBA2_DEVICE void store_run(float* to, const float (&r)[kRun]) {
  MAMBA2_UNROLL for (int k = 0; k < kRun; k += 4) * reinterpret_cast<float4*>(to + k) =
      float4{r[k], r[k + 1], r[k + 2], r[k + 3]};
}
// In a row of a tile.
template <int kRun>
MAMBA2_DEVICE void load_row(float (&r)[kRun], const float* from) {
  MAMBA2_UNROLL for (int k = 0; k < kRun; k += 2) {
    const float2 v = *reinterpret_cast<const float2*>(from + k);
    r[k] = v.x, r[k + 1] = v.y;
  }
}
template <int kRun>
MAMBA2_DEVICE void store_row(float* to, const float (&r)[kRun]) {
  MAMBA2_UNROLL for (int k = 0; k < kRun; k += 2) * reinterpret_cast<float2*>(to + k) =
      float2{r[k], r[k + 1]};
}

// Whether dt, or d_dt, of every second head and the next one is an aligned word of 32 bits.
template <class Tensor>
bool heads_pair_up(const Tensor& dt, DType dtype, int h) {
  return size_of(dtype) == 2 && dt.h == 1 && dt.l % 2 == 0 && dt.b % 2 == 0 && h % 2 == 0 &&
         reinterpret_cast<uintptr_t>(dt.ptr) % 4 == 0;
}

// A thread's part of a tile's dt: two neighbouring heads and every kApart-th token from `first` on.
// Where heads pair up, what is made from it finds the loads on their way.
template <int kSteps, int kApart>
struct PairOfHeads {
  const int head, i_h, first, count;  // in the tile, of all; token of the chunk, and its tokens
  const bool exists, has_second;      // the heads
  uint32_t words[kSteps];             // of heads that pair up
  uint32_t bias[2] = {};

  MAMBA2_DEVICE PairOfHeads(const StepInputs& in, bool paired, const Chunk& chunk, int first_head,
                            int h)
      : head(threadIdx.x % kTilePairs * 2),
        i_h(first_head + head),
        first(threadIdx.x / kTilePairs),
        count(chunk.count),
        exists(i_h < h),
        has_second(i_h + 1 < h) {
    if (paired) {
      const uint16_t* of = static_cast<const uint16_t*>(in.dt.ptr) + offset(in.dt, chunk);
      MAMBA2_UNROLL for (int k = 0; k < kSteps; ++k, of += kApart * in.dt.l) words[k] =
          has_token(k) ? *reinterpret_cast<const uint32_t*>(of) : 0;
    }
    if (exists) {
      bias[0] = load_bits_of(in.dt_bias, i_h);
      bias[1] = load_bits_of(in.dt_bias, i_h + has_second);
    }
  }
  MAMBA2_DEVICE int token(int k) const { return first + k * kApart; }
  MAMBA2_DEVICE bool has_token(int k) const { return exists && token(k) < count; }
  // Of the first head and token, in dt or d_dt.
  template <class Tensor>
  MAMBA2_DEVICE int64_t offset(const Tensor& of, const Chunk& chunk) const {
    return chunk.row * of.b + (chunk.token + first) * of.l + i_h * of.h;
  }
  // dt + dt_bias
  MAMBA2_DEVICE void biased(const StepInputs& in, bool paired, const Chunk& chunk,
                            float2 (&v)[kSteps]) const {
    const DType dtype = in.dt_dtype;
    if (paired && dtype == DType::bf16) {
      MAMBA2_UNROLL for (int k = 0; k < kSteps; ++k) v[k] = unpack2<bf16>(words[k]);
    } else if (paired) {
      MAMBA2_UNROLL for (int k = 0; k < kSteps; ++k) v[k] = unpack2<f16>(words[k]);
    } else {
      int64_t at = offset(in.dt, chunk);
      uint32_t bits[kSteps][2];
      MAMBA2_UNROLL for (int k = 0; k < kSteps; ++k, at += kApart * in.dt.l) {
        bits[k][0] = has_token(k) ? load_bits(in.dt.ptr, dtype, at) : 0;
        bits[k][1] = has_token(k) && has_second ? load_bits(in.dt.ptr, dtype, at + in.dt.h) : 0;
      }
      MAMBA2_UNROLL for (int k = 0; k < kSteps; ++k) v[k] =
          float2{float_of_bits(dtype, bits[k][0]), float_of_bits(dtype, bits[k][1])};
    }
    const float b[2] = {float_of_bits(in.dt_bias.dtype, bias[0]),
                        float_of_bits(in.dt_bias.dtype, bias[1])};
    MAMBA2_UNROLL for (int k = 0; k < kSteps; ++k) v[k].x += b[0], v[k].y += b[1];
  }
};

}  // namespace mamba2::ssd
