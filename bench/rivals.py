"""What ssd_scan is measured beside. Each rival is a function(shape) -> Calls, or is not there.

ours        mamba2_cuda.ssd_scan; mamba2_cuda_sm80 is its portable path (tier sm80), forced
mamba_ssm   the Triton kernels of state-spaces/mamba, from an unpacked sdist
sdpa_flash, sdpa_cudnn   PyTorch's attention, in a model of the same width
"""

import importlib
import os
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.shapes import inputs

MAMBA_SSM_CHUNK = 256
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Implementation:
    name: str
    version: str
    op: str  # "ssd" or "attention"
    prepare: object  # (shape, requires_grad) -> (call that gives y, the tensors to differentiate)


def implementations(names, mamba_ssm_folder=None):
    """Those of `names` that are installed here, and why the others are not, as two lists."""
    makers = {
        "mamba2_cuda": ours,
        "mamba2_cuda_sm80": lambda: ours("mamba2_cuda_sm80", tier=2),
        "mamba_ssm": lambda: mamba_ssm(mamba_ssm_folder),
        "sdpa_flash": lambda: attention("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": lambda: attention("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    }
    found, missing = [], []
    for name in names:
        try:
            found.append(makers[name]())
        except ImportError as cause:
            missing.append(f"{name}: {cause}")
    return found, missing


def ours(name="mamba2_cuda", tier=0):
    import mamba2_cuda
    from mamba2_cuda.ops.plan import force_plan

    def prepare(shape, requires_grad):
        arguments, options = inputs(shape, torch.bfloat16, "cuda", requires_grad)

        def call():
            with force_plan(tier):
                return mamba2_cuda.ssd_scan(*arguments, **options, dt_softplus=True)

        return call, (*arguments, *options.values())

    return Implementation(name, mamba2_cuda.__version__, "ssd", prepare)


def mamba_ssm(folder):
    version = install_mamba_ssm(folder)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def prepare(shape, requires_grad):
        arguments, options = inputs(shape, torch.bfloat16, "cuda", requires_grad)

        def call():
            return mamba_chunk_scan_combined(
                *arguments, chunk_size=MAMBA_SSM_CHUNK, **options, dt_softplus=True
            )

        return call, (*arguments, *options.values())

    return Implementation("mamba_ssm", version, "ssd", prepare)


def install_mamba_ssm(folder=None):
    """Makes mamba_ssm.ops.triton importable from an unpacked sdist; returns its version.

    Its own __init__ imports a compiled module that the Triton kernels do not need, so bare
    packages with the right path stand in for it.
    """
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # tuned once for all runs of a machine
    folder = folder or os.environ.get("MAMBA_SSM") or next(
        (str(p) for p in sorted(ROOT.glob("third_party/mamba_ssm*"))), None
    )  # fmt: skip
    package = Path(folder or "") / "mamba_ssm"
    if folder is None or not (package / "ops/triton/ssd_combined.py").exists():
        raise ImportError(f"no mamba_ssm sdist in {folder or 'third_party/'}")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(package.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    importlib.invalidate_caches()
    compile_at_once()
    return re.search(r'__version__ = "(.+)"', (package / "__init__.py").read_text())[1]


def compile_at_once():
    """All cores compile the variants of a kernel before Triton's tuner times them one by one, which
    changes nothing but how long tuning takes."""
    import triton
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs  # what the tuner asks for its variants

    def compiled(tuner, options):
        variants = prune(tuner, options)
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for variant in variants:
                of_variant = {**options, **variant.all_kwargs(), "warmup": True}
                tuner.fn.run(*tuner.nargs.values(), **of_variant)
        return variants

    if hasattr(triton, "AsyncCompileMode") and prune.__name__ != compiled.__name__:
        Autotuner.prune_configs = compiled


def attention(name, backend):
    def prepare(shape, requires_grad):
        size = (shape.b, shape.attention_heads, shape.l, 128)
        q, k, v = (
            torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad)
            for _ in range(3)
        )

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call, (q, k, v)

    return Implementation(name, f"torch {torch.__version__}", "attention", prepare)
