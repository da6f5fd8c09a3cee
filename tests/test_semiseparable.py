"""Semiseparable matrices, and the older layers that are special cases of the operator."""

import pytest
import torch
from cases import Case, make_inputs

from mamba2_cuda import reference
from mamba2_cuda.reference import semiseparable

F64 = torch.float64


@pytest.fixture
def problem():
    torch.manual_seed(0)
    a = -torch.rand(2, 9, dtype=F64)
    B, C = torch.randn(2, 2, 9, 3, dtype=F64)
    return a, B, C, torch.randn(2, 9, 4, dtype=F64)


def test_segment_sums(problem):
    a = problem[0]
    sums = semiseparable.segsum(a)
    for i in range(9):
        for j in range(9):
            expected = a[:, j + 1 : i + 1].sum(-1) if i >= j else torch.tensor(-torch.inf)
            torch.testing.assert_close(sums[:, i, j], expected.expand(2).to(F64))


def test_segment_sums_survive_a_reset():
    a = torch.tensor([-1.0, -torch.inf, -2.0], dtype=F64)
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, torch.e**-2, 1]], dtype=F64)
    torch.testing.assert_close(semiseparable.decay_matrix(a), expected)


def test_linear_time_multiplication(problem):
    a, B, C, x = problem
    M = semiseparable.materialise(a, B, C)
    torch.testing.assert_close(semiseparable.multiply(a, B, C, x), M @ x)
    torch.testing.assert_close(semiseparable.multiply_transposed(a, B, C, x), M.mT @ x)


def test_blocks_below_the_diagonal_have_rank_n(problem):
    a, B, C, _ = problem
    M = semiseparable.materialise(a, B, C)
    for i in range(1, 9):
        assert torch.linalg.matrix_rank(M[:, i:, : i + 1]).max() <= 3
    assert torch.linalg.matrix_rank(M).min() == 9


def test_one_semiseparable_is_a_scalar_recurrence(problem):
    a, _, _, x = problem
    expected = semiseparable.decay_matrix(a) @ x
    got = torch.stack([semiseparable.cumulative_product_sum(a, v) for v in x.unbind(-1)], -1)
    torch.testing.assert_close(got, expected)


def test_operator_is_its_matrix():
    """One head of ssd_scan is M diag(delta) x, M semiseparable with a = delta A."""
    inputs = make_inputs(Case(b=2, l=20, h=3, p=4, g=1, n=2, dtype=F64, dt_softplus=False))
    y = reference.ssd_scan(**inputs)
    for i_h in range(3):
        delta = inputs["dt"][:, :, i_h].clamp(min=0)
        B, C = inputs["B"][:, :, 0], inputs["C"][:, :, 0]
        M = semiseparable.materialise(delta * inputs["A"][i_h], B, C)
        torch.testing.assert_close(y[:, :, i_h], M @ (delta[..., None] * inputs["x"][:, :, i_h]))


FORMS = ["recurrent", "quadratic", "block"]


@pytest.mark.parametrize("form", FORMS)
def test_linear_attention_is_a_special_case(form):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 70, 3, 4, dtype=F64)
    v = torch.randn(2, 70, 3, 5, dtype=F64)
    got = reference.linear_attention_as_ssd(q, k, v, form=form)
    torch.testing.assert_close(got, reference.linear_attention(q, k, v))


@pytest.mark.parametrize("form", FORMS)
def test_retention_is_a_special_case(form):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 70, 3, 4, dtype=F64)
    v = torch.randn(2, 70, 3, 5, dtype=F64)
    gamma = torch.tensor([1.0, 0.97, 0.5], dtype=F64)
    got = reference.retention_as_ssd(q, k, v, gamma, form=form)
    torch.testing.assert_close(got, reference.retention(q, k, v, gamma))
