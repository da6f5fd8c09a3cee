"""The mixer's three operators as one function: their values and gradients, one tensor for all."""

import math

import pytest
import torch

from mamba2_cuda import reference
from mamba2_cuda.nn import Mamba2, ProjectionLayout
from mamba2_cuda.nn.conv_scan_norm import Options, conv_scan_norm, mixer

F64 = torch.float64
NAMES = ("zxBCdt", "conv_weight", "conv_bias", "A_log", "D", "dt_bias", "norm_weight")
CASES = {
    "plain": {},
    "groups": dict(ngroups=2, group_size=8),
    "norm before gate": dict(norm_before_gate=True),
    "no norm": dict(without=("norm_weight",)),
    "no bias, narrow": dict(without=("conv_bias",), width=2),
    "D a channel": dict(D_has_hdim=True),
    "dt limit": dict(dt_limit=(0.3, 0.9)),
    "packed": dict(cu_seqlens=(1, 4, 4, 9)),
    "no tokens": dict(l=0),
}


def make(
    b=2, l=9, heads=4, headdim=8, ngroups=1, d_state=8, width=4, without=(), D_has_hdim=False,
    dt_limit=(0.0, math.inf), group_size=None, norm_before_gate=False, cu_seqlens=None, dtype=F64,
    device="cpu",
):  # fmt: skip
    """(tensors by name, cu_seqlens, options)."""
    layout = ProjectionLayout(heads, headdim, ngroups, d_state)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=F64)
        return values.to(device, dtype).requires_grad_()

    tensors = {
        "zxBCdt": normal(1 if cu_seqlens else b, l, layout.width),
        "conv_weight": normal(layout.conv_channels, 1, width),
        "conv_bias": normal(layout.conv_channels),
        "A_log": normal(heads),
        "D": normal(heads, headdim) if D_has_hdim else normal(heads),
        "dt_bias": normal(heads),
        "norm_weight": normal(layout.d_inner),
    }
    tensors |= dict.fromkeys(without)
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=device)
    size = group_size or layout.d_inner
    return tensors, cu, Options(layout, dt_limit, 1e-5, size, norm_before_gate)


def plain(tensors, cu_seqlens, options):
    """The three operators of the reference, one after another."""
    layout = options.layout
    z, xBC, dt = layout.split(tensors["zxBCdt"])
    xBC = reference.causal_conv1d(
        xBC, tensors["conv_weight"][:, 0], tensors["conv_bias"], cu_seqlens=cu_seqlens
    )
    x, B, C = layout.split_conv(xBC)
    norm_weight = tensors["norm_weight"]
    y = reference.ssd_scan(
        x, dt, -tensors["A_log"].exp(), B, C, D=tensors["D"], dt_bias=tensors["dt_bias"],
        z=layout.by_head(z) if norm_weight is None else None, dt_softplus=True,
        dt_limit=options.dt_limit, cu_seqlens=cu_seqlens,
    ).flatten(-2)  # fmt: skip
    if norm_weight is None:
        return y
    return reference.gated_rmsnorm(
        y, norm_weight, z, eps=options.eps, group_size=options.group_size,
        norm_before_gate=options.norm_before_gate,
    )  # fmt: skip


def fused(tensors, cu_seqlens, options):
    return conv_scan_norm(*tensors.values(), cu_seqlens, options)


def d_out_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(out)


def with_gradients(function, tensors, *rest):
    """out, and the gradient of each tensor by name."""
    out = function(tensors, *rest)
    leaves = {name: t for name, t in tensors.items() if t is not None}
    gradients = torch.autograd.grad(
        out, list(leaves.values()), d_out_of(out), materialize_grads=True
    )
    return {"out": out, **dict(zip(leaves, gradients))}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_three_operators(case, device):
    problem = make(**case, device=device)
    got, expected = with_gradients(fused, *problem), with_gradients(plain, *problem)
    for name, value in expected.items():
        torch.testing.assert_close({name: got[name]}, {name: value})
    with torch.no_grad():
        assert torch.equal(fused(*problem), got["out"])


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_at_a_models_size_is_near_fp64(packed, cuda):
    case = dict(b=2, l=300, heads=24, headdim=64, d_state=128, device=cuda)
    if packed:
        case |= dict(b=1, cu_seqlens=(0, 100, 101, 300))
    expected = with_gradients(plain, *make(**case))
    got = with_gradients(fused, *make(**case, dtype=torch.bfloat16))
    for name, value in expected.items():
        assert (got[name].double() - value).norm() < 0.03 * value.norm(), name


@pytest.mark.parametrize("name", ["plain", "no norm", "packed"])
def test_compile(name, device):
    problem = make(**CASES[name], device=device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    got, expected = with_gradients(compiled, *problem), with_gradients(fused, *problem)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("states", [False, True])
def test_opcheck(states, device, ops):
    tensors, cu_seqlens, options = make(device=device)
    layout = options.layout
    sizes = (3, layout.conv_channels), (layout.heads, layout.headdim, layout.d_state)
    zeros = [torch.zeros(2, *s, dtype=F64, device=device) if states else None for s in sizes]
    arguments = [None if t is None else t.detach() for t in tensors.values()]
    torch.library.opcheck(
        ops.conv_scan_norm_forward.default,
        (*arguments, cu_seqlens, *zeros, *options.as_arguments(), 0),
    )


@pytest.mark.parametrize("name", ["plain", "no norm", "packed"])
def test_opcheck_of_the_backward(name, device, ops):
    tensors, cu_seqlens, options = make(**CASES[name], device=device)
    options = *options.as_arguments(), 0
    arguments = [None if t is None else t.detach() for t in tensors.values()]
    out, *kept = ops.conv_scan_norm_forward(*arguments, cu_seqlens, None, None, *options)
    del arguments[list(tensors).index("A_log")]
    torch.library.opcheck(
        ops.conv_scan_norm_backward.default,
        (torch.ones_like(out), *arguments, cu_seqlens, *kept, *options),
    )


# ---- with the two projections


def projections(tensors, options, d_model=12):
    """u, in_weight and out_weight for these."""
    like, generator = tensors["conv_weight"], torch.Generator().manual_seed(2)
    width, d_inner = options.layout.width, options.layout.d_inner
    shapes = (*tensors["zxBCdt"].shape[:2], d_model), (width, d_model), (d_model, d_inner)
    return [torch.randn(s, generator=generator, dtype=F64).to(like) for s in shapes]


def whole(tensors, cu_seqlens, options, u, in_weight, out_weight):
    arrays = [t for name, t in tensors.items() if name != "zxBCdt"]
    return mixer(u, in_weight, *arrays, out_weight, cu_seqlens, options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_whole_mixer_as_one_operator(case, device):
    tensors, cu_seqlens, options = make(**case, device=device)
    u, in_weight, out_weight = projections(tensors, options)
    with torch.no_grad():
        y = fused({**tensors, "zxBCdt": u @ in_weight.T}, cu_seqlens, options)
        for rows in (u, torch.stack([u, u], 2)[:, :, 0]):  # the second is no matrix in memory
            got = whole(tensors, cu_seqlens, options, rows, in_weight, out_weight)
            torch.testing.assert_close(got, y @ out_weight.T)


@pytest.mark.parametrize("name", ["plain", "no norm"])
def test_opcheck_of_the_whole_mixer(name, device, ops):
    tensors, cu_seqlens, options = make(**CASES[name], device=device)
    u, in_weight, out_weight = projections(tensors, options)
    arrays = [None if t is None else t.detach() for t in tensors.values()][1:]
    torch.library.opcheck(
        ops.mixer_forward.default,
        (u, in_weight, *arrays, out_weight, cu_seqlens, None, None, *options.as_arguments(), 0),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(u=torch.ones(9, 12, dtype=F64)), r"u must be \(b, l, d_model\), got \(9, 12\)"),
        (dict(in_weight=torch.ones(84, 12)), "in_weight must be torch.float64, got torch.float32"),
        (dict(out_weight=torch.ones(32, 12)), r"out_weight must be \(d_model=12, h p=32\), got"),
    ],
)
def test_refusals_of_the_whole_mixer(change, message):
    tensors, cu_seqlens, options = make()
    given = dict(zip(("u", "in_weight", "out_weight"), projections(tensors, options))) | change
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"mixer: {message}"):
        whole(tensors, cu_seqlens, options, **given)


def test_a_changed_projection_is_not_passed_over(device):
    """The layer is one operator without gradients, unless a projection is more than a product."""
    torch.manual_seed(0)
    layer = Mamba2(16, d_state=8, headdim=8, device=device, dtype=F64)
    u = torch.randn(2, 9, 16, dtype=F64, device=device)
    expected = layer(u).detach()
    with torch.no_grad():
        assert layer.is_one_operator(u)
        torch.testing.assert_close(layer(u), expected)
        called = []
        hook = layer.in_proj.register_forward_hook(lambda *_: called.append(1))
        torch.testing.assert_close(layer(u), expected)
        assert called == [1]
        hook.remove()
        torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
        assert not layer.is_one_operator(u)
        torch.testing.assert_close(layer(u), expected)


class Double(torch.nn.Module):
    def forward(self, v):
        return 2 * v


@torch.no_grad()
@pytest.mark.parametrize("module, name", [("conv1d", "bias"), ("norm", "weight"), ("", "A_log")])
def test_a_computed_parameter_is_not_passed_over(module, name):
    """A parametrization has it elsewhere than the others are."""
    torch.manual_seed(0)
    layer, doubled = (Mamba2(16, d_state=8, headdim=8, dtype=F64) for _ in range(2))
    doubled.load_state_dict(layer.state_dict())
    getattr(doubled.get_submodule(module), name).mul_(2)
    torch.nn.utils.parametrize.register_parametrization(layer.get_submodule(module), name, Double())
    u = torch.randn(2, 9, 16, dtype=F64)
    assert layer.is_one_operator(u)
    torch.testing.assert_close(layer(u), doubled(u))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(zxBCdt=torch.ones(2, 9, 7)), r"zxBCdt must be \(b, l, 2 h p \+ 2 g n \+ h=84\)"),
        (dict(conv_weight=torch.ones(48, 4)), r"conv_weight must be \(d=48, 1=1, w\), got"),
        (dict(A_log=torch.ones(3)), r"A_log must be \(h=4,\), got \(3,\)"),
    ],
)
def test_refusals(change, message):
    tensors, *rest = make()
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"conv_scan_norm: {message}"):
        fused(tensors | change, *rest)


def test_gradients_that_nobody_wants_are_not_given():
    tensors, *rest = make()
    for name in ("zxBCdt", "A_log", "conv_bias"):
        tensors[name] = tensors[name].detach()
    fused(tensors, *rest).sum().backward()
    assert all((t.grad is not None) == t.requires_grad for t in tensors.values())


def test_a_second_differentiation_is_refused():
    tensors, *rest = make()
    (first,) = torch.autograd.grad(fused(tensors, *rest).sum(), tensors["D"], create_graph=True)
    with pytest.raises(RuntimeError, match="second differentiation"):
        first.sum().backward()


def test_autocast_casts_the_projection_alone():
    problem = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = with_gradients(fused, *problem)
    assert results.pop("out").dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in results.values())
