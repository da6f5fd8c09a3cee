"""Two runs that differ in convolution, scan and norm: the kernels, and plain PyTorch.

  python -m examples.loss_curves [--steps 200] [--out out/loss_curves]

A byte-level language model on the sources of Python's standard library; weights, batches and recipe
are the same. The two losses must agree at every step within --tolerance nats: rounding differs, and
training amplifies it, the more the higher the --rate. Leaves loss_curves.jsonl and loss_curves.png;
the exit status is 1 when a step is further off.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch

from examples.byte_lm.corpus import standard_library
from mamba2_cuda import reference
from mamba2_cuda.model import Mamba2LMHeadModel, ModelConfig
from mamba2_cuda.nn import functional
from mamba2_cuda.training import Recipe, Trainer, Windows


def main(arguments=None):
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    training, held_out = standard_library()
    curves = {}
    layers = {"kernels": functional.conv_scan_norm, "reference": plain_conv_scan_norm}
    for name, layer in layers.items():
        trainer = make_trainer(options, training, held_out)
        with mock.patch.object(functional, "conv_scan_norm", layer):
            curves[name] = [trainer.train_step()["loss"] for _ in range(options.steps)]
        print(f"{name}: loss {curves[name][0]:.4f} at first, {curves[name][-1]:.4f} at last")
    return present(curves, options)


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m examples.loss_curves", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (1e-3)")
    parser.add_argument("--tolerance", type=float, default=0.005, help="nats (0.005)")
    parser.add_argument("--out", type=Path, default=Path("out/loss_curves"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    return parser.parse_args(arguments)


def plain_conv_scan_norm(
    zxBCdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, cu_seqlens, options, cache
):
    """nn.functional.conv_scan_norm out of reference/, in fp32 whatever autocast would make of it,
    rounded between the three operators as the kernels' results are."""
    assert cu_seqlens is cache is None
    layout = options.layout
    with torch.autocast(zxBCdt.device.type, enabled=False):
        z, xBC, dt = layout.split(zxBCdt)
        x, B, C = layout.split_conv(reference.causal_conv1d(xBC, conv_weight[:, 0], conv_bias))
        y = reference.ssd_scan(
            x, dt, -A_log.exp(), B, C, D=D, dt_bias=dt_bias, dt_softplus=True,
            dt_limit=options.dt_limit,
        )  # fmt: skip
        return reference.gated_rmsnorm(
            y.flatten(-2), norm_weight, z, eps=options.eps, group_size=options.group_size,
            norm_before_gate=options.norm_before_gate,
        )  # fmt: skip


def make_trainer(options, training, held_out):
    torch.manual_seed(0)
    config = ModelConfig(
        options.d_model, options.layers, 256, ssm_cfg=dict(d_state=64, headdim=64, ngroups=1)
    )
    model = Mamba2LMHeadModel(config, device=options.device)
    recipe = Recipe(
        options.steps, options.batch, options.length, rate=options.rate, bf16=not options.fp32
    )
    windows = Windows(training, options.length), Windows(held_out, options.length)
    return Trainer(model, recipe, *windows, options.out)


def present(curves, options):
    pairs = list(zip(curves["kernels"], curves["reference"]))
    with (options.out / "loss_curves.jsonl").open("w") as file:
        for step, (kernels, plain) in enumerate(pairs, 1):
            file.write(json.dumps({"step": step, "kernels": kernels, "reference": plain}) + "\n")
    plot(curves, options.out / "loss_curves.png")
    apart = [abs(kernels - plain) for kernels, plain in pairs]
    furthest = max(range(len(apart)), key=apart.__getitem__)
    agree = apart[furthest] <= options.tolerance  # False for NaN
    print(
        f"furthest apart at step {furthest + 1}: {apart[furthest]:.2e} nats, mean "
        f"{sum(apart) / len(apart):.2e}; {'within' if agree else 'BEYOND'} {options.tolerance}"
    )
    return 0 if agree else 1


def plot(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, losses), style in zip(curves.items(), ("-", "--")):
        axes.plot(range(1, len(losses) + 1), losses, style, linewidth=1, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Kernels and plain PyTorch")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
