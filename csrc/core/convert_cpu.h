// Rows of any floating dtype, read into and written from the type the CPU computes in.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "dtype.h"

namespace mamba2::cpu {

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
auto with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<c10::BFloat16*>(nullptr));
    default:
      return f(static_cast<c10::Half*>(nullptr));
  }
}

template <class T>
T load(DType dtype, const void* from, int64_t i) {
  return with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    return static_cast<T>(static_cast<const Element*>(from)[i]);
  });
}
template <class T>
T load(const AnyFloat& from, int64_t i) {
  return load<T>(from.dtype, from.ptr, i);
}
template <class T>
void store(DType dtype, void* to, int64_t i, T value) {
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    static_cast<Element*>(to)[i] = static_cast<Element>(value);
  });
}

// `rows` rows of `columns` consecutive elements; rows lie from_stride / to_stride elements apart.
template <class T>
void load_rows(DType dtype, const void* from, int64_t from_stride, int rows, int columns, T* to,
               int64_t to_stride) {
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    for (int i = 0; i < rows; ++i) {
      const Element* source = static_cast<const Element*>(from) + i * from_stride;
      T* target = to + i * to_stride;
      for (int k = 0; k < columns; ++k) target[k] = static_cast<T>(source[k]);
    }
  });
}
template <class T>
void store_rows(DType dtype, void* to, int64_t to_stride, int rows, int columns, const T* from,
                int64_t from_stride) {
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    for (int i = 0; i < rows; ++i) {
      const T* source = from + i * from_stride;
      Element* target = static_cast<Element*>(to) + i * to_stride;
      for (int k = 0; k < columns; ++k) target[k] = static_cast<Element>(source[k]);
    }
  });
}

}  // namespace mamba2::cpu
