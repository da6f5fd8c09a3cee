"""cross_entropy is torch's, in the logits' memory: values, what it writes, what it refuses."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from mamba2_cuda.ops import cross_entropy

# Half a unit in the last place, three times: the gradient, its product with 3, what is expected.
TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3 * 2**-9, torch.float16: 3 * 2**-12,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    wide: int = 0  # what lies between the rows, in elements
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "whole vectors": Case(11, 24),
    "element by element": Case(11, 23),
    "spaced rows": Case(7, 64, 8),
    "spaced rows, element by element": Case(7, 64, 3),
    "several vectors a thread": Case(3, 512 * 8 * 5 + 8),
    "several elements a thread": Case(3, 512 * 5 + 1),
    "one word": Case(4, 1),
    "no rows": Case(0, 16),
}


def make_inputs(case, device="cpu"):
    random = torch.Generator().manual_seed(case.rows + case.vocab)
    wide = torch.full((case.rows, case.vocab + case.wide), math.nan, dtype=case.dtype)
    values = 10 * torch.randn(case.rows, case.vocab, generator=random, dtype=torch.float64)
    wide[:, : case.vocab] = values.to(case.dtype)
    targets = torch.randint(case.vocab, (case.rows,), generator=random)
    targets[2::3] = -100
    return wide.to(device)[:, : case.vocab], targets.to(device)


def check(case, logits, targets, forward, backward):
    """The two operators: losses, the gradient of 3 sum(losses) / 7, the margins."""
    before, base = logits.clone(), logits._base
    exact = before.double().requires_grad_()
    true = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(true.sum() * 3 / 7, exact)
    working = torch.promote_types(case.dtype, torch.float32)
    share = torch.tensor(1 / 7, dtype=working, device=logits.device)
    tolerance = TOLERANCE[case.dtype]

    losses = forward(logits, targets, None)
    assert losses.dtype == working and torch.equal(logits, before)
    close = max(tolerance / 10, 1e-6) if working == torch.float32 else tolerance
    torch.testing.assert_close(losses.double(), true.detach(), rtol=close, atol=10 * close)
    assert torch.equal(forward(logits, targets, share), losses)
    dense = logits.contiguous()
    backward(dense, torch.tensor(1.0, dtype=working, device=logits.device))
    assert torch.equal(dense, logits)
    backward(dense, torch.tensor(3.0, dtype=working, device=logits.device))
    if case.rows:
        assert (dense - gradient).abs().max() <= tolerance * gradient.abs().max()
        assert (dense[2::3] == 0).all()
    if case.wide:
        assert base[:, case.vocab :].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operators(name, dtype, device, ops):
    case = CASES[name]
    case = Case(case.rows, case.vocab, case.wide, dtype)
    check(case, *make_inputs(case, device), ops.cross_entropy_forward, ops.cross_entropy_backward)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_cross_entropy(dtype, device):
    logits, targets = make_inputs(Case(11, 23, 0, dtype), device)
    logits.requires_grad_()
    exact = F.cross_entropy(logits.double(), targets)
    (expected,) = torch.autograd.grad(3 * exact, logits)
    got = cross_entropy(logits * 1, targets)
    (gradient,) = torch.autograd.grad(3 * got, logits)
    assert gradient.dtype == dtype
    assert abs(got.item() - exact.item()) <= max(TOLERANCE[dtype] / 10, 1e-6) * exact.item()
    assert (gradient - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("slice_of", ["rows", "columns"])
def test_strided_logits_have_a_gradient(slice_of, device):
    """Such as those of a padded vocabulary, cut."""
    wide = torch.randn(6, 40, dtype=torch.float64, device=device, requires_grad=True)
    cut = {"rows": lambda: (wide * 1)[:, :24], "columns": lambda: (wide * 1).T}[slice_of]
    targets = torch.arange(cut().size(0), device=device) % cut().size(1)
    (expected,) = torch.autograd.grad(3 * F.cross_entropy(cut(), targets), wide)
    (gradient,) = torch.autograd.grad(3 * cross_entropy(cut(), targets), wide)
    torch.testing.assert_close(gradient, expected)


def test_far_apart_logits(device):
    logits = torch.tensor([[-math.inf, 3e4, 0.0], [-1e30, -2e30, -1e30]], device=device)
    targets = torch.tensor([2, 0], device=device)
    expected = F.cross_entropy(logits.double(), targets).item()
    assert cross_entropy(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_no_target_counts(device):
    logits = torch.randn(3, 5, device=device)
    assert cross_entropy(logits, torch.full((3,), -100, device=device)).isnan()


def test_targets_out_of_range(device):
    logits, targets = torch.randn(3, 5, device=device), torch.tensor([1, 5, -1], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="targets must be -100 or from 0 to 4, got 5 in row"):
            cross_entropy(logits[:2], targets[:2])
        with pytest.raises(RuntimeError, match="got -1 in row 2"):
            cross_entropy(logits, torch.tensor([1, 2, -1]))
        return
    assert cross_entropy(logits, targets).isnan()
    assert cross_entropy(logits, torch.tensor([1, 2, -1], device=device)).isnan()


def test_logits_that_want_no_gradient_stay_as_they_are(device):
    logits, targets = torch.randn(5, 7, device=device), torch.randint(7, (5,), device=device)
    before = logits.clone()
    torch.testing.assert_close(cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    assert torch.equal(logits, before)
    torch.testing.assert_close(
        cross_entropy(logits.T.contiguous().T, targets), F.cross_entropy(logits, targets)
    )


def test_a_second_backward_is_refused():
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    value = cross_entropy(logits * 1, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        value.backward()
    value = cross_entropy(logits * 1, targets)
    with pytest.raises(RuntimeError, match="not differentiably"):
        torch.autograd.grad(value, logits, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets must be \(rows=5,\)"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, "targets must be torch.int64"),
        ({"logits": torch.zeros(5, 7, dtype=torch.int64)}, "logits must be"),
        ({"logits": torch.zeros(5)}, r"logits must be \(rows, vocab\)"),
        ({"scale": torch.tensor(1.0, dtype=torch.float64)}, "scale must be torch.float32"),
        ({"scale": torch.ones(2)}, "scale must be"),
        (
            {"logits": torch.zeros(7, 5).T, "scale": torch.tensor(1.0)},
            "logits' last stride must",
        ),
    ],
)
def test_errors(change, message, ops):
    given = {"logits": torch.zeros(5, 7), "targets": torch.zeros(5, dtype=torch.int64)}
    given = {**given, "scale": None, **change}
    with pytest.raises(RuntimeError, match=f"cross_entropy: {message}"):
        ops.cross_entropy_forward(*given.values())


@pytest.mark.parametrize("scale", [None, 0.5])
def test_opcheck(scale, device, ops):
    logits, targets = make_inputs(CASES["whole vectors"], device)
    scale = None if scale is None else torch.tensor(scale, device=device)
    torch.library.opcheck(ops.cross_entropy_forward.default, (logits, targets, scale))
    torch.library.opcheck(
        ops.cross_entropy_backward.default, (logits, torch.tensor(2.0, device=device))
    )
