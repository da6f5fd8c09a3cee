// Products of small row-major tiles, for the CPU operators. No torch.
#pragma once

namespace mamba2::cpu {

// Rows start `stride` elements apart. Tiles that matmul reads as its right operand or writes have
// rows padded to a multiple of kTilePadding elements; what lies in the padding is of no matter.
constexpr int kTilePadding = 16;
constexpr int padded(int columns) {
  return (columns + kTilePadding - 1) / kTilePadding * kTilePadding;
}

template <class T>
struct Tile {
  T* data;
  int stride;
  T* row(int i) const { return data + static_cast<long>(i) * stride; }
};

// A left operand: element (i, k) lies at data[i * row + k * column].
template <class T>
struct Left {
  const T* data;
  int row, column;
  Left(Tile<T> t) : data(t.data), row(t.stride), column(1) {}
  Left(const T* data, int row, int column) : data(data), row(row), column(column) {}
};
template <class T>
Left<T> transposed(Tile<T> t) {
  return {t.data, 1, t.stride};
}

struct Extent {
  int m, n, k;
};

// out = keep * out + a b: (m, n) from (m, k) and (k, n). With keep 0, out is not read.
// T is float or double.
template <class T>
void matmul(Tile<T> out, Left<T> a, Tile<T> b, Extent extent, T keep);

}  // namespace mamba2::cpu
