"""The comparison of loss curves sees agreement, and sees a wrong operator."""

import json

import pytest
import torch

from examples import loss_curves
from mamba2_cuda import reference

REAL_TEXT = loss_curves.standard_library
COMMAND = "--steps 4 --batch 2 --length 32 --d-model 32 --layers 1 --device cpu".split()


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    text = torch.frombuffer(bytearray(b"def f(x):\n    return x\n" * 50), dtype=torch.uint8)
    monkeypatch.setattr(loss_curves, "standard_library", lambda: (text, text))


@pytest.mark.parametrize("precision, close", [(["--fp32"], 1e-4), ([], 0.02)], ids=["fp32", "bf16"])
def test_the_kernels_train_as_the_reference(tmp_path, precision, close):
    command = [*COMMAND, *precision, "--tolerance", str(close), "--out", str(tmp_path)]
    assert loss_curves.main(command) == 0
    lines = (tmp_path / "loss_curves.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (tmp_path / "loss_curves.png").stat().st_size > 0


@pytest.mark.gpu
def test_two_hundred_steps_on_cuda(tmp_path, cuda, monkeypatch):
    """As the README has it: real text, bf16, the default sizes and tolerance."""
    monkeypatch.setattr(loss_curves, "standard_library", REAL_TEXT)
    assert loss_curves.main(["--device", cuda, "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "loss_curves.jsonl").read_text().splitlines()
    losses = [json.loads(line)["kernels"] for line in lines]
    assert len(losses) == 200 and losses[-1] < 0.5 * losses[0]


def test_a_wrong_operator_is_seen(tmp_path, monkeypatch):
    def backwards_in_time(x, *others, **options):
        return right(x.flip(1), *others, **options)

    right = reference.ssd_scan
    monkeypatch.setattr(reference, "ssd_scan", backwards_in_time)
    command = [*COMMAND, "--fp32", "--tolerance", "1e-4", "--out", str(tmp_path)]
    assert loss_curves.main(command) == 1
