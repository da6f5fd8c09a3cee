"""Modules and language model: the ways through them agree, and rows and sequences stay apart."""

import pytest
import torch

from mamba2_cuda.model import Mamba2LMHeadModel, ModelConfig
from mamba2_cuda.nn import Attention, Block, Mamba2, Tokens

F64 = torch.float64
HYBRID = dict(
    attn_layer_idx=(1,),
    attn_cfg=dict(num_heads=4, num_heads_kv=2, head_dim=6, rotary_emb_dim=4, d_conv=3),
)
OPTIONS = {
    "plain": {},
    "small heads": dict(ssm_cfg=dict(headdim=4)),  # in_proj's rows are whole vectors
    "groups": dict(ssm_cfg=dict(ngroups=2)),
    "narrow convolution": dict(ssm_cfg=dict(d_conv=2)),
    "three taps, not expanded": dict(ssm_cfg=dict(d_conv=3, expand=1)),
    "norm groups": dict(ssm_cfg=dict(norm_groups=4, ngroups=2)),
    "D a channel": dict(ssm_cfg=dict(D_has_hdim=True)),
    "no norm": dict(ssm_cfg=dict(rmsnorm=False)),
    "norm before gate": dict(ssm_cfg=dict(norm_before_gate=True, ngroups=2)),
    "biases": dict(ssm_cfg=dict(bias=True, conv_bias=False)),
    "dt limit": dict(ssm_cfg=dict(dt_limit=(0.01, 0.02))),
    "mlp": dict(d_intermediate=5),
    "untied": dict(tie_embeddings=False),
    "hybrid": HYBRID,
    "hybrid, no rotary, no convolution": dict(
        attn_layer_idx=(0, 1), attn_cfg=dict(num_heads=2, qkv_proj_bias=False)
    ),
}


def make_model(ssm_cfg=None, dtype=F64, **options):
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16, n_layer=2, vocab_size=29,
        ssm_cfg={"d_state": 8, "headdim": 8, **(ssm_cfg or {})}, **options,
    )  # fmt: skip
    model = Mamba2LMHeadModel(config, dtype=dtype)
    with torch.no_grad():  # weights that matter: initial ones leave much near 0 or 1
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def some_tokens(b, l, seed=1):
    return torch.randint(0, 29, (b, l), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, tokens, pieces, **first):
    """Logits of tokens (b, l) given to a cache in pieces of these lengths."""
    cache, logits, begin = model.allocate_cache(len(tokens), tokens.size(1)), [], 0
    for length in pieces:
        logits.append(model(tokens[:, begin : begin + length], cache=cache, **first))
        begin, first = begin + length, {}
    assert begin == cache.seen == cache.first.item() == tokens.size(1)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_prefill_and_steps_are_forward(options):
    model, tokens = make_model(**options), some_tokens(2, 12)
    whole = model(tokens)
    for pieces in ([7] + [1] * 5, [1] * 12, [5, 4, 1, 2], [12]):
        torch.testing.assert_close(in_pieces(model, tokens, pieces), whole)
    torch.testing.assert_close(model(tokens, last_only=True), whole[:, -1:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rmsnorm", [False, True])
@torch.no_grad()
def test_a_step_in_the_residual_is_a_step(rmsnorm, bias):
    mixer = make_model(ssm_cfg=dict(rmsnorm=rmsnorm, bias=bias)).backbone.layers[0].mixer
    block = Block(16, mixer, dtype=F64)
    caches = [mixer.allocate_cache(3) for _ in range(2)]
    for _ in range(3):
        residual = torch.randn(3, 16, dtype=F64)
        expected = block(residual[:, None], Tokens(1), caches[0])[:, 0]
        mixer.add_step(residual, block.norm, caches[1])
        torch.testing.assert_close(residual, expected)
        torch.testing.assert_close(caches[1].ssm, caches[0].ssm)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_a_step_projected_with_the_next_norm_is_a_step(options, monkeypatch):
    model, tokens, asked = make_model(**options), some_tokens(2, 12), []

    def has_a_norm(mixer, residual):
        asked.append(mixer.norm is not None)
        return asked[-1]

    whole = model(tokens)
    monkeypatch.setattr(Mamba2, "projects_with_next_norm", has_a_norm)
    torch.testing.assert_close(in_pieces(model, tokens, [7] + [1] * 5), whole)
    mixers = [b for b in model.backbone.layers if isinstance(b.mixer, Mamba2)]
    assert len(asked) == 5 * len(mixers)
    for block in mixers:  # as a module of its own
        caches = [block.mixer.allocate_cache(2) for _ in range(2)]
        u = torch.randn(2, 1, 16, dtype=F64)
        stepped = block(u, Tokens(1), caches[0])
        monkeypatch.setattr(Mamba2, "projects_with_next_norm", lambda *_: False)
        torch.testing.assert_close(stepped, block(u, Tokens(1), caches[1]))
        monkeypatch.setattr(Mamba2, "projects_with_next_norm", has_a_norm)


@pytest.mark.parametrize("options", [{}, HYBRID, dict(d_intermediate=5)])
@torch.no_grad()
def test_such_a_step_in_half_precision_is_near_fp64(options, monkeypatch):
    """There in_proj and the convolution are one operator too."""
    model, tokens = make_model(ssm_cfg=dict(headdim=4), **options), some_tokens(2, 12)
    exact, asked = model(tokens), []
    monkeypatch.setattr(Mamba2, "projects_with_next_norm", lambda *_: True)
    one = Mamba2.convolves_rows
    monkeypatch.setattr(Mamba2, "convolves_rows", lambda *a: asked.append(one(*a)) or asked[-1])
    logits = in_pieces(model.to(torch.bfloat16), tokens, [7] + [1] * 5)
    assert (logits.double() - exact).norm() < 0.03 * exact.norm()
    assert asked and all(asked)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cuda_is_the_cpu(options, cuda):
    model, tokens, targets = make_model(**options), some_tokens(2, 80), some_tokens(2, 80, seed=2)
    results = []
    for device in ("cpu", cuda):
        model.to(device)
        loss = model.loss(tokens.to(device), targets.to(device))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            stepped = in_pieces(model, tokens[:, :12].to(device), [7] + [1] * 5)
        results.append([v.cpu() for v in (loss, stepped, *gradients)])
    torch.testing.assert_close(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 70])  # decoding has kernels for few and for many
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_half_precision_on_cuda_is_near_fp64(options, rows, cuda):
    model, tokens = make_model(**options), some_tokens(rows, 80)
    exact = model(tokens)
    model.to(cuda, torch.bfloat16)
    for logits in (model(tokens.to(cuda)), in_pieces(model, tokens.to(cuda), [70] + [1] * 10)):
        assert (logits.cpu().double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["mamba2", "hybrid"])
@torch.no_grad()
def test_a_cache_that_is_reset_is_empty(options):
    model, tokens = make_model(**options), some_tokens(2, 6)
    cache = model.allocate_cache(2, 6)
    model(some_tokens(2, 6, seed=2), cache=cache, pads=torch.tensor([0, 2]))
    cache.reset()
    torch.testing.assert_close(model(tokens, cache=cache), model(tokens))


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["mamba2", "hybrid"])
def test_packed_sequences_are_what_they_are_alone(options):
    model, lengths = make_model(**options), [3, 0, 1, 5, 2]
    tokens, cu = some_tokens(1, 11), torch.tensor([0, 3, 3, 4, 9, 11])
    packed = model(tokens, cu_seqlens=cu)
    assert torch.equal(model(tokens, cu_seqlens=cu.int()), packed)
    alone = [model(part) for part in tokens.split(lengths, 1) if part.numel()]
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    other = tokens.clone()
    other[:, 4:9] = some_tokens(1, 5, seed=3)
    changed = (model(other, cu_seqlens=cu) != packed).any(-1)[0]
    assert not changed[:4].any() and not changed[9:].any() and changed[4:9].any()


def test_packed_sequences_train_as_alone():
    model, tokens, targets = make_model(**HYBRID), some_tokens(1, 9), some_tokens(1, 9, seed=2)
    cu = torch.tensor([0, 4, 9])
    packed = torch.autograd.grad(model.loss(tokens, targets, cu), list(model.parameters()))
    parts = zip(tokens.split([4, 5], 1), targets.split([4, 5], 1), (4, 5))
    loss = sum(model.loss(part, target) * n / 9 for part, target, n in parts)
    alone = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize(
    "options", [{}, HYBRID, OPTIONS["dt limit"], OPTIONS["no norm"]], ids=lambda o: str(list(o))
)
@torch.no_grad()
def test_left_padding_changes_nothing(options):
    model, tokens, pads = make_model(**options), some_tokens(3, 9), torch.tensor([0, 4, 6])
    whole = model(tokens, pads=pads)
    ways = [in_pieces(model, tokens, pieces, pads=pads) for pieces in ([7, 1, 1], [6, 2, 1])]
    for row, pad in enumerate(pads.tolist()):
        alone = model(tokens[row : row + 1, pad:])[0]
        for logits in (whole, *ways):
            torch.testing.assert_close(logits[row, pad:], alone)


def test_activation_checkpointing_changes_no_bit():
    model, tokens, targets = make_model(**HYBRID), some_tokens(2, 9), some_tokens(2, 9, seed=2)
    results = []
    for checkpointing in (False, True):
        model.backbone.activation_checkpointing = checkpointing
        loss = model.loss(tokens, targets)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(residual_in_fp32=False), OPTIONS["mlp"], HYBRID],
    ids=["plain", "residual in bf16", "mlp", "hybrid"],
)  # fmt: skip
def test_logits_are_the_same_bits_without_gradients(options, autocast):
    """The residual is summed and normed in place then."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model, tokens = make_model(dtype=dtype, **options), some_tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(tokens)
        with torch.no_grad():
            assert torch.equal(model(tokens), logits)
    assert logits.requires_grad and logits.dtype == torch.bfloat16


def test_a_half_precision_model_keeps_its_residual_in_fp32():
    model = make_model(dtype=torch.bfloat16)
    assert model(some_tokens(1, 5)).dtype == torch.bfloat16
    residual = model.backbone.layers[0](torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert residual.dtype == torch.float32


def test_autocast_keeps_the_weights_and_gives_their_gradients():
    model, tokens = make_model(dtype=torch.float32), some_tokens(2, 9)
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        loss = model.loss(tokens, tokens)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_attention_is_its_equation():
    """Heads one by one; rotation as a product of complex numbers, dim i with dim i + 2."""
    torch.manual_seed(0)
    options = dict(num_heads=4, num_heads_kv=2, head_dim=6, rotary_emb_dim=4, rotary_emb_base=50.0)
    layer, u = Attention(16, **options, dtype=F64), torch.randn(1, 7, 16, dtype=F64)
    q, k, v = layer.in_proj(u)[0].unflatten(-1, (8, 6)).split([4, 2, 2], 1)
    angle = torch.arange(7.0)[:, None] * torch.tensor([1.0, 50.0**-0.5])

    def rotate(head):
        turned = torch.complex(head[:, :2], head[:, 2:4]) * torch.polar(torch.ones(7, 2), angle)
        return torch.cat([turned.real, turned.imag, head[:, 4:]], 1)

    heads = []
    for i in range(4):
        scores = rotate(q[:, i]) @ rotate(k[:, i // 2]).T / 6**0.5
        seen = torch.ones(7, 7).tril().bool()
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, i // 2])
    expected = layer.out_proj(torch.cat(heads, 1))
    torch.testing.assert_close(layer(u)[0], expected, rtol=1e-6, atol=1e-6)


def test_initial_values_are_the_papers():
    torch.manual_seed(0)
    mixer = Mamba2(256, headdim=1)
    A, dt = mixer.A(), torch.nn.functional.softplus(mixer.dt_bias)
    assert A.max() <= -1 and A.min() >= -16 and A.min() < -15 and A.max() > -2
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert 0.007 < dt.median() < 0.014, "log-uniform: the median is the geometric mean, 0.01"
    assert (mixer.D == 1).all()


def test_refusals_name_what_is_wrong():
    model, tokens = make_model(**HYBRID), some_tokens(2, 4)
    cache = model.allocate_cache(2, 5)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="4 \\+ 4 tokens in room for 5"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="padding comes before"):
        model(tokens[:, :1], cache=cache, pads=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs one row"):
        model(tokens, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="ngroups"):
        Mamba2(16, headdim=8, ngroups=3)
    with pytest.raises(ValueError, match="max_length"):
        model.allocate_cache(2)


def test_config_survives_its_json_and_refuses_what_it_does_not_know():
    config = ModelConfig(16, 2, 29, **HYBRID, ssm_cfg=dict(ngroups=2))
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.padded_vocab_size == 32
    with pytest.raises(ValueError, match="unknown keys \\['d_stat'\\]"):
        ModelConfig(16, 2, 29, ssm_cfg=dict(d_stat=8))
    with pytest.raises(ValueError, match="layer must be 'Mamba2'"):
        ModelConfig.from_dict({"d_model": 16, "n_layer": 2, "vocab_size": 29})
