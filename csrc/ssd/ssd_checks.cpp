#include "ssd_checks.h"

#include <limits>

namespace mamba2::ssd {
namespace {

constexpr int64_t kMaxHeadDim = 256, kMaxStateDim = 256;

Shape check_x(const ArgumentCheck& check, const Tensor& x) {
  check.floating("x", x);
  check.shape("x", x, {{"b"}, {"l"}, {"h"}, {"p"}});
  const auto sizes = x.sizes();
  const bool fits = sizes[1] <= std::numeric_limits<int32_t>::max() && sizes[2] >= 1 &&
                    sizes[3] >= 1 && sizes[3] <= kMaxHeadDim;
  if (!fits) check.that(false, "x", "(b, l < 2^31, h >= 1, 1 <= p <= 256)", describe_sizes(x));
  Shape shape;
  shape.b = shape.nseq = sizes[0];
  shape.l = sizes[1];
  shape.h = static_cast<int>(sizes[2]);
  shape.p = static_cast<int>(sizes[3]);
  return shape;
}

void check_B_and_C(const ArgumentCheck& check, const ScanArguments& a, Shape& shape) {
  check.shape("B", a.B, {{"b", shape.b}, {"l", shape.l}, {"g"}, {"n"}});
  const int64_t g = a.B.size(2), n = a.B.size(3);
  if (g < 1 || shape.h % g != 0) {
    check.that(false, "B's g", "a divisor of h=" + std::to_string(shape.h), g);
  }
  if (n < 1 || n > kMaxStateDim) check.that(false, "B's n", "in 1..256", n);
  shape.g = static_cast<int>(g);
  shape.n = static_cast<int>(n);
  check.dtype("B", a.B, {a.x.scalar_type()});
  check.device("B", a.B);
  if (!a.C) return;
  check.shape("C", *a.C, {{"b", shape.b}, {"l", shape.l}, {"g", g}, {"n", n}});
  check.dtype("C", *a.C, {a.x.scalar_type()});
  check.device("C", *a.C);
}

// dt, A, D, dt_bias: of any floating dtype.
void check_parameters(const ArgumentCheck& check, const ScanArguments& a, const Shape& shape) {
  check.shape("dt", a.dt, {{"b", shape.b}, {"l", shape.l}, {"h", shape.h}});
  check.floating("dt", a.dt);
  check.device("dt", a.dt);
  check.shape("A", a.A, {{"h", shape.h}});
  check.floating("A", a.A);
  check.device("A", a.A);
  if (a.dt_bias) {
    check.shape("dt_bias", *a.dt_bias, {{"h", shape.h}});
    check.floating("dt_bias", *a.dt_bias);
    check.device("dt_bias", *a.dt_bias);
  }
  if (a.D) {
    check.shape("D", *a.D, {{"h", shape.h}}, {{"h", shape.h}, {"p", shape.p}});
    check.floating("D", *a.D);
    check.device("D", *a.D);
  }
  if (!(a.dt_min <= a.dt_max)) {
    std::ostringstream got;
    got << "(" << a.dt_min << ", " << a.dt_max << ")";
    check.that(false, "dt_limit", "(min, max) with min <= max", got.str());
  }
}

void check_sequences(const ArgumentCheck& check, const ScanArguments& a, Shape& shape) {
  if (a.cu_seqlens) {
    shape.nseq = check_cu_seqlens(check, *a.cu_seqlens, shape.b);
    if (a.seq_idx) check.that(false, "seq_idx", "None with cu_seqlens", "a tensor");
    shape.packed = true;
  }
  if (a.seq_idx) {
    check.shape("seq_idx", *a.seq_idx, {{"b", shape.b}, {"l", shape.l}});
    check.dtype("seq_idx", *a.seq_idx, {ScalarType::Int});
    check.device("seq_idx", *a.seq_idx);
  }
}

Dims dims_of_states(const Shape& shape) {
  return {
      {shape.packed ? "nseq" : "b", shape.nseq}, {"h", shape.h}, {"p", shape.p}, {"n", shape.n}};
}

// A gradient in, or a destination out: shaped and typed like the input it belongs to.
void check_like(const ArgumentCheck& check, const char* name, const OptionalTensor& t,
                const Dims& dims, ScalarType dtype) {
  if (!t) return;
  check.shape(name, *t, dims);
  check.dtype(name, *t, {dtype});
  check.device(name, *t);
}

}  // namespace

Shape check_scan(const char* op, const ScanArguments& a) {
  const ArgumentCheck check(op, a.x);
  Shape shape = check_x(check, a.x);
  check_B_and_C(check, a, shape);
  check_parameters(check, a, shape);
  check_sequences(check, a, shape);
  if (a.z) {
    check.shape("z", *a.z, {{"b", shape.b}, {"l", shape.l}, {"h", shape.h}, {"p", shape.p}});
    check.dtype("z", *a.z, {a.x.scalar_type()});
    check.device("z", *a.z);
  }
  if (a.initial_states) {
    const ScalarType state = scalar_type_of(state_dtype(dtype_of(a.x)));
    check.shape("initial_states", *a.initial_states, dims_of_states(shape));
    check.dtype("initial_states", *a.initial_states, {state, a.x.scalar_type()});
    check.device("initial_states", *a.initial_states);
  }
  return shape;
}

void check_gradients(const char* op, const ScanArguments& a, const Shape& shape,
                     const GradientArguments& gradients) {
  const ArgumentCheck check(op, a.x);
  const ScalarType dtype = a.x.scalar_type(), state = scalar_type_of(state_dtype(dtype_of(a.x)));
  const Dims like_x{{"b", shape.b}, {"l", shape.l}, {"h", shape.h}, {"p", shape.p}};
  const Dims like_B{{"b", shape.b}, {"l", shape.l}, {"g", shape.g}, {"n", shape.n}};
  check_like(check, "dy", gradients.dy, like_x, dtype);
  check_like(check, "d_final_states", gradients.d_final_states, dims_of_states(shape), state);
  check_like(check, "d_log_decay", gradients.d_log_decay, {{"b", shape.b}, {"h", shape.h}}, state);
  check_like(check, "dx", gradients.dx, like_x, dtype);
  check_like(check, "d_dt", gradients.d_dt, {{"b", shape.b}, {"l", shape.l}, {"h", shape.h}},
             a.dt.scalar_type());
  check_like(check, "dB", gradients.dB, like_B, dtype);
  check_like(check, "dC", gradients.dC, like_B, dtype);
  check_like(check, "dz", gradients.dz, like_x, dtype);
  if (gradients.dz && !a.z) check.that(false, "dz", "None without z", "a tensor");
}

}  // namespace mamba2::ssd
