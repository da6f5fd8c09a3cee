// The library from C++, with no Python and no tensors: the CPU's forward against the recurrence,
// its backward against central differences, the plan, and division by a multiplication. Prints what
// failed; the exit status counts it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "core/divisor.h"
#include "ssd/plan.h"
#include "ssd/ssd_scan_cpu.h"

namespace {

using mamba2::DType;
using namespace mamba2::ssd;
using Array = std::vector<double>;

int failures = 0;
void expect(bool good, const char* what, double value = 0) {
  if (good) return;
  std::printf("FAILED: %s (%g)\n", what, value);
  ++failures;
}

// One problem in fp64, every array contiguous.
struct Problem64 {
  int64_t b = 2, l = 70;
  int h = 4, p = 3, g = 2, n = 5;
  Array x, dt, A, B, C, D;

  explicit Problem64(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](Array& v, int64_t size) {
      v.resize(size);
      for (double& e : v) e = normal(random);
    };
    fill(x, b * l * h * p);
    fill(dt, b * l * h);
    fill(A, h);
    fill(B, b * l * g * n);
    fill(C, b * l * g * n);
    fill(D, h);
    for (double& a : A) a = -std::abs(a);
  }

  Inputs inputs() const {
    Inputs in;
    in.shape = {b, l, h, p, g, n, b, false};
    in.dtype = in.dt_dtype = DType::f64;
    in.x = {x.data(), l * h * p, h * p, p};
    in.dt = {dt.data(), l * h, h, 1};
    in.A = {A.data(), DType::f64};
    in.B = {B.data(), l * g * n, g * n, n};
    in.C = {C.data(), l * g * n, g * n, n};
    in.D = {D.data(), DType::f64};
    in.dt_softplus = true;
    in.dt_max = INFINITY;
    return in;
  }

  Array forward() const {
    Array y(x.size());
    ForwardParams params;
    params.in = inputs();
    params.y = {y.data(), l * h * p, h * p, p};
    cpu::forward(params);
    return y;
  }

  // H_t = exp(delta_t A) H_{t-1} + delta_t x_t B_t^T,  y_t = H_t C_t + D x_t.
  Array recurrence() const {
    Array y(x.size());
    for (int64_t i_b = 0; i_b < b; ++i_b) {
      for (int i_h = 0; i_h < h; ++i_h) {
        Array state(p * n, 0.0);
        for (int64_t t = 0; t < l; ++t) {
          const int64_t token = i_b * l + t;
          const double delta = std::log1p(std::exp(dt[token * h + i_h]));
          const double* x_t = &x[(token * h + i_h) * p];
          const double* B_t = &B[(token * g + i_h / (h / g)) * n];
          const double* C_t = &C[(token * g + i_h / (h / g)) * n];
          for (int i = 0; i < p; ++i) {
            double& out = y[(token * h + i_h) * p + i];
            out = D[i_h] * x_t[i];
            for (int j = 0; j < n; ++j) {
              double& s = state[i * n + j];
              s = std::exp(delta * A[i_h]) * s + delta * x_t[i] * B_t[j];
              out += s * C_t[j];
            }
          }
        }
      }
    }
    return y;
  }
};

struct Gradients {
  Array dx, d_dt, dA, dB, dC, dD;

  Gradients(const Problem64& of, const Array& dy)
      : dx(of.x.size()), d_dt(of.dt.size()), dA(of.h), dB(of.B.size()), dC(of.C.size()), dD(of.h) {
    BackwardParams params;
    params.in = of.inputs();
    const Strided &x = params.in.x, &dt = params.in.dt, &B = params.in.B;
    params.dy = {dy.data(), x.b, x.l, x.h};
    params.dx = {dx.data(), x.b, x.l, x.h};
    params.d_dt = {d_dt.data(), dt.b, dt.l, dt.h};
    params.dB = {dB.data(), B.b, B.l, B.h};
    params.dC = {dC.data(), B.b, B.l, B.h};
    params.dA = dA.data();
    params.dD = dD.data();
    cpu::backward(params);
  }
};

double dot(const Array& a, const Array& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void test_forward() {
  const Problem64 problem(1);
  const Array y = problem.forward(), expected = problem.recurrence();
  double worst = 0;
  for (size_t i = 0; i < y.size(); ++i) worst = std::max(worst, std::abs(y[i] - expected[i]));
  expect(worst < 1e-11, "forward against the recurrence, largest difference", worst);
}

// <gradient, v> against (f(a + eps v) - f(a - eps v)) / (2 eps) with f = <y, dy>.
void test_backward() {
  const Problem64 problem(2);
  const Array dy = Problem64(3).x;
  const Gradients gradients(problem, dy);
  const auto check = [&](Array Problem64::* argument, const Array& gradient, const char* name) {
    const double eps = 1e-5;
    std::mt19937 random(4);
    Array direction(gradient.size());
    for (double& v : direction) v = std::normal_distribution<double>()(random);
    const auto at = [&](double step) {
      Problem64 moved = problem;
      for (size_t i = 0; i < direction.size(); ++i) (moved.*argument)[i] += step * direction[i];
      return dot(moved.recurrence(), dy);
    };
    const double expected = (at(eps) - at(-eps)) / (2 * eps), got = dot(gradient, direction);
    expect(std::abs(got - expected) < 1e-6 * (1 + std::abs(expected)), name, got - expected);
  };
  check(&Problem64::x, gradients.dx, "dx");
  check(&Problem64::dt, gradients.d_dt, "d_dt");
  check(&Problem64::A, gradients.dA, "dA");
  check(&Problem64::B, gradients.dB, "dB");
  check(&Problem64::C, gradients.dC, "dC");
  check(&Problem64::D, gradients.dD, "dD");
}

void test_plan() {
  Problem problem;
  problem.shape = {1, 100, 2, 19, 1, 7, 1, false};
  problem.dtype = DType::f64;
  const Device hopper{9, 0, 132};
  expect(make_plan(problem, hopper, 0).tier == Tier::any, "fp64 goes to tier any");
  expect(make_plan(problem, hopper, static_cast<int>(Tier::sm90)).tier == Tier::any,
         "a forced tier that cannot take fp64 gives tier any");
}

// Rows that nearly fill the card: their runs cover them, and each has a block or more.
void test_plan_of_runs() {
  Problem problem;
  problem.dtype = DType::bf16;
  const Device hopper{9, 0, 132};
  for (int64_t b : {1, 2, 4})
    for (int64_t l : {300, 2048, 16384}) {
      problem.shape = {b, l, 24, 64, 1, 128, b, false};
      const Plan plan = make_plan(problem, hopper, static_cast<int>(Tier::sm90) | 3 << 4);
      int runs = 0;
      while (runs < kMaxRuns && plan.run_ends[runs] > (runs ? plan.run_ends[runs - 1] : 0)) ++runs;
      expect(runs > 1 && plan.run_ends[runs - 1] == (l + 63) / 64, "runs end with the row", runs);
      expect(12 * b * (runs - 1) < hopper.sm_count, "a block for every later run", double(b));
    }
}

void test_divisor() {
  std::mt19937 random(1);
  constexpr int kMost = 0x7fffffff;
  const auto agree = [](int n, int d) {
    const mamba2::Divisor by(d);
    expect(n / by == n / d && n % by == n % d, "division by a multiplication", double(n));
  };
  for (int k = 0; k < 20000; ++k) {
    const int d = 1 + int(random() >> (1 + random() % 31)) % kMost;
    for (int n : {0, d - 1, d, kMost / d * d, kMost / d * d - 1, kMost, int(random() >> 1)})
      agree(n, d);
  }
}

}  // namespace

int main() {
  test_forward();
  test_backward();
  test_plan();
  test_plan_of_runs();
  test_divisor();
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures;
}
