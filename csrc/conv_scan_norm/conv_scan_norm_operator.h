// The operators as csrc/ops.cpp declares them, for every device. A Device has, each as the operator
// of its name:
//   void write_decay_rates(A_log, A)     A (h) of fp32 or fp64
//   void scale_by_rates(A, dA)           dA (h) *= A
//   causal_conv1d::ForwardResult conv(arguments, return_final_states)
//   causal_conv1d::BackwardResult conv_backward(dy, d_final_states, arguments, dx)
//   ssd::ForwardResult scan(arguments, return_final_states, plan)
//   ssd::BackwardResult scan_backward(arguments, gradients, plan)
//   Tensor norm(arguments)
//   gated_rmsnorm::BackwardResult norm_backward(dy, arguments, dx, dz)
#pragma once
#include <array>

#include "../causal_conv1d/causal_conv1d_call.h"
#include "../gated_rmsnorm/gated_rmsnorm_call.h"
#include "../ssd/ssd_call.h"

namespace mamba2::conv_scan_norm {

// out, the convolution's output, y (absent without a norm, where it is out) and A.
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// The gradients of the seven tensors from zxBCdt to norm_weight.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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

// What both directions are given, and the slices that the three operators see of it.
struct Arguments {
  Tensor zxBCdt, conv_weight;
  OptionalTensor conv_bias;
  Tensor D, dt_bias;
  OptionalTensor norm_weight, cu_seqlens;
  Layout layout;
  double dt_min, dt_max, eps;
  int64_t group_size;
  bool norm_before_gate;

  void check(const char* op) const {
    const ArgumentCheck check(op, zxBCdt);
    check.floating("zxBCdt", zxBCdt);
    check.shape("zxBCdt", zxBCdt, {{"b"}, {"l"}, {"2 h p + 2 g n + h", layout.width()}});
    check.shape("conv_weight", conv_weight, {{"d", layout.conv_channels()}, {"1", 1}, {"w"}});
  }
  Tensor z() const { return channels(zxBCdt, 0, layout.d_inner()); }

  causal_conv1d::Arguments of_conv(const OptionalTensor& initial_states) const {
    const auto strides = conv_weight.strides();
    const Tensor weight = view(conv_weight, {layout.conv_channels(), conv_weight.size(2)},
                               {strides[0], strides[2]}, 0);
    return {channels(zxBCdt, layout.d_inner(), layout.conv_channels()),
            weight,
            conv_bias,
            initial_states,
            cu_seqlens,
            /*silu=*/true};
  }
  // xBC is the convolution's output.
  ssd::ScanArguments of_scan(const Tensor& xBC, const Tensor& A,
                             const OptionalTensor& initial_states) const {
    const auto [h, p, g, n] = layout;
    const int64_t d = layout.d_inner();
    ssd::ScanArguments scan;
    scan.x = channels(xBC, 0, h, p);
    scan.dt = channels(zxBCdt, d + layout.conv_channels(), h);
    scan.A = A;
    scan.B = channels(xBC, d, g, n);
    scan.C = channels(xBC, d + layout.state(), g, n);
    scan.D = D;
    if (!norm_weight) scan.z = channels(zxBCdt, 0, h, p);
    scan.dt_bias = dt_bias;
    scan.initial_states = initial_states;
    scan.cu_seqlens = cu_seqlens;
    scan.dt_softplus = true;
    scan.dt_min = dt_min;
    scan.dt_max = dt_max;
    return scan;
  }
  gated_rmsnorm::Arguments of_norm(const Tensor& y) const {
    return {y, *norm_weight, z(), eps, group_size, norm_before_gate};
  }
};

// A = -exp(A_log), in fp32 at least.
template <class Device>
Tensor decay_rates(const Tensor& A_log, const Tensor& zxBCdt, int64_t h) {
  const ArgumentCheck check("conv_scan_norm", zxBCdt);
  check.shape("A_log", A_log, {{"h", h}});
  check.floating("A_log", A_log);
  check.device("A_log", A_log);
  const Tensor A = allocate(Sizes{h}, state_dtype(dtype_of(A_log)), A_log);
  Device::write_decay_rates(compact(A_log), A);
  return A;
}

// Where a forward's results go, if not to new tensors: the convolution's output, y and out.
struct Destinations {
  OptionalTensor xBC, by_head, out;
};

template <class Device>
Result run_forward(const Arguments& a, const Tensor& A_log, OptionalTensor conv_state,
                   OptionalTensor ssm_state, int64_t plan, const Destinations& into) {
  a.check("conv_scan_norm");
  auto of_conv = a.of_conv(conv_state);
  of_conv.y = into.xBC;
  const auto [xBC, conv_after] = Device::conv(of_conv, conv_state.has_value());
  const Tensor A = decay_rates<Device>(A_log, a.zxBCdt, a.layout.h);
  auto of_scan = a.of_scan(xBC, A, ssm_state);
  of_scan.y = into.by_head;
  const auto [by_head, ssm_after, kept] =
      Device::scan(of_scan, ssm_state.has_value(), static_cast<int>(plan));
  if (conv_state) torch::stable::copy_(*conv_state, conv_after);
  if (ssm_state) torch::stable::copy_(*ssm_state, ssm_after);

  const int64_t d = a.layout.d_inner();
  const auto sizes = by_head.sizes();
  const Tensor y = view(by_head, {sizes[0], sizes[1], d}, {sizes[1] * d, d, 1}, 0);
  if (!a.norm_weight) return {y, xBC, absent(dtype_of(y), y), A};
  auto of_norm = a.of_norm(y);
  of_norm.y = into.out;
  return {Device::norm(of_norm), xBC, y, A};
}

template <class Device>
Result forward(Tensor zxBCdt, Tensor conv_weight, OptionalTensor conv_bias, Tensor A_log, Tensor D,
               Tensor dt_bias, OptionalTensor norm_weight, OptionalTensor cu_seqlens,
               OptionalTensor conv_state, OptionalTensor ssm_state, int64_t h, int64_t p, int64_t g,
               int64_t n, double dt_min, double dt_max, double eps, int64_t group_size,
               bool norm_before_gate, int64_t plan) {
  const Arguments a{zxBCdt,      conv_weight, conv_bias,       D,      dt_bias,
                    norm_weight, cu_seqlens,  {h, p, g, n},    dt_min, dt_max,
                    eps,         group_size,  norm_before_gate};
  return run_forward<Device>(a, A_log, conv_state, ssm_state, plan, {});
}

// xBC, y and A are what the forward returned. The gradients of z, [x | B | C] and dt land in their
// slices of d_zxBCdt.
template <class Device>
BackwardResult backward(Tensor d_out, Tensor zxBCdt, Tensor conv_weight, OptionalTensor conv_bias,
                        Tensor D, Tensor dt_bias, OptionalTensor norm_weight,
                        OptionalTensor cu_seqlens, Tensor xBC, Tensor y, Tensor A, int64_t h,
                        int64_t p, int64_t g, int64_t n, double dt_min, double dt_max, double eps,
                        int64_t group_size, bool norm_before_gate, int64_t plan) {
  const Arguments a{zxBCdt,      conv_weight, conv_bias,       D,      dt_bias,
                    norm_weight, cu_seqlens,  {h, p, g, n},    dt_min, dt_max,
                    eps,         group_size,  norm_before_gate};
  a.check("conv_scan_norm_backward");
  const Layout& layout = a.layout;
  const int64_t d = layout.d_inner();
  const Tensor d_zxBCdt = allocate(sizes_of(zxBCdt), zxBCdt.scalar_type(), zxBCdt);
  const Tensor d_xBC = allocate(sizes_of(xBC), xBC.scalar_type(), xBC);

  ssd::GradientArguments gradients;
  Tensor dy = d_out, d_norm_weight;
  if (norm_weight) {
    auto of_norm = Device::norm_backward(d_out, a.of_norm(y), {}, channels(d_zxBCdt, 0, d));
    dy = std::get<0>(of_norm);
    d_norm_weight = std::get<1>(of_norm);
  } else {
    gradients.dz = channels(d_zxBCdt, 0, h, p);
  }
  gradients.dy = channels(dy, 0, h, p);
  gradients.dx = channels(d_xBC, 0, h, p);
  gradients.d_dt = channels(d_zxBCdt, d + layout.conv_channels(), h);
  gradients.dB = channels(d_xBC, d, g, n);
  gradients.dC = channels(d_xBC, d + layout.state(), g, n);
  const auto of_scan =
      Device::scan_backward(a.of_scan(xBC, A, {}), gradients, static_cast<int>(plan));
  const Tensor d_A_log = std::get<2>(of_scan);  // dA so far: A is its own derivative
  Device::scale_by_rates(A, d_A_log);

  const auto [dx, d_weight, d_conv_bias, d_initial_states] = Device::conv_backward(
      d_xBC, {}, a.of_conv({}), channels(d_zxBCdt, d, layout.conv_channels()));
  const int64_t w = conv_weight.size(2);
  const Tensor d_conv_weight = view(d_weight, {layout.conv_channels(), 1, w}, {w, w, 1}, 0);
  const DType dtype = dtype_of(zxBCdt);
  return {d_zxBCdt,
          d_conv_weight,
          or_absent(d_conv_bias, dtype, zxBCdt),
          d_A_log,
          std::get<5>(of_scan),
          std::get<7>(of_scan),
          or_absent(d_norm_weight, dtype, zxBCdt)};
}

// ---- with the two projections ----

// y (b, l, o) = x (b, l, i) weight (o, i)^T, a product of PyTorch's; y contiguous.
inline void project(const Tensor& x, const Tensor& weight, const Tensor& y) {
  const auto sizes = x.sizes();
  const int64_t b = sizes[0], l = sizes[1], inner = sizes[2], outer = weight.size(0);
  const auto strides = weight.strides();
  std::array<StableIValue, 3> stack = {
      torch::stable::detail::from(view(compact(x), {b * l, inner}, {inner, 1}, 0)),
      torch::stable::detail::from(view(weight, {inner, outer}, {strides[1], strides[0]}, 0)),
      torch::stable::detail::from(view(y, {b * l, outer}, {outer, 1}, 0))};
  const auto error = torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION);
  check(error == TORCH_SUCCESS, "mixer: a projection's product failed");
  torch::stable::detail::to<Tensor>(stack[0]);  // the same result, and ours to let go
}

// What lies between u and the layer's output, in one allocation: zxBCdt, the convolution's output,
// y, and what the norm makes of it in the place of the convolution's output, which nothing reads
// any more.
struct Between {
  Tensor zxBCdt;
  Destinations rest;

  Between(const Tensor& u, const Layout& layout) {
    constexpr int64_t kAlignment = 64;  // elements: at least 128 bytes
    const int64_t b = u.size(0), l = u.size(1), d = layout.d_inner();
    const int64_t xBC = round_up(b * l * layout.width(), kAlignment);
    const int64_t y = xBC + round_up(b * l * layout.conv_channels(), kAlignment);
    const Tensor memory = allocate(Sizes{y + b * l * d}, u.scalar_type(), u);
    const auto rows = [&](int64_t first, int64_t channels) {
      return view(memory, {b, l, channels}, {l * channels, channels, 1}, first);
    };
    zxBCdt = rows(0, layout.width());
    rest.xBC = rows(xBC, layout.conv_channels());
    rest.by_head = view(memory, {b, l, layout.h, layout.p}, {l * d, d, layout.p, 1}, y);
    rest.out = rows(xBC, d);
  }
};

inline void check_projections(const Tensor& u, const Tensor& in_weight, const Tensor& out_weight,
                              const Layout& layout) {
  const ArgumentCheck check("mixer", u);
  check.floating("u", u);
  check.shape("u", u, {{"b"}, {"l"}, {"d_model"}});
  const Dim d_model{"d_model", u.size(2)};
  check.shape("in_weight", in_weight, {{"2 h p + 2 g n + h", layout.width()}, d_model});
  check.shape("out_weight", out_weight, {d_model, {"h p", layout.d_inner()}});
  for (const auto& [name, weight] :
       {std::pair("in_weight", in_weight), {"out_weight", out_weight}}) {
    check.dtype(name, weight, {u.scalar_type()});
    check.device(name, weight);
  }
}

template <class Device>
Tensor mixer(Tensor u, Tensor in_weight, Tensor conv_weight, OptionalTensor conv_bias, Tensor A_log,
             Tensor D, Tensor dt_bias, OptionalTensor norm_weight, Tensor out_weight,
             OptionalTensor cu_seqlens, OptionalTensor conv_state, OptionalTensor ssm_state,
             int64_t h, int64_t p, int64_t g, int64_t n, double dt_min, double dt_max, double eps,
             int64_t group_size, bool norm_before_gate, int64_t plan) {
  const Layout layout{h, p, g, n};
  check_projections(u, in_weight, out_weight, layout);
  const Between between(u, layout);
  project(u, in_weight, between.zxBCdt);
  const Arguments a{between.zxBCdt,  conv_weight, conv_bias, D,      dt_bias, norm_weight,
                    cu_seqlens,      layout,      dt_min,    dt_max, eps,     group_size,
                    norm_before_gate};
  const Result result = run_forward<Device>(a, A_log, conv_state, ssm_state, plan, between.rest);
  const Tensor out = allocate(sizes_of(u), u.scalar_type(), u);
  project(std::get<0>(result), out_weight, out);
  return out;
}

}  // namespace mamba2::conv_scan_norm
