"""The loss of a large vocabulary is torch's cross-entropy, and its gradient too."""

import pytest
import torch
import torch.nn.functional as F

from mamba2_cuda.model import loss

# Half a unit in the last place, three times: the gradient, its product with 3, what is expected.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3 * 2**-9}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [1, 70, 1000], ids=lambda n: f"chunks of {n}")
def test_it_is_cross_entropy(dtype, chunk, device, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    logits = (10 * torch.randn(11, 23)).to(device, dtype).requires_grad_()
    targets = torch.randint(23, (11,), device=device)
    targets[[2, 5]] = -100
    exact = F.cross_entropy(logits.double(), targets)
    (expected,) = torch.autograd.grad(3 * exact, logits)
    got = loss.cross_entropy(logits * 1, targets)
    (gradient,) = torch.autograd.grad(3 * got, logits)
    assert gradient.dtype == dtype
    assert abs(got.item() - exact.item()) <= max(TOLERANCE[dtype] / 10, 1e-6) * exact.item()
    assert (gradient - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_logits_that_want_no_gradient_stay_as_they_are():
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    before = logits.clone()
    torch.testing.assert_close(
        loss.cross_entropy(logits, targets), F.cross_entropy(logits, targets)
    )
    assert torch.equal(logits, before)


def test_a_second_backward_is_refused():
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    value = loss.cross_entropy(logits * 1, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        value.backward()
    value = loss.cross_entropy(logits * 1, targets)
    with pytest.raises(RuntimeError, match="not differentiably"):
        torch.autograd.grad(value, logits, create_graph=True)
