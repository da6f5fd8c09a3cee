// mamba2_cuda._C: answers questions about the build. The operators work without it.
#include <pybind11/pybind11.h>

#include <string>

#include "ssd/plan.h"

namespace py = pybind11;
using namespace mamba2;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MAMBA2_VERSION;
  info["with_cuda"] = static_cast<bool>(MAMBA2_WITH_CUDA);
  info["archs"] = MAMBA2_ARCHS;
  return info;
}

DType dtype_named(const std::string& name) {
  for (DType t : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    if (name == name_of(t)) return t;
  }
  throw py::value_error("explain: dtype must be float64, float32, bfloat16 or float16, got " +
                        name);
}

const char* name_of(ssd::Tier tier, const ssd::Device& device) {
  if (device.major == 0) return "cpu";
  return tier == ssd::Tier::sm90 ? "sm90" : tier == ssd::Tier::sm80 ? "sm80" : "any";
}

// The plan of a problem as the operators would choose it; major 0 asks for the CPU.
py::dict plan(int64_t b, int64_t l, int h, int p, int g, int n, int64_t nseq, bool packed,
              const std::string& dtype, bool backward, bool has_z, bool save_states, int major,
              int minor, int sm_count, int forced) {
  ssd::Problem problem;
  problem.shape = {b, l, h, p, g, n, nseq, packed};
  problem.dtype = dtype_named(dtype);
  problem.backward = backward;
  problem.has_z = has_z;
  problem.save_states = save_states;
  const ssd::Device device{major, minor, sm_count};
  const ssd::Plan chosen = ssd::make_plan(problem, device, forced);
  py::dict answer;
  answer["tier"] = name_of(chosen.tier, device);
  answer["reason"] = major == 0 ? "C++ loops on the CPU" : chosen.reason;
  answer["q"] = chosen.q;
  answer["chunks"] = problem.shape.chunks(chosen.q);
  answer["segment_chunks"] = chosen.segment_chunks;
  answer["variant"] = chosen.variant;
  return answer;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.doc() = "What this build of mamba2_cuda holds, and which kernels a problem gets.";
  m.def("build_info", &build_info);
  m.def("plan", &plan, "b"_a, "l"_a, "h"_a, "p"_a, "g"_a, "n"_a, "nseq"_a, "packed"_a, "dtype"_a,
        "backward"_a, "has_z"_a, "save_states"_a, "major"_a, "minor"_a, "sm_count"_a, "forced"_a);
}
