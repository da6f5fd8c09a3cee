"""The models that bench.model measures: ours, and mamba_ssm's, behind one face.

A maker has mixer(), model(dtype), loss(model, inputs, targets) and generate(model, batch, state).
mamba_ssm wants the package causal_conv1d. Where that is not installed our own operator stands in
for it, which is faster, and the row's version says so.
"""

import importlib.util
import sys
import types

import torch
import torch.nn.functional as F

from bench.rivals import install_mamba_ssm
from mamba2_cuda import __version__
from mamba2_cuda.model import Decoder, Mamba2LMHeadModel, ModelConfig, Sampling
from mamba2_cuda.nn import Mamba2
from mamba2_cuda.ops import causal_conv1d, causal_conv1d_step

SIZES = dict(d_model=768, n_layer=24, vocab_size=50277, pad_vocab_size_multiple=16)  # 130M
WIDTH = 2560  # of the 2.7B model


class Ours:
    name, version = "mamba2_cuda", __version__

    def mixer(self):
        return Mamba2(WIDTH, device="cuda", dtype=torch.bfloat16)

    def model(self, dtype=torch.float32):
        return Mamba2LMHeadModel(ModelConfig(**SIZES), device="cuda", dtype=dtype)

    def loss(self, model, inputs, targets):
        return model.loss(inputs, targets)

    def generate(self, model, prompts, new, state_dtype):
        """A function that generates: prompts (b, l) -> the new tokens, on the host."""
        b, l = prompts.shape
        decoder = Decoder(
            model, b, l + new, sampling=Sampling(temperature=0), state_dtype=state_dtype
        )
        rows = prompts.tolist()
        return lambda: decoder.generate(rows, new)


class MambaSsm:
    name = "mamba_ssm"

    def __init__(self, folder=None):
        self.version = install_mamba_ssm(folder)
        for name in ("modules", "models", "distributed"):  # of packages that hold nothing else
            package = types.ModuleType(f"mamba_ssm.{name}")
            package.__path__ = [f"{sys.modules['mamba_ssm'].__path__[0]}/{name}"]
            sys.modules[package.__name__] = package
        # The compiled scan of Mamba-1, imported and not used.
        sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
        stand_in_for_hubs()
        if importlib.util.find_spec("causal_conv1d") is None:
            stand_in_for_causal_conv1d()
            self.version += " + mamba2_cuda's causal_conv1d"
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        from mamba_ssm.modules import mamba2

        self.parts = mamba2.Mamba2, MambaLMHeadModel, MambaConfig

    def mixer(self):
        return self.parts[0](WIDTH, device="cuda", dtype=torch.bfloat16)

    def model(self, dtype=torch.float32):
        _, model, config = self.parts
        return model(config(**SIZES, ssm_cfg={"layer": "Mamba2"}), device="cuda", dtype=dtype)

    def loss(self, model, inputs, targets):
        logits = model(inputs).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def generate(self, model, prompts, new, state_dtype):
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError("mamba_ssm: the state has the weights' dtype")
        l = prompts.size(1)
        prompts = prompts.cuda()
        return lambda: model.generate(prompts, l + new, top_k=1, cg=True)[:, l:].cpu()


MAKERS = {"mamba2_cuda": lambda folder: Ours(), "mamba_ssm": MambaSsm}


def stand_in_for_hubs():
    """What mamba_ssm imports of transformers and huggingface_hub, where they are not installed:
    names for files that nothing here loads, and a record of what was generated."""
    if importlib.util.find_spec("huggingface_hub") is None:
        make_module("huggingface_hub", PyTorchModelHubMixin=type("PyTorchModelHubMixin", (), {}))
    if importlib.util.find_spec("transformers") is None:
        make_module("transformers")
        record = dict(GenerateDecoderOnlyOutput=types.SimpleNamespace, TextStreamer=object)
        make_module("transformers.generation", **record)
        make_module("transformers.utils", WEIGHTS_NAME="", CONFIG_NAME="")
        make_module("transformers.utils.hub", cached_file=None)


def make_module(name, **contents):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module


def stand_in_for_causal_conv1d():
    """A package causal_conv1d whose functions, over (b, d, l), are ours, over (b, l, d)."""
    ops = torch.ops.mamba2_cuda

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        assert seq_idx is None
        y = causal_conv1d(x.transpose(1, 2), weight, bias, silu=activation is not None)
        return y.transpose(1, 2)

    def forward(x, weight, bias, seq_idx, initial_states, final_states, silu):
        assert seq_idx is initial_states is final_states is None
        x = x.transpose(1, 2)
        y, _ = ops.causal_conv1d_forward(x, weight, bias, None, None, silu, False)
        return y.transpose(1, 2)

    def backward(
        x, weight, bias, dy, seq_idx, initial_states, d_final_states, dx, return_d_initial, silu
    ):
        assert seq_idx is initial_states is d_final_states is None and not return_d_initial
        x, dy, dx = (v.transpose(1, 2) for v in (x, dy, dx))
        _, d_weight, d_bias, _ = ops.causal_conv1d_backward(
            dy, None, x, weight, bias, None, None, silu, dx
        )
        return dx.transpose(1, 2), d_weight, d_bias, None

    def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
        # Theirs holds d_conv inputs, the oldest of which nothing reads.
        state = conv_state.transpose(1, 2)[:, 1:]
        return causal_conv1d_step(state, x, weight, bias, silu=activation is not None)

    make_module(
        "causal_conv1d",
        causal_conv1d_fn=causal_conv1d_fn,
        causal_conv1d_update=causal_conv1d_update,
    )
    make_module(
        "causal_conv1d.cpp_functions",
        causal_conv1d_fwd_function=forward,
        causal_conv1d_bwd_function=backward,
        causal_conv1d_update_function=causal_conv1d_update,
    )
