// Element types of the operators, as run-time values. No torch, no CUDA.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mamba2 {

enum class DType : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

constexpr std::size_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
constexpr const char* name_of(DType t) {
  return t == DType::f64    ? "float64"
         : t == DType::f32  ? "float32"
         : t == DType::bf16 ? "bfloat16"
                            : "float16";
}

// A small array of any floating dtype (dt, A, D, dt_bias): read one element at a time.
struct AnyFloat {
  const void* ptr = nullptr;
  DType dtype = DType::f32;
  explicit constexpr operator bool() const { return ptr != nullptr; }
};

}  // namespace mamba2
