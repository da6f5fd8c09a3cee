// Conversions between element types and the type the arithmetic runs in.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"
#include "macros.h"

namespace mamba2 {

using bf16 = __nv_bfloat16;
using f16 = __half;

// What a value of type T is computed in: fp32, and fp64 for fp64.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::f16;
};

template <class To, class From>
MAMBA2_HD To convert(From v) {
  return static_cast<To>(v);
}
template <>
MAMBA2_HD float convert<float, bf16>(bf16 v) {
  return __bfloat162float(v);
}
template <>
MAMBA2_HD float convert<float, f16>(f16 v) {
  return __half2float(v);
}
template <>
MAMBA2_HD double convert<double, bf16>(bf16 v) {
  return __bfloat162float(v);
}
template <>
MAMBA2_HD double convert<double, f16>(f16 v) {
  return __half2float(v);
}
template <>
MAMBA2_HD bf16 convert<bf16, float>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
MAMBA2_HD f16 convert<f16, float>(float v) {
  return __float2half_rn(v);
}
template <>
MAMBA2_HD bf16 convert<bf16, double>(double v) {
  return __double2bfloat16(v);
}
template <>
MAMBA2_HD f16 convert<f16, double>(double v) {
  return __double2half(v);
}

// Element i of an array whose dtype is known at run time only.
template <class To>
MAMBA2_DEVICE To load(AnyFloat a, int64_t i) {
  switch (a.dtype) {
    case DType::f64:
      return convert<To>(static_cast<const double*>(a.ptr)[i]);
    case DType::f32:
      return convert<To>(static_cast<const float*>(a.ptr)[i]);
    case DType::bf16:
      return convert<To>(static_cast<const bf16*>(a.ptr)[i]);
    default:
      return convert<To>(static_cast<const f16*>(a.ptr)[i]);
  }
}

// The same in two halves: loads of several such elements are in flight before the first is looked
// at.
struct AnyBits {
  uint32_t low = 0, high = 0;
  DType dtype = DType::f32;
};
MAMBA2_DEVICE AnyBits load_bits(AnyFloat a, int64_t i) {
  AnyBits bits;
  bits.dtype = a.dtype;
  if (size_of(a.dtype) == 2) {
    bits.low = static_cast<const uint16_t*>(a.ptr)[i];
  } else if (size_of(a.dtype) == 4) {
    bits.low = static_cast<const uint32_t*>(a.ptr)[i];
  } else {
    bits.low = static_cast<const uint32_t*>(a.ptr)[2 * i];
    bits.high = static_cast<const uint32_t*>(a.ptr)[2 * i + 1];
  }
  return bits;
}
template <class To>
MAMBA2_DEVICE To value_of(const AnyBits& bits) {
  const uint32_t words[2] = {bits.low, bits.high};
  return load<To>(AnyFloat{words, bits.dtype}, 0);
}

template <class From>
MAMBA2_DEVICE void store(void* ptr, DType dtype, int64_t i, From v) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(ptr)[i] = convert<double>(v);
      break;
    case DType::f32:
      static_cast<float*>(ptr)[i] = convert<float>(v);
      break;
    case DType::bf16:
      static_cast<bf16*>(ptr)[i] = convert<bf16>(v);
      break;
    default:
      static_cast<f16*>(ptr)[i] = convert<f16>(v);
  }
}

// Two values, rounded to T and packed low-first: one register of an mma fragment.
template <class T>
MAMBA2_DEVICE uint32_t pack2(float lo, float hi);
template <>
MAMBA2_DEVICE uint32_t pack2<bf16>(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  uint32_t r;
  __builtin_memcpy(&r, &v, 4);
  return r;
}
template <>
MAMBA2_DEVICE uint32_t pack2<f16>(float lo, float hi) {
  __half2 v = __floats2half2_rn(lo, hi);
  uint32_t r;
  __builtin_memcpy(&r, &v, 4);
  return r;
}
template <class T>
MAMBA2_DEVICE float2 unpack2(uint32_t r);
template <>
MAMBA2_DEVICE float2 unpack2<bf16>(uint32_t r) {  // a bf16 is the upper half of its fp32
  const uint32_t lo = r << 16, hi = r & 0xffff0000u;
  float2 v;
  __builtin_memcpy(&v.x, &lo, 4);
  __builtin_memcpy(&v.y, &hi, 4);
  return v;
}
template <>
MAMBA2_DEVICE float2 unpack2<f16>(uint32_t r) {
  __half2 v;
  __builtin_memcpy(&v, &r, 4);
  return __half22float2(v);
}

}  // namespace mamba2
