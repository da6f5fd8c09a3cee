#include <string>

#include "norm_linear_call.h"

namespace mamba2::norm_linear {
namespace {

void check_product(const ArgumentCheck& check, const RowsArguments& a) {
  check.dtype("x", a.x, {ScalarType::BFloat16});
  check.shape("x", a.x, {{"b"}, {"d"}});
  const int64_t d = a.x.size(1);
  const bool d_fits = d >= 8 && d % 8 == 0 && d < 1 << 30;
  if (!d_fits) check.that(false, "x", "(b, d a multiple of 8)", describe_sizes(a.x));
  check.shape("weight", a.weight, {{"o"}, {"d", d}});
  check.dtype("weight", a.weight, {ScalarType::BFloat16});
  check.device("weight", a.weight);
  const int64_t o = a.weight.size(0);
  const bool o_fits = o >= 8 && o % 8 == 0 && o < 1 << 30;
  if (!o_fits) check.that(false, "weight", "(o a multiple of 8, d)", describe_sizes(a.weight));
}

void check_conv(const ArgumentCheck& check, const RowsArguments& a) {
  check.that(a.conv_weight.has_value(), "conv_weight", "given with conv_state", "nothing");
  const Tensor &state = *a.conv_state, &weight = *a.conv_weight;
  check.shape("conv_weight", weight, {{"channels"}, {"w"}});
  check.dtype("conv_weight", weight, {ScalarType::BFloat16});
  check.device("conv_weight", weight);
  const int64_t d = weight.size(0), w = weight.size(1), o = a.weight.size(0);
  const bool w_fits = w >= 2 && w <= 4;
  if (!w_fits) check.that(false, "conv_weight's w", "in 2..4", w);
  const bool fits =
      d >= 2 && d % 2 == 0 && a.conv_first >= 0 && a.conv_first % 2 == 0 && a.conv_first <= o - d;
  if (!fits) {
    check.that(false, "conv_first and channels", "even, and within o=" + std::to_string(o),
               std::to_string(a.conv_first) + " and " + std::to_string(d));
  }
  if (a.conv_bias) {
    check.shape("conv_bias", *a.conv_bias, {{"channels", d}});
    check.dtype("conv_bias", *a.conv_bias, {ScalarType::BFloat16});
    check.device("conv_bias", *a.conv_bias);
  }
  check.shape("conv_state", state, {{"b", a.x.size(0)}, {"w - 1", w - 1}, {"channels", d}});
  check.dtype("conv_state", state, {ScalarType::BFloat16});
  check.device("conv_state", state);
  const auto strides = state.strides();
  const bool in_place = strides[2] == 1 && (w == 2 || strides[1] == d) && strides[0] % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(state.const_data_ptr()) % 4 == 0;
  if (!in_place) check.that(false, "conv_state", "contiguous within a row", "other strides");
}

void set_conv(RowsCall& call, const RowsArguments& a) {
  ConvStep& conv = call.conv;
  conv.first = static_cast<int>(a.conv_first);
  conv.d = static_cast<int>(a.conv_weight->size(0));
  conv.w = static_cast<int>(a.conv_weight->size(1));
  conv.state = a.conv_state->mutable_data_ptr();
  conv.state_stride = a.conv_state->strides()[0];
  conv.weight = keep(call.kept, compact(*a.conv_weight)).const_data_ptr();
  if (a.conv_bias) conv.bias = keep(call.kept, compact(*a.conv_bias)).const_data_ptr();
  conv.silu = a.silu;
}

}  // namespace

RowsCall prepare_rows(const RowsArguments& a) {
  const ArgumentCheck check("linear_rows", a.x);
  check_product(check, a);
  if (a.conv_state) check_conv(check, a);
  RowsCall call;
  Params& params = call.params;
  call.kept.reserve(4);
  params.b = a.x.size(0);
  params.d = static_cast<int>(a.x.size(1));
  params.o = static_cast<int>(a.weight.size(0));
  params.x_dtype = params.dtype = params.out_dtype = DType::bf16;
  const Tensor& x = keep(call.kept, readable(a.x));
  params.x = {x.const_data_ptr(), x.strides()[0]};
  params.weight = keep(call.kept, compact(a.weight)).const_data_ptr();
  call.y = allocate(Sizes{params.b, params.o}, params.dtype, a.x);
  params.out = {call.y.mutable_data_ptr(), params.o};
  if (a.conv_state) set_conv(call, a);
  // A copy of weights is written by the kernel in front.
  const auto is_copy = [](const void* used, const OptionalTensor& given) {
    return used != nullptr && used != given->const_data_ptr();
  };
  const bool copied = is_copy(params.weight, a.weight) ||
                      is_copy(call.conv.weight, a.conv_weight) ||
                      is_copy(call.conv.bias, a.conv_bias);
  params.early_weights = a.early_weights && !copied;
  return call;
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("linear_rows_at_once", TORCH_BOX(&runs_at_once));
}

}  // namespace mamba2::norm_linear
