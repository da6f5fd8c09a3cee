// Host side of the operators: tensors through PyTorch's stable ABI, and nothing else of torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "dtype.h"
#include "rows.h"

// The library's operators live in this namespace; the host emulation registers the same table in
// another one.
#ifndef MAMBA2_OP_NAMESPACE
#define MAMBA2_OP_NAMESPACE mamba2_cuda
#endif

namespace mamba2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The four floating dtypes the operators know; anything else is nullopt.
inline std::optional<DType> floating_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return std::nullopt;
  }
}
// The dtype of a tensor that passed its check.
inline DType dtype_of(const Tensor& t) {
  const auto dtype = floating_dtype(t.scalar_type());
  check(dtype.has_value(), "a floating tensor was expected");
  return *dtype;
}
inline ScalarType scalar_type_of(DType t) {
  switch (t) {
    case DType::f64:
      return ScalarType::Double;
    case DType::f32:
      return ScalarType::Float;
    case DType::bf16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Half;
  }
}
// What states and the gradients of parameters are kept in: fp32, and fp64 when x is.
inline DType state_dtype(DType x) { return x == DType::f64 ? DType::f64 : DType::f32; }

// Uninitialised memory on the device of `like`. Says how much was asked for when there is none.
using Sizes = std::vector<int64_t>;
Tensor allocate(const Sizes& sizes, ScalarType dtype, const Tensor& like);
inline Tensor allocate(const Sizes& sizes, DType dtype, const Tensor& like) {
  return allocate(sizes, scalar_type_of(dtype), like);
}
// `bytes` of scratch memory on the device of `like`.
inline Tensor allocate_bytes(int64_t bytes, const Tensor& like) {
  return allocate(Sizes{bytes}, ScalarType::Byte, like);
}
// What an operator returns for an output that is not there.
inline Tensor absent(DType dtype, const Tensor& like) { return allocate(Sizes{0}, dtype, like); }
// The same for a result that nobody has made: inside the library it is undefined, which costs less.
inline Tensor or_absent(const Tensor& t, DType dtype, const Tensor& like) {
  return t.defined() ? t : absent(dtype, like);
}

// Whether kernels read `t` where it lies: last stride 1; address and other strides multiples of 16
// bytes. Dimensions of one element have no stride worth asking about.
bool readable_in_place(const Tensor& t);
// `t` itself where it can be read in place or is contiguous already, else a contiguous copy.
Tensor readable(const Tensor& t);
// `t` itself where it is contiguous and its address a multiple of 16 bytes, else such a copy.
Tensor compact(const Tensor& t);

// A small contiguous array of any floating dtype.
inline AnyFloat any_float(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }
// A (b, l, d) tensor whose last stride is 1.
inline Rows rows(const Tensor& t) {
  const auto strides = t.strides();
  return {t.const_data_ptr(), strides[0], strides[1]};
}
inline RowsOut rows_out(const Tensor& t) {
  const auto strides = t.strides();
  return {t.mutable_data_ptr(), strides[0], strides[1]};
}

inline Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}
// Where a result goes: the tensor that the caller gave for it, or new memory of the same shape and
// dtype as `like`.
inline Tensor given_or_new(const OptionalTensor& given, const Tensor& like) {
  return given ? *given : allocate(sizes_of(like), like.scalar_type(), like);
}
// Keeps `t` alive as long as a call whose parameters point into it.
inline const Tensor& keep(std::vector<Tensor>& kept, Tensor t) {
  kept.push_back(std::move(t));
  return kept.back();
}
// to = from, or zeros where there is none. Leaves undefined and 0-element tensors alone.
void fill(Tensor to, const OptionalTensor& from);

// Checks cu_seqlens (nseq + 1), which wants b = 1; returns nseq.
int64_t check_cu_seqlens(const ArgumentCheck& check, const Tensor& cu_seqlens, int64_t b);

}  // namespace mamba2
