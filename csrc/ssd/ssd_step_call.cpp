#include "ssd_step_call.h"

namespace mamba2::ssd {
namespace {

constexpr const char* kOp = "ssd_step";
constexpr int64_t kMaxHeadDim = 256, kMaxStateDim = 256;

// The tensors of a call with a token dimension are (b, T, ...), of one without it (b, ...).
class TokenDims {
 public:
  TokenDims(const Tensor& x) : many_(x.dim() == 4), b_(x.size(0)), tokens_(many_ ? x.size(1) : 1) {}
  Dims of(Dim first) const {
    if (many_) return {{"b", b_}, {"T", tokens_}, first};
    return {{"b", b_}, first};
  }
  Dims of(Dim first, Dim second) const {
    if (many_) return {{"b", b_}, {"T", tokens_}, first, second};
    return {{"b", b_}, first, second};
  }
  // Of a tensor that passed its check.
  Strided strided(const Tensor& t) const {
    const auto strides = t.strides();
    if (many_) return {t.const_data_ptr(), strides[0], strides[1], strides[2]};
    return {t.const_data_ptr(), strides[0], 0, strides[1]};
  }
  bool many() const { return many_; }
  int64_t b() const { return b_; }
  int64_t tokens() const { return tokens_; }

 private:
  bool many_;
  int64_t b_, tokens_;
};

Shape check_x_and_state(const ArgumentCheck& check, const StepArguments& a) {
  check.floating("x", a.x);
  check.shape("x", a.x, {{"b"}, {"h"}, {"p"}}, {{"b"}, {"T"}, {"h"}, {"p"}});
  const TokenDims dims(a.x);
  const int64_t last = a.x.dim() - 1;
  Shape shape;
  shape.b = shape.nseq = dims.b();
  shape.l = dims.tokens();
  shape.h = static_cast<int>(a.x.size(last - 1));
  shape.p = static_cast<int>(a.x.size(last));
  const bool fits = shape.h >= 1 && shape.p >= 1 && shape.p <= kMaxHeadDim && shape.l < 1 << 30;
  if (!fits) check.that(false, "x", "(b, h >= 1, 1 <= p <= 256)", describe_sizes(a.x));
  check.shape("B", a.B, dims.of({"g"}, {"n"}));
  const int64_t g = a.B.size(last - 1), n = a.B.size(last);
  if (g < 1 || shape.h % g != 0) {
    check.that(false, "B's g", "a divisor of h=" + std::to_string(shape.h), g);
  }
  if (n < 1 || n > kMaxStateDim) check.that(false, "B's n", "in 1..256", n);
  shape.g = static_cast<int>(g);
  shape.n = static_cast<int>(n);
  check.floating("state", a.state);
  const Dim slots = a.state_indices ? Dim{"slots"} : Dim{"b", shape.b};
  check.shape("state", a.state, {slots, {"h", shape.h}, {"p", shape.p}, {"n", n}});
  check.device("state", a.state);
  const auto strides = a.state.strides();
  const int64_t head = int64_t(shape.p) * n;
  const bool in_place = (n == 1 || strides[3] == 1) && (shape.p == 1 || strides[2] == n) &&
                        (shape.h == 1 || strides[1] == head);
  if (!in_place) check.that(false, "state", "contiguous within a slot", "other strides");
  return shape;
}

void check_others(const ArgumentCheck& check, const StepArguments& a, const Shape& shape) {
  const TokenDims dims(a.x);
  const auto tensor = [&](const char* name, const Tensor& t, const Dims& expected) {
    check.shape(name, t, expected);
    check.dtype(name, t, {a.x.scalar_type()});
    check.device(name, t);
  };
  const auto parameter = [&](const char* name, const Tensor& t, const Dims& expected) {
    check.shape(name, t, expected);
    check.floating(name, t);
    check.device(name, t);
  };
  const auto indices = [&](const char* name, const OptionalTensor& t) {
    if (!t) return;
    check.shape(name, *t, {{"b", shape.b}});
    check.dtype(name, *t, {ScalarType::Int});
    check.device(name, *t);
  };
  tensor("B", a.B, dims.of({"g", shape.g}, {"n", shape.n}));
  tensor("C", a.C, dims.of({"g", shape.g}, {"n", shape.n}));
  if (a.z) tensor("z", *a.z, dims.of({"h", shape.h}, {"p", shape.p}));
  parameter("dt", a.dt, dims.of({"h", shape.h}));
  parameter("A", a.A, {{"h", shape.h}});
  if (a.dt_bias) parameter("dt_bias", *a.dt_bias, {{"h", shape.h}});
  if (a.D) {
    check.shape("D", *a.D, {{"h", shape.h}}, {{"h", shape.h}, {"p", shape.p}});
    check.floating("D", *a.D);
    check.device("D", *a.D);
  }
  indices("state_indices", a.state_indices);
  indices("out_state_indices", a.out_state_indices);
  if (!(a.dt_min <= a.dt_max)) {
    std::ostringstream got;
    got << "(" << a.dt_min << ", " << a.dt_max << ")";
    check.that(false, "dt_limit", "(min, max) with min <= max", got.str());
  }
}

const Tensor& keep(std::vector<Tensor>& kept, Tensor t) {
  kept.push_back(std::move(t));
  return kept.back();
}

void fill_inputs(Inputs& in, const StepArguments& a, std::vector<Tensor>& kept) {
  const TokenDims dims(a.x);
  in.dtype = dtype_of(a.x);
  in.x = dims.strided(keep(kept, readable(a.x)));
  in.dt = dims.strided(a.dt);
  if (!dims.many()) in.dt.h = a.dt.strides()[1];
  in.dt_dtype = dtype_of(a.dt);
  in.A = any_float(keep(kept, compact(a.A)));
  in.B = dims.strided(keep(kept, readable(a.B)));
  in.C = dims.strided(keep(kept, readable(a.C)));
  if (a.D) {
    in.D = any_float(keep(kept, compact(*a.D)));
    in.D_per_channel = a.D->dim() == 2;
  }
  if (a.z) in.z = dims.strided(keep(kept, readable(*a.z)));
  if (a.dt_bias) in.dt_bias = any_float(keep(kept, compact(*a.dt_bias)));
  in.dt_softplus = a.dt_softplus;
  in.dt_min = a.dt_min;
  in.dt_max = a.dt_max;
}

const int* indices_of(const OptionalTensor& t, std::vector<Tensor>& kept) {
  return t ? static_cast<const int*>(keep(kept, compact(*t)).const_data_ptr()) : nullptr;
}

}  // namespace

StepCall prepare_step(const StepArguments& a) {
  const ArgumentCheck check(kOp, a.x);
  const Shape shape = check_x_and_state(check, a);
  check_others(check, a, shape);
  StepCall call;
  call.kept.reserve(10);
  StepParams& params = call.params;
  params.in.shape = shape;
  fill_inputs(params.in, a, call.kept);
  params.state = a.state.mutable_data_ptr();
  params.state_dtype = dtype_of(a.state);
  params.slots = a.state.size(0);
  params.slot_stride = a.state.strides()[0];
  params.state_indices = indices_of(a.state_indices, call.kept);
  params.out_state_indices = indices_of(a.out_state_indices, call.kept);
  params.early_state = a.early_state;
  const auto sizes = a.x.sizes();
  call.y = allocate(Sizes(sizes.begin(), sizes.end()), a.x.scalar_type(), a.x);
  params.y = call.y.mutable_data_ptr();
  return call;
}

}  // namespace mamba2::ssd
