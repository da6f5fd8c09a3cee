// What chunk_scan_sm80.cu is given, and which part of it a block works on.
#pragma once
#include "launch.h"

namespace mamba2::ssd::sm80 {

constexpr int kMaxItems = 8;  // of a block: C B^T is then a tenth of its work

struct ChunkScanParams {
  Strided x, B, C, z;          // (b, l, h, p), (b, l, g, n) twice, (b, l, h, p) optional   T
  const void* states;          // (chunks, h, p, n)   T; or images of 64 channels (load_S_images)
  const float* delta;          // (chunks, h, q)
  const float* a_cumsum_log2;  // (chunks, h, q)
  AnyFloat D;                  // (h) or (h, p), optional
  bool D_per_channel;
  StridedOut y;   // (b, l, h, p)       T, out; gate backward: dy before the gate
  Strided dy;     // (b, l, h, p)       T, gate backward
  StridedOut dz;  // (b, l, h, p)       T, out, gate backward
  int image_n;    // gate backward
  int64_t images;
  Chunking chunking;
  int h, p, n, heads_per_group;
  int p_tiles, items_per_group, items_per_block, blocks_per_group;
};

// What a block works on. It lies in shared memory, for the accumulators leave no registers for it.
struct Work {
  struct Item {
    int i_h, p_base;
  };
  int row, token, count;  // of the chunk
  int i_chunk, i_g, items;
  Item item[kMaxItems];
};

// One thread per item.
template <int kTileP>
MAMBA2_DEVICE void find_work(const ChunkScanParams& params, Work& work, int i) {
  const int groups = params.h / params.heads_per_group;
  const int block = static_cast<int>(blockIdx.x), i_pair = block / params.blocks_per_group;
  const int i_g = i_pair % groups, i_chunk = i_pair / groups;
  const int first = block % params.blocks_per_group * params.items_per_block;
  const int i_h = i_g * params.heads_per_group + (first + i) / params.p_tiles;
  work.item[i] = {i_h, (first + i) % params.p_tiles * kTileP};
  if (i > 0) return;
  const int left = params.items_per_group - first;
  const Chunk chunk = params.chunking.at(i_chunk);
  work.i_g = i_g, work.i_chunk = i_chunk;
  work.items = left < params.items_per_block ? left : params.items_per_block;
  work.row = chunk.row, work.token = chunk.token;
  work.count = chunk.i_seq < 0 ? 0 : chunk.count;
}

// How many items a block takes: whichever count ends the grid first. A block's time is its items'
// and 0.6 of an item for C B^T and the first copies; blocks run in waves that fill the card.
inline int choose_items(int items_per_group, int64_t pairs, int64_t blocks_at_once) {
  int best = 1;
  int64_t best_time = INT64_MAX;
  for (int items = 1; items <= kMaxItems && items <= items_per_group; ++items) {
    const int64_t waves = ceil_div(pairs * ceil_div(items_per_group, items), blocks_at_once);
    const int64_t time = waves * (10 * items + 6);
    if (time < best_time) best = items, best_time = time;
  }
  return best;
}

}  // namespace mamba2::ssd::sm80
