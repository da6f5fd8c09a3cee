// One channel of gated_rmsnorm, for the CPU loops and the CUDA kernels.
#pragma once
#include <type_traits>

#include "../core/macros.h"

namespace mamba2::gated_rmsnorm {

// Where the gate is: known at compile time, since a select a channel costs what the rest does.
enum class GateKind { none, inside, outside };

// f(std::integral_constant<GateKind, kind>{})
template <class F>
auto with_gate(bool has_z, bool norm_before_gate, F f) {
  if (!has_z) return f(std::integral_constant<GateKind, GateKind::none>{});
  if (norm_before_gate) return f(std::integral_constant<GateKind, GateKind::outside>{});
  return f(std::integral_constant<GateKind, GateKind::inside>{});
}

// silu(z) and its derivative; without a gate 1 and 0, and nobody asks.
template <class U>
struct Gate {
  U value = 1, gradient = 0;
};

// v, which is normalised.
template <GateKind kGate, class U>
MAMBA2_HD U gated(U x, U gate) {
  return kGate == GateKind::inside ? x * gate : x;
}
template <GateKind kGate, class U>
MAMBA2_HD U output_of(U v, U weight, U gate, U r) {
  const U y = v * (r * weight);
  return kGate == GateKind::outside ? y * gate : y;
}
// dn, the gradient of n = v r.
template <GateKind kGate, class U>
MAMBA2_HD U normed_gradient(U dy, U weight, U gate) {
  return kGate == GateKind::outside ? dy * gate * weight : dy * weight;
}

template <class U>
struct Gradients {
  U dx, dz, dweight;
};
// dv = r (dn - n mean(dn n)); projection is mean(dn n).
template <GateKind kGate, class U>
MAMBA2_HD Gradients<U> gradients_of(U x, U dy, U weight, const Gate<U>& gate, U r, U projection) {
  const U n = gated<kGate>(x, gate.value) * r;
  const U dv = r * (normed_gradient<kGate>(dy, weight, gate.value) - n * projection);
  if (kGate == GateKind::inside) return {dv * gate.value, dv * (x * gate.gradient), dy * n};
  if (kGate == GateKind::none) return {dv, U(0), dy * n};
  return {dv, dy * n * (weight * gate.gradient), dy * n * gate.value};
}

}  // namespace mamba2::gated_rmsnorm
