"""Checkpoints: both formats, both containers, both directions; refusals; logits of transformers."""

import json
import pickle

import pytest
import torch

from mamba2_cuda.model import (
    CheckpointError,
    Mamba2LMHeadModel,
    ModelConfig,
    load_model,
    save_model,
)
from mamba2_cuda.model.checkpoint import EMBEDDING, HEAD

pytest.importorskip("safetensors", reason="safetensors is not installed")


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def make_model(**options):
    torch.manual_seed(0)
    ssm_cfg = {"d_state": 8, "headdim": 8, "ngroups": 2} | options.pop("ssm_cfg", {})
    options = dict(d_model=16, n_layer=2, vocab_size=29, ssm_cfg=ssm_cfg) | options
    model = Mamba2LMHeadModel(ModelConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def logits(model, length=21):
    tokens = torch.randint(0, 29, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model.eval()(tokens)
    return getattr(out, "logits", out)


def agree(ours, theirs):
    """Within 1e-4 of the logits' range."""
    spread = theirs.max() - theirs.min()
    assert spread > 1 and (ours - theirs).abs().max() < 1e-4 * spread


@pytest.mark.parametrize("format", ["state-spaces", "huggingface"])
@pytest.mark.parametrize("container", ["safetensors", "pickle"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_read(tmp_path, format, container, tied):
    model = make_model(tie_embeddings=tied)
    save_model(model, tmp_path, format, container)
    again = load_model(tmp_path, vocab_size=29)
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.backbone.embedding.weight) == tied
    assert again.config.padded_vocab_size == 32 and again.config.vocab_size == 29
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("container", ["safetensors", "pickle"])
def test_a_folder_holds_the_model_written_last(tmp_path, container):
    """Not weights of another, in a file that a reader looks for first."""
    first, last = make_model(), make_model()
    with torch.no_grad():
        last.backbone.norm_f.weight += 1
    for other in ("safetensors", "pickle"):
        save_model(first, tmp_path, container=other)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-0"}}')
    save_model(last, tmp_path, container=container)
    assert torch.equal(logits(load_model(tmp_path)), logits(last))
    assert len(list(tmp_path.iterdir())) == 2, "config.json and the weights"


def test_hybrids_and_variants_keep_their_shape(tmp_path):
    model = make_model(
        attn_layer_idx=(1,), attn_cfg=dict(num_heads=2, rotary_emb_dim=4, d_conv=4),
        d_intermediate=100, ssm_cfg=dict(D_has_hdim=True, rmsnorm=False, dt_limit=(0.0, 0.05)),
    )  # fmt: skip
    save_model(model, tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    with pytest.raises(ValueError, match="no attention layers and no MLP"):
        save_model(model, tmp_path, "huggingface")


PUBLISHED = {
    "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}  # fmt: skip


def test_names_and_shapes_of_a_published_model():
    """mamba2-2.7b: 579 tensors, of which the head is the embedding; 2,702,599,680 parameters."""
    model = Mamba2LMHeadModel(ModelConfig.from_dict(PUBLISHED), device="meta")
    weights = model.state_dict()
    assert len(weights) == 579
    assert sum(p.numel() for p in model.parameters()) == 2_702_599_680
    assert weights[EMBEDDING].shape == (50288, 2560)
    mixer = {k.split("63.mixer.")[1]: tuple(v.shape) for k, v in weights.items() if "63.mixer" in k}
    assert mixer == {
        "in_proj.weight": (10576, 2560), "conv1d.weight": (5376, 1, 4), "conv1d.bias": (5376,),
        "dt_bias": (80,), "A_log": (80,), "D": (80,), "norm.weight": (5120,),
        "out_proj.weight": (2560, 5120),
    }  # fmt: skip


def test_names_and_shapes_of_a_published_hybrid():
    """mamba2attn-2.7b: attention at six layers, 30 heads of 128, behind a convolution."""
    hybrid = {
        "attn_layer_idx": [9, 18, 27, 36, 45, 56],
        "attn_cfg": {
            "causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30,
            "out_proj_bias": False, "qkv_proj_bias": False, "rotary_emb_dim": 64,
        },
    }  # fmt: skip
    model = Mamba2LMHeadModel(ModelConfig.from_dict(PUBLISHED | hybrid), device="meta")
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for i in range(64):
        mixer = {k.split("mixer.")[1]: v for k, v in shapes.items() if f"layers.{i}.mixer." in k}
        if i in hybrid["attn_layer_idx"]:
            assert mixer == {
                "in_proj.weight": (11520, 2560), "conv1d.weight": (11520, 1, 4),
                "conv1d.bias": (11520,), "out_proj.weight": (2560, 3840),
            }  # fmt: skip
        else:
            assert "A_log" in mixer and mixer["in_proj.weight"] == (10576, 2560)


@pytest.mark.parametrize("container", ["safetensors", "pickle"])
def test_shards_are_put_together(tmp_path, container):
    model = make_model()
    save_model(model, tmp_path, container=container)
    whole = next(tmp_path.glob("*model.*"))
    weights = dict(model.state_dict())
    del weights[HEAD]
    names, place = sorted(weights), {}
    for i, part in enumerate((names[:5], names[5:])):
        shard = tmp_path / f"part-{i}{whole.suffix}"
        tensors = {name: weights[name].clone() for name in part}
        if container == "pickle":
            torch.save(tensors, shard)
        else:
            from safetensors.torch import save_file

            save_file(tensors, shard)
        place |= {name: shard.name for name in part}
    whole.unlink()
    index = tmp_path / f"{whole.name}.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_model(tmp_path)


def rewrite(folder, change):
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def test_all_that_does_not_fit_is_reported_at_once(tmp_path):
    save_model(make_model(), tmp_path, container="pickle")

    def change(weights):
        weights["backbone.layers.2.norm.weight"] = weights.pop("backbone.layers.1.norm.weight")
        weights["backbone.norm_f.weight"] = torch.ones(17)

    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert "missing: backbone.layers.1.norm.weight\n" in str(caught.value)
    assert "unexpected: backbone.layers.2.norm.weight\n" in str(caught.value)
    assert "shape of backbone.norm_f.weight: must be (16,), is (17,)" in str(caught.value)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    save_model(make_model(), tmp_path, container="pickle")
    rewrite(tmp_path, lambda weights: weights.update({HEAD: weights[HEAD] + 1}))
    with pytest.raises(CheckpointError, match="config.json ties them"):
        load_model(tmp_path)


def test_a_vocabulary_without_its_padding_is_padded(tmp_path):
    model = make_model()
    save_model(model, tmp_path, container="pickle")
    rewrite(tmp_path, lambda w: w.update({name: w[name][:29] for name in (EMBEDDING, HEAD)}))
    assert torch.equal(logits(load_model(tmp_path))[..., :29], logits(model)[..., :29])


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint ran')",)


def test_no_code_of_a_file_is_run(tmp_path):
    save_model(make_model(), tmp_path, container="pickle")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harmful()}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize("container", ["safetensors", "pickle"])
def test_a_damaged_file_is_refused(tmp_path, container):
    save_model(make_model(), tmp_path, container=container)
    path = next(tmp_path.glob("*model.*"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{path.name}: cannot be read"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors and no pytorch_model.bin"):
        load_model(tmp_path)


HUGGINGFACE = dict(
    num_heads=4, head_dim=8, hidden_size=16, state_size=8, num_hidden_layers=2, vocab_size=32,
    expand=2, chunk_size=16,
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        dict(n_groups=1, tie_word_embeddings=True),
        dict(n_groups=2, use_bias=True, use_conv_bias=False),
        dict(n_groups=4, time_step_limit=(0.01, 0.05), layer_norm_epsilon=1e-2),
    ],
    ids=lambda o: f"groups {o['n_groups']}",
)
def test_logits_of_transformers_own_model(tmp_path, options):
    hf = transformers()
    torch.manual_seed(0)
    theirs = hf.Mamba2ForCausalLM(hf.Mamba2Config(**HUGGINGFACE, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    agree(logits(load_model(tmp_path)), logits(theirs))


@pytest.mark.parametrize("ngroups", [1, 2])
def test_transformers_reads_what_we_convert(tmp_path, ngroups):
    """state-spaces format -> ours -> Hugging Face format -> transformers -> ours."""
    hf, model = transformers(), make_model(ssm_cfg=dict(ngroups=ngroups))
    save_model(model, tmp_path / "a", "state-spaces", "pickle")
    save_model(load_model(tmp_path / "a"), tmp_path / "b", "huggingface")
    theirs, report = hf.Mamba2ForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    agree(logits(model), logits(theirs))
    theirs.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(load_model(tmp_path / "c")), logits(model))
