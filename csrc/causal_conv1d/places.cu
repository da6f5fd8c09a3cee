// Where the tokens of packed sequences stand: bounds by the scan's chunk table, then a thread a
// token, which finds its sequence by bisection.
#include "../core/launch.h"
#include "../ssd/launch.h"
#include "causal_conv1d.cuh"

namespace mamba2::causal_conv1d {
namespace {

constexpr int kThreads = 256;
constexpr int kWholeSequences = 1 << 30;  // the chunk length: every sequence is one chunk

ssd::Shape sequences_of(const Shape& shape) {
  ssd::Shape s;
  s.b = shape.b;
  s.l = shape.l;
  s.nseq = shape.nseq;
  s.packed = shape.packed;
  return s;
}

__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 4)
    token_places(const int* first_token, int nseq, int l, int4* table) {
  const int t = blockIdx.x * kThreads + threadIdx.x;
  if (t >= l) return;
  if (nseq == 0 || t < first_token[0] || t >= first_token[nseq]) {
    table[t] = int4{-1, 0, 0, 0};
    return;
  }
  int i_seq = 0;  // the last sequence that starts at or before t
  for (int past = nseq; past - i_seq > 1;) {
    const int middle = (i_seq + past) / 2;
    (first_token[middle] <= t ? i_seq : past) = middle;
  }
  table[t] = int4{i_seq, first_token[i_seq], first_token[i_seq + 1], 0};
}

}  // namespace

std::size_t places_bytes(const Shape& shape) {
  if (!shape.packed) return 0;
  return ssd::chunking_bytes(sequences_of(shape), kWholeSequences) + sizeof(int4) * shape.l;
}

int make_places(const Inputs& in, void* memory, Places* out, void* stream) {
  *out = Places{};
  out->l = static_cast<int>(in.shape.l);
  if (!in.shape.packed) return 0;
  ssd::Inputs sequences;
  sequences.shape = sequences_of(in.shape);
  sequences.cu_seqlens = in.cu_seqlens;
  sequences.cu_seqlens_64 = in.cu_seqlens_64;
  ssd::Chunking chunking;
  const int error = ssd::make_chunking(sequences, kWholeSequences, memory, &chunking, stream);
  if (error) return error;
  const std::size_t used = ssd::chunking_bytes(sequences.shape, kWholeSequences);
  int4* table = reinterpret_cast<int4*>(static_cast<char*>(memory) + used);
  out->table = table;
  out->first_token = chunking.first_token;
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(ceil_div(in.shape.l, kThreads)));
  at.threads = kThreads;
  return launch(token_places, at, stream, out->first_token, static_cast<int>(in.shape.nseq), out->l,
                table);
}

}  // namespace mamba2::causal_conv1d
