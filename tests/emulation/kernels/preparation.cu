// chunk_cumsum, and the counts that it makes zero for the kernels behind it.
#include "../../../csrc/ssd/chunk_cumsum.cu"
#include "self_test.h"

namespace mamba2::self_test {

int preparation(const Prepared& p) {
  ssd::Inputs in;
  in.shape.b = in.shape.nseq = 1;
  in.shape.l = p.length;
  in.shape.h = p.h;
  in.shape.p = 64;
  in.dt = {p.dt, int64_t(p.length) * p.h, p.h, 1};
  in.A.ptr = p.A;
  in.dt_max = 1;
  ssd::Chunking chunking;
  chunking.q = 128;
  chunking.l = p.length;
  chunking.chunks_per_row = ceil_div(p.length, 128);
  chunking.by_row = Divisor(chunking.chunks_per_row);
  const ssd::ZeroCounts zeros{p.zeros, p.zero_count};
  return ssd::chunk_cumsum(in, chunking, p.delta, p.a_cumsum_log2, nullptr, nullptr, nullptr,
                           zeros);
}

}  // namespace mamba2::self_test
