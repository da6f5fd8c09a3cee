// From a dtype known at run time to a type known at compile time.
#pragma once
#include "convert.cuh"

namespace mamba2 {

template <class T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>{}) for the element type T.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(TypeTag<double>{});
    case DType::f32:
      return f(TypeTag<float>{});
    case DType::bf16:
      return f(TypeTag<bf16>{});
    default:
      return f(TypeTag<f16>{});
  }
}
// For states and gradients of parameters: fp64 or fp32.
template <class F>
int with_accumulator(DType dtype, F f) {
  return dtype == DType::f64 ? f(TypeTag<double>{}) : f(TypeTag<float>{});
}

}  // namespace mamba2
