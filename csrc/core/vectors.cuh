// A thread's consecutive elements: read and written by accesses of up to 16 bytes, computed with in
// the accumulator's type. Addresses are multiples of the access.
#pragma once
#include <vector_types.h>

#include <type_traits>

#include "../ptx/global.cuh"
#include "convert.cuh"

namespace mamba2 {

constexpr int kVectorBytes = 16;  // of the widest access

// Elements as they lie in memory: loads of several can be in flight before one is looked at.
// kCount elements of T are a whole number of 16 bytes, or 8, 4 or 2 bytes.
template <class T, int kCount>
struct Packed {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * kCount;
  static_assert(kBytes % 16 == 0 || kBytes == 8 || kBytes == 4 || kBytes == 2, "one access each");
  uint32_t words[(kBytes + 3) / 4];

  MAMBA2_DEVICE void load(const T* from) {
    if constexpr (kBytes >= 16) {
      MAMBA2_UNROLL
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[i];
        words[4 * i] = v.x;
        words[4 * i + 1] = v.y;
        words[4 * i + 2] = v.z;
        words[4 * i + 3] = v.w;
      }
    } else if constexpr (kBytes == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words[0] = v.x;
      words[1] = v.y;
    } else if constexpr (kBytes == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    }
  }
  MAMBA2_DEVICE void store(T* to) const {
    if constexpr (kBytes >= 16) {
      MAMBA2_UNROLL
      for (int i = 0; i < kBytes / 16; ++i) {
        ptx::st_global_v4(reinterpret_cast<uint4*>(to) + i,
                          {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]});
      }
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
    }
  }
  MAMBA2_DEVICE void zero() {
    MAMBA2_UNROLL
    for (uint32_t& word : words) word = 0;
  }

  template <class U>
  MAMBA2_DEVICE void unpack(U (&to)[kCount]) const {
    MAMBA2_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(T) == 2) {
        const float2 pair = unpack2<T>(words[i / 2]);
        to[i] = static_cast<U>(i % 2 ? pair.y : pair.x);
      } else {
        constexpr int kPerElement = static_cast<int>(sizeof(T)) / 4;
        T element;
        __builtin_memcpy(&element, words + i * kPerElement, sizeof element);
        to[i] = static_cast<U>(element);
      }
    }
  }
  template <class U>
  MAMBA2_DEVICE void pack(const U (&from)[kCount]) {
    if constexpr (sizeof(T) == 2) {
      MAMBA2_UNROLL
      for (int i = 0; i < kCount; i += 2) {
        words[i / 2] = pack2<T>(from[i], i + 1 < kCount ? from[i + 1] : 0);
      }
    } else {
      MAMBA2_UNROLL
      for (int i = 0; i < kCount; ++i) {
        constexpr int kPerElement = static_cast<int>(sizeof(T)) / 4;
        const T element = static_cast<T>(from[i]);
        __builtin_memcpy(words + i * kPerElement, &element, sizeof element);
      }
    }
  }
};

// Elements at .. at + kCount - 1 of an array whose dtype is known at run time only: it is looked at
// once, and no alignment is asked for.
template <int kCount, class U>
MAMBA2_DEVICE void load_any(const AnyFloat& from, int64_t at, U (&to)[kCount]) {
  const auto load_as = [&](auto zero) {
    using T = decltype(zero);
    const T* elements = static_cast<const T*>(from.ptr) + at;
    MAMBA2_UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = convert<U>(elements[i]);
  };
  if (from.dtype == DType::f32) return load_as(float());
  if (from.dtype == DType::bf16) return load_as(bf16());
  if (from.dtype == DType::f16) return load_as(f16());
  load_as(double());
}

template <class T, int kCount, class U>
MAMBA2_DEVICE void load_vector(const T* from, U (&to)[kCount]) {
  Packed<T, kCount> packed;
  packed.load(from);
  packed.unpack(to);
}
template <class T, int kCount, class U>
MAMBA2_DEVICE void store_vector(T* to, const U (&from)[kCount]) {
  Packed<T, kCount> packed;
  packed.pack(from);
  packed.store(to);
}

}  // namespace mamba2
