"""The Mamba-2 mixer (paper, section 7.1, figure 6 right).

    z, x, B, C, dt = in_proj(u)
    x, B, C        = silu(causal_conv1d(x, B, C))
    y              = ssd_scan(x, dt, A, B, C) + D x
    out            = out_proj(norm(y, z))

The projections of B, C and dt stand beside that of x, not behind it, so that all splits over ranks.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from . import functional
from .cache import MixerCache
from .conv import CausalConv1d
from .conv_scan_norm import A_of, Options
from .layout import ProjectionLayout
from .norm import GatedRMSNorm, Unprojected
from .ranks import share_of_state, spread, total


class Mamba2(nn.Module):
    """u (b, l, d_model) -> (b, l, d_model).

    d_state n; headdim p; ngroups g; expand d_model = h p channels
    D_has_hdim        D is one number a channel instead of one a head
    rmsnorm           normalise before out_proj; without it the gate is applied inside ssd_scan
    norm_before_gate  norm(y) silu(z) instead of norm(y silu(z))
    norm_groups       groups of channels that the norm takes one by one; ngroups if not given. It is
                      the whole model's number, whatever the number of ranks
    dt_limit          bounds of softplus(dt + dt_bias)
    A_init_range      A = -exp(A_log) starts uniform in -A_init_range
    dt_min, dt_max    softplus(dt_bias) starts log-uniform between them, at dt_init_floor or above
    process_group     ranks that share heads and groups (paper, 8.1), whose numbers they divide.
                      Every rank is given the same u and has the same result; weights are those of
                      its share: see load_share

    Source: paper, section 7; initial values as in its code's defaults (appendix D).
    """

    def __init__(
        self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, *,
        A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False,
        norm_groups=None, norm_eps=1e-5, dt_min=1e-3, dt_max=1e-1, dt_init_floor=1e-4,
        dt_limit=(0.0, math.inf), bias=False, conv_bias=True, process_group=None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if expand * d_model % headdim:
            raise ValueError(f"expand * d_model ({expand * d_model}) % headdim ({headdim}) != 0")
        heads = int(expand * d_model) // headdim
        if heads % ngroups:
            raise ValueError(f"number of heads ({heads}) % ngroups ({ngroups}) != 0")
        self.process_group = process_group
        self.ranks = 1 if process_group is None else dist.get_world_size(process_group)
        norm_groups = norm_groups or ngroups
        if norm_groups % self.ranks:
            raise ValueError(f"norm_groups ({norm_groups}) % number of ranks ({self.ranks}) != 0")
        self.whole_layout = ProjectionLayout(heads, headdim, ngroups, d_state)
        self.layout = layout = self.whole_layout.share(self.ranks)
        self.dt_limit, self.D_has_hdim = tuple(dt_limit), D_has_hdim
        made = dict(device=device, dtype=dtype)

        self.in_proj = nn.Linear(d_model, layout.width, bias=bias, **made)
        self.conv1d = CausalConv1d(layout.conv_channels, d_conv, bias=conv_bias, **made)
        dt = torch.rand(layout.heads, device=device) * (math.log(dt_max) - math.log(dt_min))
        dt = (dt + math.log(dt_min)).exp().clamp(min=dt_init_floor)
        inverse_softplus = dt + torch.log(-torch.expm1(-dt))
        self.dt_bias = nn.Parameter(inverse_softplus.to(dtype))
        A = torch.empty(layout.heads, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype))
        self.D = nn.Parameter(torch.ones(layout.d_inner if D_has_hdim else layout.heads, **made))
        self.norm = None
        group_size = self.whole_layout.d_inner // norm_groups
        self.options = Options(layout, self.dt_limit, norm_eps, group_size, norm_before_gate)
        if rmsnorm:
            self.norm = GatedRMSNorm(layout.d_inner, group_size, norm_before_gate, norm_eps, **made)
        self.out_proj = nn.Linear(layout.d_inner, d_model, bias=bias, **made)
        if bias and self.ranks > 1:
            nn.init.zeros_(self.out_proj.bias)  # the one parameter that all ranks have whole

    def forward(self, u, tokens=None, cache=None):
        """u (b, l, d_model); tokens says what is packed or padded; cache is read and moved on."""
        cu_seqlens = None if tokens is None else tokens.cu_seqlens
        real = None if tokens is None else tokens.real()
        one = cache is not None and u.size(1) == 1
        if real is None and not one and self.is_one_operator(u):
            return self.at_once(u, cu_seqlens, cache)
        zxBCdt = self.in_proj(u if self.ranks == 1 else spread(u, self.process_group))
        if one and real is None:
            y = self.step(zxBCdt[:, 0], cache)[:, None]
        elif real is None and (cache is None or not torch.is_grad_enabled()):
            y = self.whole(zxBCdt, cu_seqlens, cache)
        else:
            y = self.in_parts(zxBCdt, real, cache)
        if self.ranks == 1:
            return self.out_proj(y)
        out = total(F.linear(y, self.out_proj.weight), self.process_group)
        return out if self.out_proj.bias is None else out + self.out_proj.bias

    def is_one_operator(self, u):
        """Whether all of it may be one: it is an operator without gradients, of bare products."""
        if (
            torch.is_grad_enabled()
            or self.ranks > 1
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(u.device.type)
        ):
            return False
        modules, dtype = self._modules, u.dtype
        return is_bare(modules["in_proj"], dtype) and is_bare(modules["out_proj"], dtype)

    def at_once(self, u, cu_seqlens, cache):
        modules = self._modules
        return functional.mixer(
            u, parameter(modules["in_proj"], "weight"), *self.parameters_between(),
            parameter(modules["out_proj"], "weight"), cu_seqlens, self.options, cache,
        )  # fmt: skip

    def parameters_between(self):
        """The parameters between the two projections, in the operators' order."""
        modules = self._modules
        conv, norm = modules["conv1d"], modules.get("norm")
        return (
            parameter(conv, "weight"), parameter(conv, "bias"), parameter(self, "A_log"),
            self.D_by_head(), parameter(self, "dt_bias"),
            None if norm is None else parameter(norm, "weight"),
        )  # fmt: skip

    def add_step(self, residual, norm, cache):
        """residual (b, d_model) += mixer(norm(residual)) for one token a row, in place, in the
        fewest kernels: norm and in_proj are one, and norm, out_proj and the sum. None of them
        writes a weight that the next one reads."""
        zxBCdt = functional.norm_linear(
            residual, norm.weight, self.in_proj.weight, self.in_proj.bias, eps=norm.eps,
            early_weights=True,
        )  # fmt: skip
        y, z = self.scan_step(zxBCdt, cache)
        if self.norm is None:
            residual += self.out_proj(y)
        else:
            functional.norm_linear(
                y, self.norm.weight, self.out_proj.weight, self.out_proj.bias, z=z,
                residual=residual, early_weights=True, **self.norm.options,
            )  # fmt: skip

    def adds_fast(self, residual):
        """Whether add_step has fast kernels for these rows."""
        return len(residual) <= 8 and self.has_step_kernels(residual)

    def step_unprojected(self, u, cache):
        """forward for one token a row, but for what RMSNorm.add does with the next norm."""
        if self.convolves_rows(u, cache):
            conv = self.conv1d
            zxBCdt = functional.linear_rows(
                u[:, 0], self.in_proj.weight, conv_state=cache.conv, conv_weight=conv.weight[:, 0],
                conv_bias=conv.bias, conv_first=self.layout.d_inner, silu=conv.silu,
                early_weights=True,
            )  # fmt: skip
            z, xBC, dt = self.layout.split(zxBCdt)
        else:
            z, xBC, dt = self.layout.split(self.in_proj(u[:, 0]))
            xBC = self.conv1d.step(xBC, cache.conv)
        y = self.scan_convolved(z, xBC, dt, cache)
        return Unprojected(y, z, self.norm, self.out_proj)

    def convolves_rows(self, u, cache):
        """Whether linear_rows takes in_proj and the convolution, and is faster than both alone."""
        weight, conv, layout = self.in_proj.weight, self.conv1d, self.layout
        return (
            functional.linear_rows_at_once(len(u), layout.width)
            and is_bare(self.in_proj, torch.bfloat16)
            and weight.size(0) % 8 == weight.size(1) % 8 == 0
            and layout.d_inner % 2 == layout.conv_channels % 2 == 0
            and cache.conv.dtype == conv.weight.dtype == torch.bfloat16
            and (conv.bias is None or conv.bias.dtype == torch.bfloat16)
        )

    def projects_with_next_norm(self, residual):
        """Whether the operator behind step_unprojected has fast kernels for these rows."""
        return (
            len(residual) > 8
            # With more rows, or wider ones, a library's product is faster.
            and len(residual) <= (128 if residual.size(-1) <= 768 else 64)
            and residual.size(-1) <= 1024
            and self.has_step_kernels(residual)
            and self.norm is not None
            and self.norm.weight.dtype == self.in_proj.weight.dtype == torch.bfloat16
            and residual.dtype == torch.float32
            and self.out_proj.bias is None
        )

    def has_step_kernels(self, residual):
        """Whether kernels of decoding take these weights, and nothing is in their way."""
        weight, layout = self.in_proj.weight, self.layout
        return (
            weight.is_cuda
            and weight.element_size() == 2
            and self.ranks == 1
            and residual.size(-1) % 8 == layout.d_inner % 8 == 0
            and self.options.group_size == layout.d_inner
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and all(is_plain(linear, weight.dtype) for linear in (self.in_proj, self.out_proj))
        )

    def whole(self, zxBCdt, cu_seqlens, cache):
        """All between the projections, where nothing is padding."""
        return functional.conv_scan_norm(
            zxBCdt, *self.parameters_between(), cu_seqlens, self.options, cache
        )

    def in_parts(self, zxBCdt, real, cache):
        """The same with padding, or from a cache with gradients."""
        z, xBC, dt = self.layout.split(zxBCdt)
        xBC = self.conv1d(hide(xBC, real), state=None if cache is None else cache.conv)
        x, B, C = self.layout.split_conv(hide(xBC, real))
        y = self.scan(x, dt, B, C, z, cache).flatten(-2)
        return y if self.norm is None else self.norm(y, z)

    def scan(self, x, dt, B, C, z, cache):
        options = self.scan_options(z)
        if cache is None:
            return functional.ssd_scan(x, dt, self.A(), B, C, **options)
        y, after = functional.ssd_scan(
            x, dt, self.A(), B, C, initial_states=cache.ssm, return_final_states=True, **options
        )
        cache.ssm.copy_(after)
        return y

    def step(self, zxBCdt, cache):
        """All between the projections for one token a row: (b, width) -> (b, h p)."""
        y, z = self.scan_step(zxBCdt, cache)
        return y if self.norm is None else self.norm(y, z)

    def scan_step(self, zxBCdt, cache):
        """What is to be normed, and its gate: y (b, h p) and z."""
        z, xBC, dt = self.layout.split(zxBCdt)
        return self.scan_convolved(z, self.conv1d.step(xBC, cache.conv), dt, cache), z

    def scan_convolved(self, z, xBC, dt, cache):
        x, B, C = self.layout.split_conv(xBC)
        y = functional.ssd_step(
            cache.ssm, x, dt, cache.A, B, C, early_state=True, **self.scan_options(z)
        )  # what is queued just before is the convolution
        return y.flatten(-2)

    def A(self):
        return A_of(self.A_log)

    def D_by_head(self):
        D = parameter(self, "D")
        return self.layout.by_head(D) if self.D_has_hdim else D

    def scan_options(self, z):
        return dict(
            D=self.D_by_head(),
            z=self.layout.by_head(z) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )

    def load_share(self, state):
        """Loads this rank's share out of the state dict of the whole mixer, that of one rank."""
        rank = dist.get_rank(self.process_group)
        self.load_state_dict(share_of_state(state, self.whole_layout, rank, self.ranks))

    def allocate_cache(self, batch, max_length=None, dtype=None, state_dtype=None):
        """An empty cache; max_length is for layers whose memory grows, which this one's does not.

        The state is fp32 (fp64 for an fp64 model) unless state_dtype says otherwise.
        """
        weight, layout = self.in_proj.weight, self.layout
        state_dtype = state_dtype or torch.promote_types(weight.dtype, torch.float32)
        return MixerCache(
            weight.new_zeros(
                batch, self.conv1d.width - 1, layout.conv_channels, dtype=dtype or weight.dtype
            ),
            weight.new_zeros(
                batch, layout.heads, layout.headdim, layout.d_state, dtype=state_dtype
            ),
            self.A().detach(),
        )


def parameter(module, name):
    """module.name, which nn.Module itself takes longer to find than an operator to be queued."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def is_bare(linear, dtype):
    """Whether a projection is x weight^T in this dtype, with no bias and nobody listening."""
    return is_plain(linear, dtype) and linear._parameters.get("bias", "elsewhere") is None


def is_plain(linear, dtype):
    """Whether a projection is what its weights say, in this dtype, and nobody is listening."""
    weight = parameter(linear, "weight")
    return (
        type(linear) is nn.Linear
        and type(weight) is nn.Parameter
        and weight.dtype == dtype
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )


def hide(v, real):
    """v (b, l, channels) with 0 at padding: from an empty state, zeros leave it empty."""
    return v if real is None else v.masked_fill(~real[..., None], 0)
