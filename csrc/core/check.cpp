#include "check.h"

#include <algorithm>

#include "host.h"

namespace mamba2 {
namespace {

bool matches(const Tensor& t, const Dims& expected) {
  const auto sizes = t.sizes();
  if (sizes.size() != expected.size()) return false;
  return std::equal(
      expected.begin(), expected.end(), sizes.begin(),
      [](const Dim& d, int64_t size) { return d.size == Dim::kAny || d.size == size; });
}

std::string describe(const Dims& dims) {
  std::ostringstream out;
  out << "(";
  const char* separator = "";
  for (const Dim& d : dims) {
    out << separator << d.symbol;
    if (d.size != Dim::kAny) out << "=" << d.size;
    separator = ", ";
  }
  out << (dims.size() == 1 ? ",)" : ")");
  return out.str();
}

}  // namespace

std::string describe_sizes(const Tensor& t) {
  std::ostringstream out;
  out << "(";
  const char* separator = "";
  for (const int64_t size : t.sizes()) {
    out << separator << size;
    separator = ", ";
  }
  out << (t.dim() == 1 ? ",)" : ")");
  return out.str();
}

std::string describe_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return torch::headeronly::toString(t);
  }
}

std::string describe_device(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::ostringstream out;
  out << (t.is_cuda() ? "cuda:" : "device ") << t.get_device_index();
  return out.str();
}

ArgumentCheck::ArgumentCheck(const char* op, const Tensor& x) : op_(op), x_(x) {
  aoti_torch_get_device_type(x.get(), &device_type_);
  aoti_torch_get_device_index(x.get(), &device_index_);
}

void ArgumentCheck::shape(const char* name, const Tensor& t, const Dims& expected) const {
  if (!matches(t, expected)) that(false, name, describe(expected), describe_sizes(t));
}

void ArgumentCheck::shape(const char* name, const Tensor& t, const Dims& expected,
                          const Dims& or_else) const {
  if (matches(t, expected) || matches(t, or_else)) return;
  that(false, name, describe(expected) + " or " + describe(or_else), describe_sizes(t));
}

void ArgumentCheck::dtype(const char* name, const Tensor& t,
                          std::initializer_list<ScalarType> expected) const {
  const ScalarType got = t.scalar_type();
  if (std::find(expected.begin(), expected.end(), got) != expected.end()) return;
  std::string names;
  for (const ScalarType e : expected) {
    const std::string one = describe_dtype(e);
    if (names.find(one) != std::string::npos) continue;
    names += (names.empty() ? "" : " or ") + one;
  }
  that(false, name, names, describe_dtype(got));
}

void ArgumentCheck::floating(const char* name, const Tensor& t) const {
  dtype(name, t, {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
}

void ArgumentCheck::device(const char* name, const Tensor& t) const {
  int32_t type = 0, index = 0;
  aoti_torch_get_device_type(t.get(), &type);
  aoti_torch_get_device_index(t.get(), &index);
  if (type == device_type_ && index == device_index_) return;
  that(false, name, "on " + describe_device(x_), describe_device(t));
}

}  // namespace mamba2
