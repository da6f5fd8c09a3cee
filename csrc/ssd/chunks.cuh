// Chunks: q consecutive tokens of one sequence (fewer in its last chunk), numbered over all
// sequences. Dense rows need no table; packed sequences get one from chunk_table.cu.
#pragma once
#include <vector_types.h>

#include "../core/divisor.h"
#include "shape.h"

namespace mamba2::ssd {

struct Chunk {
  int i_seq;     // sequence; -1: no such chunk (the grid is an upper bound when packed)
  int row;       // batch row of the tensors
  int token;     // first token, within the row
  int count;     // tokens, 1..q
  int i_c;       // index within the sequence
  bool is_last;  // of its sequence
};

// The tokens of one sequence.
struct Sequence {
  int row;         // batch row of the tensors
  int64_t token;   // first token, within the row
  int64_t length;  // tokens
};

// How to find chunks. Passed by value to kernels.
struct Chunking {
  int q = 64;
  int64_t l = 0;
  int chunks_per_row = 0;  // dense; the same as a divisor:
  Divisor by_row;
  const int4* table = nullptr;       // packed: (chunks) {i_seq, token, count, i_c << 1 | is_last}
  const int* first_chunk = nullptr;  // packed: (nseq + 1) first chunk of each sequence
  const int* first_token = nullptr;  // packed: (nseq + 1) first token of each sequence

  MAMBA2_HD Chunk at(int i) const {
    if (table) {
      const int4 e = table[i];
      return {e.x, 0, e.y, e.z, e.w >> 1, (e.w & 1) != 0};
    }
    const int row = i / by_row, i_c = i % by_row;
    const int token = i_c * q;
    const int64_t left = l - token;
    return {row, row, token, int(left < q ? left : q), i_c, i_c == chunks_per_row - 1};
  }
  // Chunk i + n (n < 0: of the same sequence), from chunk i: as at(), with less arithmetic.
  MAMBA2_HD Chunk after(const Chunk& c, int i, int n) const {
    if (table || c.i_c + n >= chunks_per_row) return at(i + n);
    const int token = c.token + n * q;
    const int64_t left = l - token;
    const bool is_last = c.i_c + n == chunks_per_row - 1;
    return {c.row, c.row, token, int(left < q ? left : q), c.i_c + n, is_last};
  }
  // First chunk and number of chunks of a sequence.
  MAMBA2_HD int first(int i_seq) const {
    return table ? first_chunk[i_seq] : i_seq * chunks_per_row;
  }
  MAMBA2_HD int count(int i_seq) const {
    return table ? first_chunk[i_seq + 1] - first_chunk[i_seq] : chunks_per_row;
  }
  MAMBA2_HD Sequence sequence(int i_seq) const {
    if (!table) return {i_seq, 0, l};
    return {0, first_token[i_seq], first_token[i_seq + 1] - first_token[i_seq]};
  }
};

}  // namespace mamba2::ssd
