// Rows of any floating dtype, read into and written from the type the CPU computes in.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Consecutive elements of one type as another.
template <class To, class From>
void convert_row(const From* from, int columns, To* to) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, static_cast<std::size_t>(columns) * sizeof(To));
  } else {
    for (int k = 0; k < columns; ++k) to[k] = static_cast<To>(from[k]);
  }
}

// `rows` rows of `columns` consecutive elements; rows lie from_stride / to_stride elements apart.
template <class T>
void load_rows(DType dtype, const void* from, int64_t from_stride, int rows, int columns, T* to,
               int64_t to_stride) {
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    for (int i = 0; i < rows; ++i) {
      convert_row(static_cast<const Element*>(from) + i * from_stride, columns, to + i * to_stride);
    }
  });
}
template <class T>
void store_rows(DType dtype, void* to, int64_t to_stride, int rows, int columns, const T* from,
                int64_t from_stride) {
  with_element_type(dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    for (int i = 0; i < rows; ++i) {
      convert_row(from + i * from_stride, columns, static_cast<Element*>(to) + i * to_stride);
    }
  });
}

}  // namespace mamba2::cpu
