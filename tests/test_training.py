"""Training: data, recipe, learning, and runs that are killed and go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mamba2_cuda.model import CheckpointError, Mamba2LMHeadModel, ModelConfig
from mamba2_cuda.tokenizer import ByteTokenizer, TextStream
from mamba2_cuda.training import (
    Recipe,
    Trainer,
    Windows,
    newest_state,
    open_tokens,
    parameter_groups,
    save_state,
    split,
    tokenize,
)
from mamba2_cuda.training.events import EventFile, checksum, crc32c
from mamba2_cuda.training.run_state import load_state, states

pytest.importorskip("safetensors", reason="safetensors is not installed")
TEXT = "the quick brown fox jumps over the lazy dog; " * 40
RECIPE = dict(steps=12, batch=4, length=16, rate=1e-2, validate_every=5, save_every=4)


def make_trainer(out, device="cpu", **changes):
    torch.manual_seed(0)
    recipe = Recipe(**{**RECIPE, **changes})
    config = ModelConfig(16, 2, 257, ssm_cfg=dict(d_state=8, headdim=8))
    tokens = torch.tensor(ByteTokenizer().encode(TEXT))
    training, held_out = split(tokens, 0.1)
    windows = Windows(training, recipe.length, recipe.seed), Windows(held_out, recipe.length)
    return Trainer(Mamba2LMHeadModel(config).to(device), recipe, *windows, out)


def weights(trainer):
    return {name: w.clone() for name, w in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- data


def test_texts_become_a_file_of_tokens(tmp_path):
    texts = ["naïve ", "", "te\r\nxt"]
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, text in zip(paths, texts):
        path.write_bytes(text.encode())
    dtype = tokenize(paths, ByteTokenizer(), tmp_path / "tokens.bin")
    tokens = open_tokens(tmp_path / "tokens.bin", dtype).tolist()
    assert tokens == [*"naïve ".encode(), 256, 256, *b"te\r\nxt", 256]
    (tmp_path / "empty.bin").touch()
    with pytest.raises(ValueError, match="holds no tokens"):
        open_tokens(tmp_path / "empty.bin")


def test_an_epoch_is_every_window_once_and_orders_differ():
    windows = Windows(torch.arange(103), 10, seed=3)
    epochs = []
    for epoch in range(3):
        inputs, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(targets, inputs + 1)
        seen = inputs.flatten()
        assert len(seen.unique()) == len(seen) >= 90
        epochs.append(inputs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    again = Windows(torch.arange(103), 10, seed=3)
    assert torch.equal(again.batch(12, 15)[0], torch.cat(epochs)[12:27])
    with pytest.raises(ValueError, match="10 tokens are too few for windows of 10"):
        Windows(torch.arange(10), 10)


def test_bytes_stream_as_whole_characters():
    stream = TextStream(ByteTokenizer())
    pieces = [stream.add(token) for token in "aé€".encode()]
    assert pieces == ["a", "", "é", "", "", "€"]
    stream.add("é".encode()[0])
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"


# ---- recipe


def test_the_rate_warms_up_and_falls_as_a_cosine():
    recipe = Recipe(steps=100, batch=1, length=1, rate=1.0, min_rate=0.1, warmup=0.1)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and rates[9] == max(rates) == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_only_matrices_decay(tmp_path):
    model = make_trainer(tmp_path).model
    decaying, others = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)].rsplit("mixer.")[-1] for p in decaying["params"]}
    assert kinds == {
        "backbone.embedding.weight", "in_proj.weight", "conv1d.weight", "out_proj.weight",
    }  # fmt: skip
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    kinds = {names[id(p)].rsplit("mixer.")[-1] for p in others["params"]}
    assert {"A_log", "D", "dt_bias", "norm.weight", "conv1d.bias"} <= kinds


def test_accumulated_and_checkpointed_steps_are_the_whole_batchs(tmp_path):
    exact = dict(bf16=False, steps=3)
    whole, parts, slim = (
        make_trainer(tmp_path / name, **exact, **options)
        for name, options in {
            "a": {}, "b": dict(accumulate=2), "c": dict(activation_checkpointing=True),
        }.items()
    )  # fmt: skip
    lines = [[trainer.train_step() for _ in range(3)] for trainer in (whole, parts, slim)]
    for a, b in zip(lines[0], lines[1]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert [line["loss"] for line in lines[2]] == [line["loss"] for line in lines[0]]
    assert same(weights(slim), weights(whole))


# ---- runs


def test_a_run_learns_and_leaves_what_it_says(tmp_path):
    log = make_trainer(tmp_path, steps=60, save_every=50).run()
    steps, losses = log.column("loss")
    assert steps == list(range(1, 61))
    assert losses[0] > 5 and losses[-1] < 2.8, "ln 257 = 5.5 is chance; letters alone give 2.9"
    assert log.column("held_out_loss")[0] == list(range(5, 61, 5))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == log.lines
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert len(records(events)) == 61
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-000000050.pt", "step-000000060.pt"}
    assert (tmp_path / "model/model.safetensors").exists()


def records(path):
    """The payloads of a file of length-checked records, their checksums compared."""
    content, found = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        data = content[12 : 12 + size]
        assert content[8:12] == checksum(content[:8])
        assert content[12 + size : 16 + size] == checksum(data)
        found.append(data)
        content = content[16 + size :]
    return found


def test_events_are_as_tensorboard_reads_them(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283, "the check value of CRC-32C"
    file = EventFile(tmp_path)
    file.add(300, {"loss": 1.5})
    version, scalar = records(file.path)
    assert version[9:] == b"\x10\x00\x1a\x0dbrain.Event:2"
    assert scalar[0] == 0x09, "field 1, a double: the time"
    # step 300; a summary of 13 bytes; a value of 11: the tag, and 1.5 as a float
    assert scalar[9:] == b"\x10\xac\x02\x2a\x0d\x0a\x0b\x0a\x04loss\x15" + b"\x00\x00\xc0\x3f"


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    stopped = make_trainer(tmp_path / "parts")
    while stopped.step < 8:
        stopped.train_step()
    save_state(tmp_path / "parts/checkpoints", 8, stopped.state())
    resumed = make_trainer(tmp_path / "parts")
    torch.manual_seed(99)
    resumed.run(resume=True)
    assert same(weights(resumed), weights(whole))
    changed = make_trainer(tmp_path / "parts", rate=0.5)
    with pytest.raises(ValueError, match="had another rate"):
        changed.run(resume=True)


@pytest.mark.gpu
def test_a_run_on_cuda_goes_on_bit_for_bit(tmp_path, cuda):
    whole, parts = (make_trainer(tmp_path / name, cuda) for name in "ab")
    whole.run()
    while parts.step < 8:
        parts.train_step()
    save_state(tmp_path / "b/checkpoints", 8, parts.state())
    resumed = make_trainer(tmp_path / "b", cuda)
    resumed.run(resume=True)
    assert same(weights(resumed), weights(whole))


def test_a_damaged_checkpoint_is_refused_and_the_good_one_kept(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run()
    folder = tmp_path / "checkpoints"
    older, newest = states(folder)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged.*to go on from {older.name}, remove it"):
        make_trainer(tmp_path).run(resume=True)
    assert states(folder) == [older, newest]
    newest.unlink()
    assert newest_state(folder) == older
    resumed = make_trainer(tmp_path)
    log = resumed.run(resume=True)
    assert same(weights(resumed), weights(trainer))
    assert log.column("loss")[0] == list(range(1, 13)), "no step twice, none left out"
    for cut in (0, 10, 40):
        older.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="damaged"):
            load_state(older)


def test_a_damaged_log_is_no_reason_to_stop(tmp_path):
    make_trainer(tmp_path).run()
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    rubbish = [b"\xff}\n", b"\0\0{}\n", b"[]}\n", b"3\n", b'{"loss": 1}\n', b'{"step": 12, "lo']
    log.write_bytes(b"".join([*lines[:5], *rubbish[:3], *lines[5:], *rubbish[3:]]))
    make_trainer(tmp_path).run(resume=True)
    assert log.read_bytes() == b"".join(lines)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make_trainer(tmp_path).run()
    trainer = make_trainer(tmp_path)
    trainer.model.backbone.layers.append(trainer.model.backbone.layers[0])
    with pytest.raises(
        CheckpointError, match="step-0000000.*not of this run's model: .*issing key"
    ):
        trainer.run(resume=True)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_state(tmp_path, 1, {"a": torch.ones(3)})

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path, 2, {"a": torch.zeros(3)})
    assert load_state(newest_state(tmp_path))["a"].tolist() == [1, 1, 1]


KILLED_RUN = """
import sys; sys.path.insert(0, {tests!r})
from test_training import make_trainer
make_trainer({out!r}, steps=400, save_every=3).run(resume={resume})
"""


def start_run(out, resume):
    code = KILLED_RUN.format(tests=os.path.dirname(__file__), out=str(out), resume=resume)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """kill -9 at whatever moment it comes, perhaps in the middle of writing a checkpoint."""
    process = start_run(tmp_path, resume=False)
    deadline = time.monotonic() + 120
    while not states(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    stopped_at = load_state(newest_state(tmp_path / "checkpoints"))["step"]
    goal = stopped_at + 7
    resumed, whole = (
        make_trainer(tmp_path, steps=400, save_every=3),
        make_trainer(tmp_path / "whole", steps=400, save_every=3),
    )
    resumed.restore(load_state(newest_state(tmp_path / "checkpoints")))
    for trainer in (resumed, whole):
        while trainer.step < goal:
            trainer.train_step()
    assert same(weights(resumed), weights(whole))
