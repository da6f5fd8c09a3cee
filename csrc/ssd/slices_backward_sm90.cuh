// chunk_scan_backward (sm_90a): the order of its blocks, and where those of several slices of a
// group's heads leave their parts of dB and dC, which group_sum adds up.
//
// The two blocks of a chunk, group and slice are a pair. A group's pairs are counted chunk by
// chunk, a chunk's slices one after the other; the grid takes them so, both blocks side by side,
// but for the last ones, of which all earlier blocks come first (unpaired).
//
// A part is a tile (64, n) in fp32, as large as two images. Of a pair's images of G only its own
// blocks have need. Once both have read those of the first heads, parts can lie there:
//
//   heads 0 ..  3   dB, dC of its later block
//   heads 4 ..  9   dB, dC, dC of the later tokens of the next pair's earlier block
//   heads 10 .. 15  those of an unpaired earlier block, as many pairs behind as are unpaired
//
// So a block waits only for blocks before it in the grid, which began before it did. The first
// pair's earlier block has memory of its own, as have all blocks where slices have too few heads.
#pragma once
#include "scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

// Parts in the order in which a block has them.
enum Part { kPart_dB, kPart_dC, kPart_later_dC, kEarlierParts, kLaterParts = kPart_later_dC };
constexpr int kPairParts = kLaterParts + kEarlierParts;
constexpr int kPartImages = 2;
// The images of a pair that parts go to: without unpaired blocks', and with them.
constexpr int kPairImages = kPairParts * kPartImages;
constexpr int kUnpairedImages = kPairImages + kEarlierParts * kPartImages;
constexpr int kMostSharedSlices = 16;

// The i-th chunk in the order in which both directions of state_sweeps have come by: of each
// sequence, from its middle on outwards.
MAMBA2_DEVICE int from_middle(const Chunking& chunking, int i) {
  const Chunk chunk = chunking.at(i);
  if (chunk.i_seq < 0) return i;
  const int middle = chunking.count(chunk.i_seq) / 2, away = (chunk.i_c + 1) / 2;
  return i - chunk.i_c + middle + (chunk.i_c % 2 ? -away : away);
}
// Where the i-th chunk of the order is.
MAMBA2_DEVICE int chunk_in_order(const BackwardArgs& args, int i) {
  return args.from_middle ? from_middle(args.chunking, i) : i;
}

// What a block of the earlier tokens waits for and writes to: so many pairs before its own.
MAMBA2_DEVICE int pairs_back(const BackwardArgs& args, int pair, int group) {
  const bool unpaired = group == args.g - 1 && pair >= args.pairs() - args.unpaired_pairs;
  return unpaired ? args.unpaired_pairs : 1;
}

// Where a block leaves its parts: where slices share no images, and anywhere.
MAMBA2_DEVICE float* parts_apart(const BackwardArgs& args, int pair, int group, bool earlier) {
  const int64_t first = (int64_t(pair) * args.g + group) * kPairParts;
  return args.parts + (first + (earlier ? kLaterParts : 0)) * (kBlock * args.n);
}
MAMBA2_DEVICE float* parts_of(const BackwardArgs& args, int pair, int group, bool earlier) {
  if (!args.shared_images) return parts_apart(args, pair, group, earlier);
  const int64_t tile = int64_t(kBlock) * args.n;
  if (earlier && pair == 0) return args.parts + group * kEarlierParts * tile;
  const int back = earlier ? pairs_back(args, pair, group) : 0;
  const int at = pair - back, i = at / args.slices, slice = at - i * args.slices;
  const int64_t head = args.head_at(chunk_in_order(args, i), args.first_head(group, slice));
  const int first = back > 1 ? kPairParts : earlier ? kLaterParts : 0;
  return static_cast<float*>(args.d_states) + (head + first * kPartImages) * (tile / kPartImages);
}

// Whether a block has read the images that others write to.
MAMBA2_DEVICE int* images_read(const BackwardArgs& args, int pair, int group, int block) {
  return args.turns + 2 * (int64_t(pair) * args.g + group) + block;
}
// Until those that this block writes to have been read.
MAMBA2_DEVICE void wait_images(const BackwardArgs& args, int pair, int group, int block) {
  if (!args.shared_images) return;
  if (block == 1) return tile::wait_published(images_read(args, pair, group, 0), 1);
  if (pair == 0) return;
  const int before = pair - pairs_back(args, pair, group);
  tile::wait_published(images_read(args, before, group, 0), 1);
  tile::wait_published(images_read(args, before, group, 1), 1);
}

}  // namespace mamba2::ssd::sm90
