"""How an operator is compared with the reference: every output and every gradient, against fp64.

    check(run_ops(torch.ops.mamba2_cuda, plan=2), case, "cuda")

A `run` takes (inputs, dy, d_final_states, save_states) and returns results by name: y,
final_states, dx, d_dt, dA, dB, dC, dD, dz, d_dt_bias, d_initial_states.
"""

import math
from functools import lru_cache

import torch
from cases import make_gradients, make_inputs

from mamba2_cuda import reference
from mamba2_cuda.reference.discretise import working_dtype
from mamba2_cuda.reference.yardstick import ARGUMENT_OF, yardstick

HALF = (torch.bfloat16, torch.float16)
RESULTS = ("y", "final_states", *(name for name in ARGUMENT_OF if name != "y"))


# ---- running an operator


def op_arguments(inputs):
    """The arguments that forward and backward ops share, in the order of their schemas."""
    tensors = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    tensors += [inputs.get(k) for k in ("D", "z", "dt_bias", "initial_states")]
    tensors += [inputs.get(k) for k in ("cu_seqlens", "seq_idx")]
    return tensors, (inputs["dt_softplus"], *inputs["dt_limit"])


def run_ops(ops, plan=0):
    """A run of the registered ops of a namespace, such as torch.ops.mamba2_cuda."""

    def run(inputs, dy, d_final_states, save_states=False):
        tensors, options = op_arguments(inputs)
        forward = ops.ssd_scan_forward(*tensors, *options, True, save_states, plan)
        y, final_states, chunk_states = forward
        kept = chunk_states if chunk_states.numel() else None
        backward = ops.ssd_scan_backward(dy, d_final_states, *tensors, kept, *options, plan)
        return present(dict(zip(RESULTS, (y, final_states, *backward))), inputs)

    return run


def run_public(scan):
    """A run of mamba2_cuda.ssd_scan, or a function with its interface, under autograd."""

    def run(inputs, dy, d_final_states, save_states=False):
        leaves = leaves_of(inputs)
        kept = {"save_states": True} if save_states else {}
        y, final_states = scan(**{**inputs, **leaves}, return_final_states=True, **kept)
        return {"y": y, "final_states": final_states} | gradients(
            leaves, y, final_states, dy, d_final_states
        )

    return run


def plans(device, dtype):
    """The plans to force on a device: its choice, then every tier that takes this dtype.

    A tier that does not take the sizes of a problem hands it to tier "any".
    """
    if device == "cpu":
        return (0,)
    capability = torch.cuda.get_device_capability()
    tensor_cores = [2] if capability >= (8, 0) else []
    tensor_cores += [3] if capability == (9, 0) else []
    return (0, 1, *(tensor_cores if dtype in HALF else []))


def present(results, inputs):
    """Results without those of absent arguments, which an op returns empty."""
    absent = {k for k, of in ARGUMENT_OF.items() if inputs.get(of) is None}
    for name in absent:
        assert results[name].numel() == 0, f"{name} without {ARGUMENT_OF[name]} is not empty"
    return {k: v for k, v in results.items() if k not in absent}


def leaves_of(inputs):
    floating = {k: v for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return {k: v.detach().requires_grad_() for k, v in floating.items()}


def gradients(leaves, y, final_states, dy, d_final_states):
    pairs = [(y, dy), (final_states, d_final_states)]
    pairs = [(out, d) for out, d in pairs if d is not None and out.requires_grad]
    grads = [torch.zeros_like(v) for v in leaves.values()]
    if pairs:  # the reference has none where there is no token
        outputs, d_outputs = zip(*pairs)
        arguments = list(leaves.values())
        grads = torch.autograd.grad(outputs, arguments, d_outputs, materialize_grads=True)
    name_of = {of: name for name, of in ARGUMENT_OF.items() if name != "y"}
    return {name_of[k]: v for k, v in zip(leaves, grads)}


# ---- the truth and the yardstick


@lru_cache(maxsize=2)
def truth(case, device="cpu"):
    """What fp64 gives: the recurrence, or, where that would take minutes, the block form, which
    test_reference.py holds to the recurrence at 1e-12."""
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    return truth_of(inputs, dy, d_final)


def truth_of(inputs, dy, d_final_states):
    inputs = {k: to_double(v) for k, v in inputs.items()}
    form = "recurrent" if work_of(inputs) < 4e6 else "block"
    scan = run_public(lambda **kw: reference.ssd_scan(**kw, form=form))
    return detached(scan(inputs, to_double(dy), to_double(d_final_states)))


def work_of(inputs):
    return inputs["x"].numel() * inputs["B"].size(3)


def to_dtype(v, dtype):
    return v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v


def to_double(v):
    return to_dtype(v, torch.float64)


def detached(results):
    return {k: v.detach() for k, v in results.items()}


@lru_cache(maxsize=2)
def expected_error(case, device="cpu"):
    """yardstick_error of a case."""
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    return yardstick_error(inputs, dy, d_final, truth(case, device))


def yardstick_error(inputs, dy, d_final_states, expected):
    """What the same maths errs by when it is rounded at the same places: two tensors by name.

    The first is what 16-bit operands and the dtypes of results cost (the yardstick), the second
    what arithmetic in fp32, or fp64 for fp64, costs: the block form with short chunks. Kernels of
    16-bit types flush decays below the least normal number of fp32 to 0: so does this arithmetic.
    """
    dtype = inputs["x"].dtype
    working = working_dtype(inputs["x"])
    wide = {k: to_dtype(v, working) for k, v in inputs.items()}
    operands = yardstick(inputs, dy, d_final_states, operand=dtype if dtype in HALF else None)
    flushed = torch.finfo(torch.float32).tiny if dtype in HALF else 0.0
    arithmetic = yardstick(
        wide, dy, d_final_states, working=working, chunk=16, smallest_decay=flushed
    )
    both = (operands, arithmetic)
    return {k: tuple(results[k].double() - v for results in both) for k, v in expected.items()}


# ---- comparing


def allowed_error(name, inputs, expected, errors):
    """The norm of the error that a result may have: the sum of

    1.2 times the yardstick's, times what two independent sets of rounding errors of that size may
    differ by (`confidence`: next to 1 unless the result has few elements; test_numerics.py pools
    many of those);
    3 times what the PyTorch block form errs by in the same precision, for sums in another order;
    what one long sum of K terms, rounded at each, errs by: about 2^-24 sqrt(K) of itself.
    """
    operands, arithmetic = errors
    b, l, h, p = inputs["x"].shape
    per_parameter = name in ("d_dt", "dA", "dD", "d_dt_bias")
    terms = b * l * p if per_parameter else l + p + inputs["B"].size(3)
    norm = expected.norm().item()
    allowed = 3 * arithmetic.norm().item()
    if inputs["x"].dtype == torch.float64:
        # Logarithms of decays, at most 160 each, are summed over up to 64 tokens: the last bit of
        # the sum is an error of the decay. And a decay clamped there is 2^-160, which fp64 can tell
        # from 0; fp32 cannot.
        allowed += 2.0**-53 * (math.sqrt(terms) + 64 * 160) * norm + 2.0**-150
    else:
        allowed += 2.0**-24 * math.sqrt(terms) * norm
    bounds = inputs.get("cu_seqlens")
    tokens = l if bounds is None else l // max(1, len(bounds) - 1)
    return allowed + 1.2 * confidence(name, operands, tokens) * operands.norm().item()


PRODUCTS = ("y", "final_states", "dx", "dB", "dC", "dz", "d_initial_states")  # of matrices


def confidence(name, error, tokens=math.inf):
    """How far the norms of two independent draws of the same rounding errors may lie apart.

    The logarithm of their ratio has standard deviation 1 / sqrt(2 N), N = (sum e^2)^2 / sum e^4
    (the number of elements that matter: N is a third of all for normal e); three of those. The
    errors of d_dt in one sequence of one head are sums of one another and count as one. A row of a
    product of matrices is a sum over the tokens of a sequence: of so few that there are more
    columns, all columns err by the same roundings, and the row counts no more than once a token.
    """
    squares = error.square()
    if name == "d_dt":
        squares = squares.sum(1)
    elif name in PRODUCTS and tokens < squares.size(-1):
        parts = squares.chunk(max(1, tokens), -1)
        squares = torch.stack([part.sum(-1) for part in parts])
    fourth = squares.square().sum().item()
    if fourth == 0:
        return 1.0
    return math.exp(3 / math.sqrt(2 * squares.sum().item() ** 2 / fourth))


def compare(results, expected, errors, inputs, what=""):
    """Every result against the truth; one report of all that are too far off."""
    assert set(results) == set(expected), f"{what}: results {sorted(results)}"
    faults, report = 0, []
    for name, true in expected.items():
        got = results[name]
        assert got.shape == true.shape, f"{what}: {name} is {tuple(got.shape)}"
        norm = max(true.norm().item(), 1e-300)
        error = (got.detach().double() - true).norm().item()
        allowed = allowed_error(name, inputs, true, errors[name])
        good = error <= allowed  # False for NaN
        faults += not good
        verdict = "" if good else f"   <-- {name} too far"
        report.append(f"{name:17} error {error / norm:.2e} allowed {allowed / norm:.2e}{verdict}")
    assert not faults, f"{what}\n" + "\n".join(report)


def check(run, case, device="cpu", repeat=True):
    """Runs a case, compares all of it, and runs it again: the bits must be the same."""
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    results = run(inputs, dy, d_final, case.save_states)
    compare(results, truth(case, device), expected_error(case, device), inputs, str(case))
    check_dtypes(results, inputs)
    if repeat:
        same_bits(results, run(inputs, dy, d_final, case.save_states), str(case))
    return results


def check_inputs(run, inputs, dy, d_final_states=None, what=""):
    """The same for inputs that were not made from a Case."""
    expected = truth_of(inputs, dy, d_final_states)
    errors = yardstick_error(inputs, dy, d_final_states, expected)
    results = run(inputs, dy, d_final_states)
    compare(results, expected, errors, inputs, what)
    return results


def check_dtypes(results, inputs):
    working = working_dtype(inputs["x"])
    for name, result in results.items():
        dtype = inputs[ARGUMENT_OF[name]].dtype if name in ARGUMENT_OF else working
        assert result.dtype in (dtype, working), f"{name} is {result.dtype}"


def same_bits(first, second, what=""):
    for name in first:
        assert torch.equal(first[name], second[name]), f"{what}: {name} differs"
