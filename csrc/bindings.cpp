// mamba2_cuda._C: answers questions about the build. The operators work without it.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of mamba2_cuda holds, and which kernels a problem gets.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = MAMBA2_VERSION;
    info["with_cuda"] = static_cast<bool>(MAMBA2_WITH_CUDA);
    info["archs"] = MAMBA2_ARCHS;
    return info;
  });
}
