// Checks of what callers hand over. A message holds the operator, the argument, what it must be in
// symbols with values, and what was got:
//   ssd_scan: B must be (b=2, l=512, g=1, n=128), got (2, 512, 64)
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mamba2 {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

// One dimension of an expected shape: its symbol, and its size where that is settled already.
struct Dim {
  static constexpr int64_t kAny = -1;
  const char* symbol = "";
  int64_t size = kAny;
};
// An expected shape, of up to four dimensions.
class Dims {
 public:
  Dims(std::initializer_list<Dim> dims) : size_(dims.size()) {
    std::copy(dims.begin(), dims.end(), dims_.begin());
  }
  const Dim* begin() const { return dims_.data(); }
  const Dim* end() const { return dims_.data() + size_; }
  std::size_t size() const { return size_; }

 private:
  std::array<Dim, 4> dims_{};
  std::size_t size_;
};

// "(2, 512, 64)", "torch.bfloat16", "cuda:0"
std::string describe_sizes(const torch::stable::Tensor& t);
std::string describe_dtype(torch::headeronly::ScalarType t);
std::string describe_device(const torch::stable::Tensor& t);

// Checks the arguments of one call; all of them must lie where `x` lies.
class ArgumentCheck {
 public:
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

  ArgumentCheck(const char* op, const Tensor& x);

  const char* op() const { return op_; }
  void shape(const char* name, const Tensor& t, const Dims& expected) const;
  // Either of two shapes, such as D: (h) or (h, p).
  void shape(const char* name, const Tensor& t, const Dims& expected, const Dims& or_else) const;
  void dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> expected) const;
  // fp64, fp32, bf16 or fp16.
  void floating(const char* name, const Tensor& t) const;
  void device(const char* name, const Tensor& t) const;
  // "op: `name` must be `expected`, got `got`".
  template <class Got>
  void that(bool holds, const char* name, const std::string& expected, const Got& got) const {
    if (!holds) fail(op_, ": ", name, " must be ", expected, ", got ", got);
  }

 private:
  const char* op_;
  int32_t device_type_, device_index_;
  const Tensor& x_;
};

}  // namespace mamba2
