"""Mamba2LMHeadModel: embedding, blocks, norm, head."""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mamba2_cuda.nn import Attention, Block, Cache, Mamba2, MixerCache, RMSNorm, Tokens
from mamba2_cuda.ops import cross_entropy


class Backbone(nn.Module):
    """tokens (b, l) -> (b, l, d_model): embedding, blocks and the last norm."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__()
        made = dict(device=device, dtype=dtype)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **made)
        self.layers = nn.ModuleList(make_block(config, i, **made) for i in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon, **made)
        self.activation_checkpointing = False
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(self, input_ids, tokens, cache=None):
        residual, pending = self.embedding(input_ids), None
        caches = [None] * len(self.layers) if cache is None else cache.layers
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        slim = self.activation_checkpointing and self.training and cache is None
        for layer, layer_cache in zip(self.layers, caches):
            arguments = (residual, pending, tokens, layer_cache)
            if slim and torch.is_grad_enabled():
                residual, pending = checkpoint(layer.advance, *arguments, use_reentrant=False)
            else:
                residual, pending = layer.advance(*arguments)
        return self.norm_f.add(residual, pending)[1]


def make_block(config, i, **made):
    if i in config.attn_layer_idx:
        mixer = Attention(config.d_model, **config.attn_cfg, **made)
    else:
        options = {"norm_eps": config.norm_epsilon, **config.ssm_cfg}
        mixer = Mamba2(config.d_model, **options, **made)
    return Block(
        config.d_model, mixer, config.d_intermediate, config.norm_epsilon,
        config.residual_in_fp32, **made,
    )  # fmt: skip


class Mamba2LMHeadModel(nn.Module):
    """A causal language model of Mamba-2 blocks, with attention at config.attn_layer_idx.

    model(input_ids) -> logits (b, l, padded_vocab_size), in the weights' dtype. Parameters are
    named as in published checkpoints.
    """

    def __init__(self, config, device=None, dtype=None):
        super().__init__()
        made = dict(device=device, dtype=dtype)
        self.config = config
        self.backbone = Backbone(config, **made)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, **made)
        self.reset_parameters()
        self.tie_weights()

    def reset_parameters(self):
        """Embedding normal(0.02); what writes to the residual scaled by 1 / sqrt(writes)."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        writes = self.config.n_layer * (2 if self.config.d_intermediate else 1)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(writes)
            elif name.endswith(("in_proj.bias", "out_proj.bias")):
                nn.init.zeros_(parameter)

    def tie_weights(self):
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, input_ids, *, cache=None, pads=None, cu_seqlens=None, last_only=False):
        """Logits of the token after each token.

        input_ids   (b, l) int64
        cache       from allocate_cache: holds the tokens before these, and these afterwards
        pads        (b,) int64: tokens of padding at the start of each row. With a cache, given with
                    the first tokens, among which all padding must be, and remembered
        cu_seqlens  (nseq + 1,): sequences packed one after another in one row (b = 1)
        last_only   logits of each row's last token alone: (b, 1, padded_vocab_size)
        """
        tokens = self.describe(input_ids, cache, pads, cu_seqlens)
        if cache is not None and cache.seen == 0:
            self.begin(cache)
        hidden = self.backbone(input_ids, tokens, cache)
        if cache is not None:
            cache.first += tokens.l
            cache.seen += tokens.l
        if last_only:
            hidden = hidden[:, -1:]
        return self.lm_head(hidden)

    def loss(self, input_ids, targets, cu_seqlens=None):
        """The mean cross-entropy, in nats, of targets (b, l); a target of -100 does not count."""
        logits = self(input_ids, cu_seqlens=cu_seqlens)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def describe(self, input_ids, cache, pads, cu_seqlens):
        """The Tokens of a forward; refuses what no layer could do right."""
        b, l = input_ids.shape
        if cu_seqlens is not None and (cache is not None or pads is not None or b != 1):
            raise ValueError("cu_seqlens: needs one row, no cache and no pads")
        if cache is None:
            return Tokens(l, pads=pads, cu_seqlens=cu_seqlens)
        if cache.max_length is not None and cache.seen + l > cache.max_length:
            raise ValueError(f"cache: {cache.seen} + {l} tokens in room for {cache.max_length}")
        if pads is not None:
            if cache.seen:
                raise ValueError("pads: padding comes before all other tokens")
            cache.pads.copy_(pads)
            cache.padded = True
        return Tokens(l, cache.seen, cache.first, cache.pads if cache.padded else None)

    def begin(self, cache):
        """What a cache keeps of the weights is brought up to date with them."""
        pairs = zip(self.backbone.layers, cache.layers)
        pairs = [(layer.mixer, kept) for layer, kept in pairs if isinstance(kept, MixerCache)]
        if not pairs:
            return
        A = [kept.A for _, kept in pairs]  # all layers at once: they are many, and small
        with torch.no_grad():
            torch._foreach_copy_(A, [mixer.A_log for mixer, _ in pairs])
            torch._foreach_exp_(A)
            torch._foreach_neg_(A)

    def allocate_cache(self, batch, max_length=None, dtype=None, state_dtype=None):
        """An empty Cache. max_length is needed when there are attention layers."""
        weight = self.lm_head.weight
        mixers = [layer.mixer for layer in self.backbone.layers]
        return Cache(
            [mixer.allocate_cache(batch, max_length, dtype, state_dtype) for mixer in mixers],
            first=weight.new_zeros((), dtype=torch.int64),
            pads=weight.new_zeros(batch, dtype=torch.int64),
            max_length=max_length if self.config.attn_layer_idx else None,
        )
