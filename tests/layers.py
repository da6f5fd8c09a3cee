"""How a layer around the scan is compared with its reference: outputs and gradients, against fp64.

    check(run_public(mamba2_cuda.causal_conv1d), reference.causal_conv1d, inputs, options)

A `run` takes (inputs, options, d_outputs) and returns the outputs, "y" and "final_states", and the
gradients, "d_x" and so on, by name.
"""

import math

import torch
from common import same_bits, to_dtype

from mamba2_cuda.reference.discretise import working_dtype

# How finely a result of each type is rounded, for allowances.
PRECISION = {
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


def run_public(function):
    """A run of a differentiable function."""

    def run(inputs, options, d_outputs):
        floating = {k: v for k, v in inputs.items() if v.is_floating_point()}
        leaves = {k: v.detach().requires_grad_() for k, v in floating.items()}
        outputs = function(**{**inputs, **leaves}, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, d) for y, d in zip(outputs, d_outputs) if y.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], list(leaves.values()), [d for _, d in pairs],
            materialize_grads=True,
        )  # fmt: skip
        results = dict(zip(("y", "final_states"), (y.detach() for y in outputs)))
        return results | {f"d_{k}": g for k, g in zip(leaves, grads)}

    return run


def gradients_of(function, inputs, options, seed=1):
    """Random gradients of a function's outputs."""
    outputs = function(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random_ = torch.Generator().manual_seed(seed)
    return [
        torch.randn(y.shape, dtype=torch.float64, generator=random_).to(y.dtype).to(y.device)
        for y in outputs
    ]


def check(run, function, inputs, options):
    """One run against fp64, then again: the bits must be the same.

    A result may err by 1.2 times what rounding the truth to its dtype costs, 3 times what the
    reference errs by in the working precision, and what one long sum of K terms, rounded at each,
    does: 2^-24 (2^-53 in fp64) sqrt(K) of itself.
    """
    d_outputs = gradients_of(function, inputs, options)
    working = working_dtype(inputs["x"])

    def reference_in(dtype):
        wide = {k: to_dtype(v, dtype) for k, v in inputs.items()}
        return run_public(function)(wide, options, [d.to(dtype) for d in d_outputs])

    expected, arithmetic = reference_in(torch.float64), reference_in(working)
    results = run(inputs, options, d_outputs)
    assert set(results) == set(expected)
    step = 2.0**-53 if working == torch.float64 else 2.0**-24
    faults, report = 0, []
    for name, true in expected.items():
        got = results[name]
        assert got.shape == true.shape, f"{name} is {tuple(got.shape)}"
        assert got.dtype in (working, inputs["x"].dtype, inputs.get(name[2:], got).dtype), name
        terms = inputs["x"][..., 0].numel() if name in ("d_weight", "d_bias") else 64
        rounding = (true.to(got.dtype).double() - true).norm().item()
        allowed = 1.2 * rounding + 3 * (arithmetic[name].double() - true).norm().item()
        allowed += 4 * step * math.sqrt(terms) * true.norm().item()
        error = (got.double() - true).norm().item()
        faults += not error <= allowed
        report.append(f"{name:17} error {error:.2e} allowed {allowed:.2e} of {true.norm():.2e}")
    assert not faults, "\n".join(report)
    same_bits(results, run(inputs, options, d_outputs))
    return results


def sliced(v, first):
    """v as a slice of a wider tensor, NaN around it, `first` elements (16 bytes or so) in."""
    wide = torch.full((*v.shape[:-1], v.shape[-1] + 2 * first), math.nan, dtype=v.dtype)
    inside = wide[..., first : first + v.shape[-1]]
    inside.copy_(v)
    return inside
