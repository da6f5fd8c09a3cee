// One call of norm_linear, ready to run on any device: the checked arguments, and the output.
#pragma once
#include "../core/host.h"
#include "norm_linear.h"

namespace mamba2::norm_linear {

struct Arguments {
  Tensor x, norm_weight;
  OptionalTensor z;
  Tensor weight;
  OptionalTensor bias, residual;
  double eps = 0;
  int64_t group_size = 0;
  bool norm_before_gate = false, early_weights = false;
};

struct Call {
  Params params;
  Tensor y;                  // 0 elements when a residual took it
  std::vector<Tensor> kept;  // copies that params point into
};
Call prepare(const Arguments& arguments);

}  // namespace mamba2::norm_linear
