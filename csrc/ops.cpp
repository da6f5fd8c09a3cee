// Table of contents: every operator of the library, with its shapes.
//
// Sizes: b batch, l length, h heads, p head dim, g groups, n state dim; nseq sequences (b, or the
// packed ones of cu_seqlens). Any tensor may be strided; what a kernel cannot read in place is
// copied first. Absent outputs (no z: no dz) are 0-element tensors. `plan` is csrc/ssd/plan.h's
// integer, 0: choose. Implementations register themselves where they stand:
// csrc/<operation>/*_cpu.cpp and *_cuda.cpp.
#include "core/host.h"

// What ssd_scan's two directions read.
//   x            (b, l, h, p)     fp64, fp32, bf16, fp16
//   dt           (b, l, h)        any floating dtype
//   A            (h)              any floating dtype
//   B, C         (b, l, g, n)     x's dtype
//   D            (h) or (h, p)    any floating dtype
//   z            (b, l, h, p)     x's dtype
//   dt_bias      (h)              any floating dtype
//   initial_states (nseq, h, p, n)  fp32 (fp64 when x is) or x's dtype
//   cu_seqlens   (nseq + 1)       int32, int64; b must be 1
//   seq_idx      (b, l)           int32; not with cu_seqlens
#define SSD_SCAN_INPUTS                                                                        \
  "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, " \
  "Tensor? initial_states, Tensor? cu_seqlens, Tensor? seq_idx, "
#define SSD_DELTA_OPTIONS "bool dt_softplus, float dt_min, float dt_max, "

// Gradients. dx, dB, dC, dz, d_dt have their input's shape and dtype; dA, dD, d_dt_bias and
// d_initial_states have their input's shape in fp32 (fp64 when x is).
#define SSD_SCAN_GRADIENTS                                                           \
  "(Tensor dx, Tensor d_dt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, " \
  "Tensor d_dt_bias, Tensor d_initial_states)"
#define SSD_SCAN_BACKWARD_INPUTS \
  "Tensor dy, Tensor? d_final_states, " SSD_SCAN_INPUTS "Tensor? chunk_states, " SSD_DELTA_OPTIONS

STABLE_TORCH_LIBRARY(MAMBA2_OP_NAMESPACE, m) {
  // y (b, l, h, p) of x's dtype; final_states (nseq, h, p, n) fp32 (fp64 when x is);
  // chunk_states: what the plan keeps for the backward, opaque.
  m.def("ssd_scan_forward(" SSD_SCAN_INPUTS SSD_DELTA_OPTIONS
        "bool return_final_states, bool save_states, int plan)"
        " -> (Tensor y, Tensor final_states, Tensor chunk_states)");

  // The number of elements of chunk_states, for whoever needs it before the call: torch.compile.
  // dtype is core/dtype.h's integer; compute capability major.minor and sm_count are the card's.
  m.def(
      "ssd_scan_chunk_states_numel(int b, int l, int h, int p, int g, int n, int nseq, "
      "bool packed, bool has_z, int dtype, int major, int minor, int sm_count, int plan) -> int");

  // dy (b, l, h, p) of x's dtype; d_final_states (nseq, h, p, n) fp32 (fp64 when x is).
  m.def("ssd_scan_backward(" SSD_SCAN_BACKWARD_INPUTS "int plan) -> " SSD_SCAN_GRADIENTS);

  // The same, writing into the destinations given, of any strides with the last one 1 (d_dt: any
  // strides); what was written into a destination comes back as a 0-element tensor.
  m.def("ssd_scan_backward_out(" SSD_SCAN_BACKWARD_INPUTS
        "int plan, Tensor(a!)? dx, Tensor(b!)? d_dt, Tensor(c!)? dB, Tensor(d!)? dC, "
        "Tensor(e!)? dz) -> " SSD_SCAN_GRADIENTS);

  // state (b, h, p, n) that the segment adds, log_decay (b, h) = sum_t delta_t A (natural log):
  // fp32 (fp64 when x is).
  m.def(
      "ssd_segment_state_forward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor? "
      "dt_bias, " SSD_DELTA_OPTIONS "int plan) -> (Tensor state, Tensor log_decay)");
  m.def(
      "ssd_segment_state_backward(Tensor d_state, Tensor d_log_decay, Tensor x, Tensor dt, "
      "Tensor A, Tensor B, Tensor? dt_bias, " SSD_DELTA_OPTIONS
      "int plan)"
      " -> (Tensor dx, Tensor d_dt, Tensor dA, Tensor dB, Tensor d_dt_bias)");

  // Decode: x, z (b, T, h, p) or (b, h, p); dt (b, T, h) or (b, h); B, C (b, T, g, n) or (b, g, n);
  // state (b or slots, h, p, n) of fp64, fp32, bf16, fp16, updated in place;
  // state_indices, out_state_indices (b) int32, negative: padding. y as x. early_state: the work
  // queued just before writes neither state nor indices, so that they may be read early.
  m.def(
      "ssd_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? dt_bias, " SSD_DELTA_OPTIONS
      "Tensor? state_indices, Tensor? out_state_indices, int plan, bool early_state=False)"
      " -> Tensor y");

  // The depthwise convolution before the scan. x, y (b, l, d) of one dtype; weight (d, w), w 2 to
  // 4; bias (d); states (nseq, w - 1, d) of x's dtype: the last inputs, the oldest first; silu:
  // whether it follows. dweight, dbias fp32 (fp64 when x is); dx may be given as a strided
  // destination, and comes back as a 0-element tensor then.
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, "
      "Tensor? cu_seqlens, bool silu, bool return_final_states)"
      " -> (Tensor y, Tensor final_states)");
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor? d_final_states, Tensor x, Tensor weight, "
      "Tensor? bias, Tensor? initial_states, Tensor? cu_seqlens, bool silu, Tensor(a!)? dx)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor d_initial_states)");
  // Decode: x (b, d) or (b, T, d); state (b or slots, w - 1, d), updated in place; state_indices
  // (b) int32, negative: padding. y as x.
  m.def(
      "causal_conv1d_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu, "
      "Tensor? state_indices) -> Tensor y");

  // The normalisation after the scan. x, z, y (b, l, d) of one dtype; weight (d); group_size
  // divides d. dweight fp32 (fp64 when x is); dx, dz may be given as strided destinations, and come
  // back as 0-element tensors then.
  m.def(
      "gated_rmsnorm_forward(Tensor x, Tensor weight, Tensor? z, float eps, int group_size, "
      "bool norm_before_gate) -> Tensor y");
  m.def(
      "gated_rmsnorm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, "
      "int group_size, bool norm_before_gate, Tensor(a!)? dx, Tensor(b!)? dz)"
      " -> (Tensor dx, Tensor dweight, Tensor dz)");

  // Convolution, scan and norm of a mixer at once. zxBCdt (b, l, 2 h p + 2 g n + h) is [z | x | B |
  // C | dt]; conv_weight (h p + 2 g n, 1, w), conv_bias (h p + 2 g n); A_log, dt_bias (h), D (h) or
  // (h, p); norm_weight (h p), without which z gates inside the scan. conv_state (b, w - 1, h p + 2
  // g n) and ssm_state (b, h, p, n) are begun from, and left with the last states in them. Returns
  // out (b, l, h p), the convolution's output, y (b, l, h p; absent without a norm) and A (h).
  m.def(
      "conv_scan_norm_forward(Tensor zxBCdt, Tensor conv_weight, Tensor? conv_bias, Tensor A_log, "
      "Tensor D, Tensor dt_bias, Tensor? norm_weight, Tensor? cu_seqlens, Tensor(a!)? conv_state, "
      "Tensor(b!)? ssm_state, int h, int p, int g, int n, float dt_min, float dt_max, float eps, "
      "int group_size, bool norm_before_gate, int plan)"
      " -> (Tensor out, Tensor xBC, Tensor y, Tensor A)");
  // The gradients of its floating inputs, from what it returned; those of weights, A_log, D and
  // dt_bias fp32 (fp64 when zxBCdt is). Absent: of what was not given.
  m.def(
      "conv_scan_norm_backward(Tensor d_out, Tensor zxBCdt, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor D, Tensor dt_bias, Tensor? norm_weight, Tensor? cu_seqlens, Tensor xBC, Tensor y, "
      "Tensor A, int h, int p, int g, int n, float dt_min, float dt_max, float eps, "
      "int group_size, bool norm_before_gate, int plan)"
      " -> (Tensor d_zxBCdt, Tensor d_conv_weight, Tensor d_conv_bias, Tensor d_A_log, Tensor dD, "
      "Tensor d_dt_bias, Tensor d_norm_weight)");

  // The same between the two projections of a mixer, none of them with a bias: u (b, l, d_model),
  // in_weight (2 h p + 2 g n + h, d_model), out_weight (d_model, h p), all of one dtype. Returns
  // (b, l, d_model). Nothing is kept for a backward.
  m.def(
      "mixer_forward(Tensor u, Tensor in_weight, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor A_log, Tensor D, Tensor dt_bias, Tensor? norm_weight, Tensor out_weight, "
      "Tensor? cu_seqlens, Tensor(a!)? conv_state, Tensor(b!)? ssm_state, int h, int p, int g, "
      "int n, float dt_min, float dt_max, float eps, int group_size, bool norm_before_gate, "
      "int plan) -> Tensor");

  // Decode: a norm and the projection behind it, for few rows. x, z (b, d) of one dtype;
  // norm_weight (d); weight (o, d), whose dtype norm's result is rounded to and y has; bias (o).
  // With a residual (b, o) y is added to it in place, and comes back as a 0-element tensor.
  // early_weights: the work queued just before writes no weights, so that they may be read early.
  m.def(
      "norm_linear(Tensor x, Tensor norm_weight, Tensor? z, Tensor weight, Tensor? bias, "
      "Tensor(a!)? residual, float eps, int group_size, bool norm_before_gate, "
      "bool early_weights) -> Tensor y");
  // That with a residual, and the residual's norm for the next layer (add_norm_ without x): returns
  // y (b, o). next_weight (o); dtype, of y, is core/dtype.h's integer.
  m.def(
      "norm_linear_add_norm_(Tensor(a!) residual, Tensor x, Tensor norm_weight, Tensor? z, "
      "Tensor weight, Tensor? bias, Tensor next_weight, float eps, int group_size, "
      "bool norm_before_gate, float next_eps, int dtype, bool early_weights) -> Tensor y");
  // Decode: the projection in front of a convolution, and the convolution's step, for more rows. x
  // (b, d), weight (o, d) and y (b, o) of bf16, d and o multiples of 8. With a conv_state (b, w -
  // 1, channels) of bf16, updated in place, outputs conv_first .. conv_first + channels, even
  // numbers, are convolved with conv_weight (channels, w), conv_bias (channels) of bf16.
  // early_weights: as above, and for conv_state too.
  m.def(
      "linear_rows(Tensor x, Tensor weight, Tensor(a!)? conv_state, Tensor? conv_weight, "
      "Tensor? conv_bias, int conv_first, bool silu, bool early_weights) -> Tensor y");
  // Whether its blocks are so few that an H100 or H200 runs all of them at once.
  m.def("linear_rows_at_once(int b, int o) -> bool");

  // The residual takes what a layer adds to it, x of its shape (..., d), and is normed for the next
  // layer: residual_out = residual + x, of residual's dtype and absent without x; y is the norm of
  // residual_out times weight (d). Dtypes of their own; that of y is core/dtype.h's integer, as is
  // x_dtype, -1 without x. dx is d_residual, rounded: absent where nothing was added or they are
  // the same. dweight fp32 (fp64 when residual or weight is). add_norm_ works on residual (b, d) in
  // place, of any row stride.
  m.def(
      "add_norm_forward(Tensor residual, Tensor? x, Tensor weight, float eps, int dtype)"
      " -> (Tensor residual_out, Tensor y)");
  m.def(
      "add_norm_backward(Tensor dy, Tensor? d_residual_out, Tensor residual_out, Tensor weight, "
      "float eps, int x_dtype) -> (Tensor d_residual, Tensor dx, Tensor dweight)");
  m.def(
      "add_norm_(Tensor(a!) residual, Tensor? x, Tensor weight, float eps, int dtype) -> Tensor y");

  // The loss of each row of logits (rows, vocab) with its target (rows), int64: fp32 (fp64 when
  // logits are), 0 where the target is -100. With a scale (), of the losses' dtype, their gradient
  // times scale takes the logits' place. The backward: gradient *= d_loss ().
  m.def("cross_entropy_forward(Tensor(a!) logits, Tensor targets, Tensor? scale) -> Tensor losses");
  m.def("cross_entropy_backward(Tensor(a!) gradient, Tensor d_loss) -> ()");
}
