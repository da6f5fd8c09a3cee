"""What goes wrong when SSD is written the obvious way (docs/numerics.md), and does not in ours.

Each test runs the obvious formula beside the reference's in fp32; `pytest -s` prints both errors.
"""

import torch
from cases import Case, make_gradients, make_inputs
from common import truth_of
from einops import rearrange

from mamba2_cuda.reference.semiseparable import decay_matrix
from mamba2_cuda.reference.yardstick import yardstick

F32 = torch.float32


def decays(case):
    """a = delta A (b, h, l) of a case, in fp64."""
    inputs = make_inputs(case)
    return rearrange(inputs["dt"].clamp(min=0).double() * inputs["A"].double(), "b l h -> b h l")


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def show(what, obvious, ours):
    print(f"\n{what}: obvious {obvious:.1e}, ours {ours:.1e}")


def test_a_mask_that_multiplies():
    """exp(s_i - s_j) overflows above the diagonal, and inf times 0 is NaN."""
    a = decays(Case(b=1, l=64, h=2, g=1, dt_softplus=False, decay="strong")).to(F32)
    s = a.cumsum(-1)
    differences = s[..., :, None] - s[..., None, :]
    assert (differences.exp() * torch.ones(64, 64).tril()).isnan().any()
    assert decay_matrix(a).isfinite().all()


def test_factors_over_a_whole_chunk():
    """exp(s_i) exp(-s_j) in place of exp(s_i - s_j): one underflows, the other overflows."""
    a = decays(Case(b=1, l=64, h=2, g=1, dt_softplus=False, decay="strong")).to(F32)
    s = a.cumsum(-1)
    factored = (s.exp()[..., :, None] * (-s).exp()[..., None, :]).tril()
    assert not factored.isfinite().all()
    # Neighbouring tokens late in the chunk lose all they pass on, where exp(a_t) is left.
    assert factored[0, 0, 63, 62].nan_to_num(0, 0) == 0 and decay_matrix(a)[0, 0, 63, 62] > 1e-5


def test_cumulative_sums_over_the_sequence():
    """Differences of a sum over 64k tokens, where a chunk's own sum has small terms."""
    a = decays(Case(b=1, l=65536, h=2, g=1, dt_softplus=False))
    last = a[..., -64:]
    expected = decay_matrix(last)
    s = a.to(F32).cumsum(-1)[..., -64:]
    obvious = relative((s[..., :, None] - s[..., None, :]).exp().tril(), expected)
    s = last.to(F32).cumsum(-1)
    ours = relative((s[..., :, None] - s[..., None, :]).exp().tril(), expected)
    show("decays from cumulative sums", obvious, ours)
    assert obvious > 20 * ours


def test_step_in_the_exponent():
    """exp(s_i - (s_j - log delta_j)): in a sum that one big token made big, log delta is lost."""
    torch.manual_seed(0)
    delta = (torch.rand(64, dtype=torch.float64) * 0.1).index_fill(0, torch.tensor(3), 100.0)
    a = delta * -1e4
    expected = decay_matrix(a) * delta
    s = a.to(F32).cumsum(0)
    folded = (s[:, None] - (s - delta.to(F32).log())).exp().tril()
    clamped = a.to(F32).clamp(min=-160 * 0.6931472).cumsum(0)
    kept = ((clamped[:, None] - clamped).exp() * delta.to(F32)).tril()
    obvious, ours = relative(folded, expected), relative(kept, expected)
    show("delta in the exponent", obvious, ours)
    assert obvious > 1e-3 and ours < 1e-6


def test_decay_gradient_as_a_difference_of_products():
    """d a_t = sum_{i>=t} (dy_i . y_i - x_i . dx_i) + <G, S'> is exact, and cancels: with y and dx
    as a 16-bit kernel returns them it errs by far more than row and column sums of one V do."""
    case = Case(b=1, l=512, h=8, p=64, n=64, g=1, dtype=torch.bfloat16, dt_softplus=False,
                dt_dtype=F32, d_final_states=False, decay="strong")  # fmt: skip
    inputs, (dy, _) = make_inputs(case), make_gradients(case)
    expected = truth_of(inputs, dy, None)["dA"]
    rounded = yardstick(inputs, dy, operand=torch.bfloat16)
    y, dx = (rounded[k].double() for k in ("y", "dx"))
    products = (dy.double() * y - inputs["x"].double() * dx).sum(-1)
    d_a = products.flip(1).cumsum(1).flip(1)
    delta = inputs["dt"].double().clamp(min=0)
    obvious, ours = relative((delta * d_a).sum((0, 1)), expected), relative(rounded["dA"], expected)
    show("dA from products of rounded results", obvious, ours)
    assert obvious > 5 * ours
