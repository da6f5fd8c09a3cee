// One call of norm_linear, ready to run on any device: the checked arguments, and the output.
#pragma once
#include "../add_norm/add_norm_call.h"
#include "../core/host.h"
#include "linear_rows.h"
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

struct RowsArguments {
  Tensor x, weight;
  OptionalTensor conv_state, conv_weight, conv_bias;
  int64_t conv_first = 0;
  bool silu = false, early_weights = false;
};
struct RowsCall {
  Params params;
  ConvStep conv;
  Tensor y;
  std::vector<Tensor> kept;
};
RowsCall prepare_rows(const RowsArguments& arguments);

// With a residual, and add_norm without x behind it: norm_linear_add_norm.
struct CallWithNorm {
  Call product;
  add_norm::ForwardCall next;
};
CallWithNorm prepare_with_norm(const Arguments& arguments, const Tensor& next_weight,
                               double next_eps, int64_t dtype);

}  // namespace mamba2::norm_linear
