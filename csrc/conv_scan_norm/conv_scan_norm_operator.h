// The operator as csrc/ops.cpp declares it, for every device. A Device has, each as the operator
// of its name:
//   void write_decay_rates(A_log, A)     A (h) of fp32 or fp64
//   causal_conv1d::ForwardResult conv(arguments, return_final_states)
//   ssd::ForwardResult scan(arguments, return_final_states, plan)
//   Tensor norm(arguments)
#pragma once
#include "../causal_conv1d/causal_conv1d_call.h"
#include "../gated_rmsnorm/gated_rmsnorm_call.h"
#include "../ssd/ssd_call.h"

namespace mamba2::conv_scan_norm {

// out, the convolution's output, y (absent without a norm, where it is out) and A.
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Channels of the projection [z | x | B | C | dt], of which the convolution has the middle three.
struct Layout {
  int64_t h, p, g, n;

  int64_t d_inner() const { return h * p; }
  int64_t state() const { return g * n; }
  int64_t conv_channels() const { return d_inner() + 2 * state(); }
  int64_t width() const { return d_inner() + conv_channels() + h; }
};

// t's elements from `first` on, seen with other sizes and strides: no copy, no dispatch.
inline Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t first) {
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                    sizes.data(), strides.data(), first, &handle);
  check(error == TORCH_SUCCESS, "conv_scan_norm: no view of a tensor could be made");
  return Tensor(handle);
}
// Channels first .. first + count - 1 of t (b, l, channels).
inline Tensor channels(const Tensor& t, int64_t first, int64_t count) {
  const auto sizes = t.sizes(), strides = t.strides();
  return view(t, {sizes[0], sizes[1], count}, {strides[0], strides[1], strides[2]},
              first * strides[2]);
}
// The same as (b, l, outer, inner).
inline Tensor channels(const Tensor& t, int64_t first, int64_t outer, int64_t inner) {
  const auto sizes = t.sizes(), strides = t.strides();
  return view(t, {sizes[0], sizes[1], outer, inner},
              {strides[0], strides[1], inner * strides[2], strides[2]}, first * strides[2]);
}

inline void check_arguments(const Tensor& zxBCdt, const Tensor& conv_weight, const Tensor& A_log,
                            const Layout& layout) {
  const ArgumentCheck check("conv_scan_norm", zxBCdt);
  check.floating("zxBCdt", zxBCdt);
  check.shape("zxBCdt", zxBCdt, {{"b"}, {"l"}, {"2 h p + 2 g n + h", layout.width()}});
  check.shape("conv_weight", conv_weight, {{"d", layout.conv_channels()}, {"1", 1}, {"w"}});
  check.shape("A_log", A_log, {{"h", layout.h}});
  check.floating("A_log", A_log);
  check.device("A_log", A_log);
}

// A = -exp(A_log), in fp32 at least.
template <class Device>
Tensor decay_rates(const Tensor& A_log) {
  const Tensor A = allocate(Sizes{A_log.size(0)}, state_dtype(dtype_of(A_log)), A_log);
  Device::write_decay_rates(compact(A_log), A);
  return A;
}

template <class Device>
Result forward(Tensor zxBCdt, Tensor conv_weight, OptionalTensor conv_bias, Tensor A_log, Tensor D,
               Tensor dt_bias, OptionalTensor norm_weight, OptionalTensor cu_seqlens,
               OptionalTensor conv_state, OptionalTensor ssm_state, int64_t h, int64_t p, int64_t g,
               int64_t n, double dt_min, double dt_max, double eps, int64_t group_size,
               bool norm_before_gate, int64_t plan) {
  const Layout layout{h, p, g, n};
  check_arguments(zxBCdt, conv_weight, A_log, layout);
  const int64_t d = layout.d_inner(), w = conv_weight.size(2);
  const auto weight_strides = conv_weight.strides();
  const Tensor weight =
      view(conv_weight, {layout.conv_channels(), w}, {weight_strides[0], weight_strides[2]}, 0);
  const auto [xBC, conv_after] = Device::conv({channels(zxBCdt, d, layout.conv_channels()), weight,
                                               conv_bias, conv_state, cu_seqlens, /*silu=*/true},
                                              conv_state.has_value());

  ssd::ScanArguments scan;
  scan.x = channels(xBC, 0, h, p);
  scan.dt = channels(zxBCdt, d + layout.conv_channels(), h);
  scan.A = decay_rates<Device>(A_log);
  scan.B = channels(xBC, d, g, n);
  scan.C = channels(xBC, d + layout.state(), g, n);
  scan.D = D;
  if (!norm_weight) scan.z = channels(zxBCdt, 0, h, p);
  scan.dt_bias = dt_bias;
  scan.initial_states = ssm_state;
  scan.cu_seqlens = cu_seqlens;
  scan.dt_softplus = true;
  scan.dt_min = dt_min;
  scan.dt_max = dt_max;
  const auto [by_head, ssm_after, kept] =
      Device::scan(scan, ssm_state.has_value(), static_cast<int>(plan));
  if (conv_state) torch::stable::copy_(*conv_state, conv_after);
  if (ssm_state) torch::stable::copy_(*ssm_state, ssm_after);

  const auto sizes = by_head.sizes();
  const Tensor y = view(by_head, {sizes[0], sizes[1], d}, {sizes[1] * d, d, 1}, 0);
  if (!norm_weight) return {y, xBC, absent(dtype_of(y), y), scan.A};
  const Tensor z = channels(zxBCdt, 0, d);
  return {Device::norm({y, *norm_weight, z, eps, group_size, norm_before_gate}), xBC, y, scan.A};
}

}  // namespace mamba2::conv_scan_norm
