"""Causal attention, for hybrids and as a baseline: grouped heads, rotary, optional convolution."""

import torch
import torch.nn.functional as F
from torch import nn

from .cache import AttentionCache
from .conv import CausalConv1d
from .tokens import Tokens


class Attention(nn.Module):
    """out_proj(softmax(q k^T / sqrt(head_dim)) v), q, k and v out of one in_proj.

    num_heads_kv heads of k and v serve num_heads of q, equally many each. rotary_emb_dim: how many
    dims of a head are rotated (0: none). d_conv: width of a causal convolution, with no activation,
    over q, k and v (0: none). Source: the hybrids of the paper, section 9.2.3.
    """

    def __init__(
        self, d_model, num_heads, num_heads_kv=None, head_dim=None, *, causal=True, d_conv=0,
        qkv_proj_bias=True, out_proj_bias=True, rotary_emb_dim=0, rotary_emb_base=10000.0,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if not causal:
            raise ValueError("Attention: causal must be True")
        self.h, self.hkv = num_heads, num_heads_kv or num_heads
        if self.h % self.hkv:
            raise ValueError(f"num_heads ({self.h}) % num_heads_kv ({self.hkv}) != 0")
        self.head_dim = head_dim or d_model // num_heads
        self.rotary_dim, self.rotary_base = rotary_emb_dim, rotary_emb_base
        self.channels = (self.h + 2 * self.hkv) * self.head_dim
        made = dict(device=device, dtype=dtype)
        self.in_proj = nn.Linear(d_model, self.channels, bias=qkv_proj_bias, **made)
        self.conv1d = CausalConv1d(self.channels, d_conv, silu=False, **made) if d_conv else None
        self.out_proj = nn.Linear(self.h * self.head_dim, d_model, bias=out_proj_bias, **made)

    def forward(self, u, tokens=None, cache=None):
        """u (b, l, d_model) -> the same shape; cache is read and moved on."""
        tokens = tokens or Tokens(u.size(1))
        qkv = self.in_proj(u)
        if self.conv1d is not None:
            real = tokens.real()
            qkv = qkv if real is None else qkv.masked_fill(~real[..., None], 0)
            qkv = self.conv1d(qkv, tokens.cu_seqlens, None if cache is None else cache.conv)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([self.h, self.hkv, self.hkv], 2)
        if self.rotary_dim:
            positions = tokens.positions(u.device)
            q, k = self.rotate(q, positions), self.rotate(k, positions)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = self.remember(cache, k, v, tokens)
        mask = tokens.attention_mask(k.size(2), u.device)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.h != self.hkv
        )
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def remember(self, cache, k, v, tokens):
        """Writes k and v at their places; returns all that there is to look at.

        For one token that is the whole buffer, masked: its shape then never changes.
        """
        index = tokens.index(k.device)
        cache.k.index_copy_(2, index, k.to(cache.k.dtype))
        cache.v.index_copy_(2, index, v.to(cache.v.dtype))
        keys = cache.k.size(2) if tokens.l == 1 else tokens.seen + tokens.l
        return cache.k[:, :, :keys].to(k.dtype), cache.v[:, :, :keys].to(v.dtype)

    def rotate(self, v, positions):
        """Turns dims i and i + rotary_dim / 2 of each head by position / base^(2 i / rotary_dim).

        v (b, l, heads, head_dim), positions (b or 1, l).
        """
        half = self.rotary_dim // 2
        exponent = torch.arange(half, device=v.device, dtype=torch.float32) / half
        angle = positions[..., None] * self.rotary_base**-exponent  # (b, l, half)
        cos, sin = angle.cos().to(v.dtype)[:, :, None], angle.sin().to(v.dtype)[:, :, None]
        first, second, rest = v.split([half, half, v.size(-1) - 2 * half], dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([*turned, rest], dim=-1)

    def allocate_cache(self, batch, max_length=None, dtype=None, state_dtype=None):
        """Room for max_length tokens of every row."""
        if max_length is None:
            raise ValueError("Attention: a cache needs max_length")
        weight = self.in_proj.weight
        shape = (batch, self.hkv, max_length, self.head_dim)
        k, v = (weight.new_zeros(shape, dtype=dtype or weight.dtype) for _ in range(2))
        conv = None
        if self.conv1d is not None:
            shape = (batch, self.conv1d.width - 1, self.channels)
            conv = weight.new_zeros(shape, dtype=dtype or weight.dtype)
        return AttentionCache(k, v, conv)
