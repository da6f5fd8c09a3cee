// One call of cross_entropy, ready to run on any device: the checked arguments, and the output.
#pragma once
#include "../core/host.h"
#include "cross_entropy.h"

namespace mamba2::cross_entropy {

struct Call {
  Params params;
  Tensor losses;
  std::vector<Tensor> kept;  // copies that params point into
};

inline Call prepare(const Tensor& logits, const Tensor& targets, const OptionalTensor& scale) {
  const ArgumentCheck check("cross_entropy", logits);
  check.floating("logits", logits);
  check.shape("logits", logits, {{"rows"}, {"vocab"}});
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const bool fits = vocab >= 1 && vocab < 1 << 30 && rows < int64_t(1) << 31;
  if (!fits)
    check.that(false, "logits", "(rows < 2^31, 1 <= vocab < 2^30)", describe_sizes(logits));
  check.shape("targets", targets, {{"rows", rows}});
  check.dtype("targets", targets, {ScalarType::Long});
  check.device("targets", targets);

  Call call;
  Params& params = call.params;
  params.rows = rows;
  params.vocab = static_cast<int>(vocab);
  params.dtype = dtype_of(logits);
  const DType working = state_dtype(params.dtype);
  const bool dense = vocab == 1 || logits.strides()[1] == 1;
  if (scale) {
    check.shape("scale", *scale, {});
    check.dtype("scale", *scale, {scalar_type_of(working)});
    check.device("scale", *scale);
    if (!dense) check.that(false, "logits' last stride", "1", logits.strides()[1]);
    params.scale = scale->const_data_ptr();
  }
  const Tensor& read = keep(call.kept, dense ? logits : compact(logits));
  params.logits = read.mutable_data_ptr();
  params.stride = read.strides()[0];
  params.targets = static_cast<const int64_t*>(keep(call.kept, compact(targets)).const_data_ptr());
  call.losses = allocate(Sizes{rows}, working, logits);
  params.losses = call.losses.mutable_data_ptr();
  return call;
}

inline ScaleParams prepare_scale(const Tensor& gradient, const Tensor& factor) {
  const ArgumentCheck check("cross_entropy_backward", gradient);
  check.floating("gradient", gradient);
  const DType dtype = dtype_of(gradient);
  check.shape("d_loss", factor, {});
  check.dtype("d_loss", factor, {scalar_type_of(state_dtype(dtype))});
  check.device("d_loss", factor);
  if (!gradient.is_contiguous()) {
    check.that(false, "gradient", "contiguous", describe_sizes(gradient));
  }
  return {gradient.numel(), dtype, gradient.mutable_data_ptr(), factor.const_data_ptr()};
}

}  // namespace mamba2::cross_entropy
