"""The program `mamba2`: train, go on, look, convert, generate; what it says when it cannot."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from mamba2_cuda.cli import generate, main
from mamba2_cuda.model import Sampling, load_model
from mamba2_cuda.training import report
from mamba2_cuda.training.run_state import states

pytest.importorskip("safetensors", reason="safetensors is not installed")
TRAIN = "train --steps 6 --batch 2 --length 16 --save-every 3 --validate-every 3 --device cpu"


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run on two texts."""
    folder = tmp_path_factory.mktemp("cli")
    texts = [folder / f"{i}.txt" for i in range(2)]
    for text in texts:
        text.write_text("the quick brown fox jumps over the lazy dog; " * 20)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 1,
              "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    options = ["--data", *texts, "--out", folder / "run", "--config", folder / "config.json"]
    assert run(*TRAIN.split(), *options) == 0
    return folder


def test_a_run_goes_on_from_its_folder_alone(trained, capsys):
    before = load_model(trained / "run/model").state_dict()
    states(trained / "run/checkpoints")[-1].unlink()
    assert run("train", "--out", trained / "run", "--resume", "--device", "cpu") == 0
    after = load_model(trained / "run/model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run(*TRAIN.split(), "--data", "x", "--out", trained / "run") == 2
    assert "holds a run: --resume it" in capsys.readouterr().err


def test_info_tells_what_the_model_is(trained, capsys):
    assert run("info", trained / "run/model") == 0
    said = capsys.readouterr().out
    assert "4 heads of 8, state 8" in said and "257 in 264 rows" in said
    count = sum(p.numel() for p in load_model(trained / "run/model").parameters())
    assert f"{count:,}" in said
    assert run("info") == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("to", ["huggingface", "state-spaces"])
def test_a_converted_model_is_the_same_model(trained, tmp_path, to):
    assert run("convert", trained / "run/model", tmp_path, "--to", to, "--dtype", "bf16") == 0
    first, again = load_model(trained / "run/model"), load_model(tmp_path, dtype=torch.float32)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), again.state_dict()[name])


def test_generate_prints_the_continuation(trained, capsys, monkeypatch):
    command = ["generate", trained / "run/model", "--max-new-tokens", "9", "--device", "cpu"]
    assert run(*command, "--prompt", "the quick", "--seed", "1") == 0
    first = capsys.readouterr().out
    assert first.startswith("the quick") and len(first) > len("the quick\n")
    assert run(*command, "--prompt", "the quick", "--seed", "1") == 0
    assert capsys.readouterr().out == first
    assert run(*command, "--prompt", "the", "--prompt", "brown fox", "--temperature", "0") == 0
    said = capsys.readouterr().out
    assert said.startswith("the") and "\n\nbrown fox" in said


def test_every_way_of_choosing_is_heard(trained, monkeypatch):
    chosen = []
    monkeypatch.setattr(generate, "generate_tokens", lambda *_, **settings: chosen.append(settings))
    options = "--repetition-penalty 1.5 --temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.25"
    command = ["generate", trained / "run/model", "--prompt", "a", "--device", "cpu"]
    for more, eos in (["--seed", "7"], (256,)), (["--seed", "7", "--ignore-eos"], ()):
        assert run(*command, *options.split(), *more) == 0
        del chosen[-1]["callback"]
        sampling = Sampling(
            temperature=0.5, top_k=4, top_p=0.75, min_p=0.25, repetition_penalty=1.5
        )
        assert chosen[-1] == dict(sampling=sampling, eos=eos, seed=7)


def test_a_tokenizer_of_ones_own_goes_with_the_model(trained, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {word: i for i, word in enumerate("? the quick brown fox <|endoftext|>".split())}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    own.save(str(tmp_path / "own.json"))
    options = ["--data", trained / "0.txt", "--tokenizer", tmp_path / "own.json"]
    options += ["--config", trained / "config.json", "--out", tmp_path / "first"]
    assert run(*TRAIN.split(), *options, "--length", "8") == 0
    # The folder has all that a run needs, wherever it is.
    (tmp_path / "own.json").unlink()
    (tmp_path / "first").rename(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    states(tmp_path / "run/checkpoints")[-1].unlink()
    assert run("train", "--out", tmp_path / "run", "--resume", "--device", "cpu") == 0
    model = tmp_path / "run/model"
    assert load_model(model).config.vocab_size == 6
    capsys.readouterr()
    command = f"generate {model} --prompt the --max-new-tokens 20 --ignore-eos --device cpu"
    assert run(*command.split()) == 0
    said = capsys.readouterr().out.split()
    assert len(said) > 5 and set(said) <= set(words)
    assert run("convert", model, tmp_path / "b", "--to", "huggingface") == 0
    assert run(*command.replace(str(model), str(tmp_path / "b")).split()) == 0


def test_problems_are_one_sentence_and_status_2(trained, tmp_path, capsys):
    begin, config = f"train --out {tmp_path}/d --data {trained}/0.txt", tmp_path / "config.json"
    config.write_text('{"ssm_cfg": {"layer": "Mamba2"}}')
    for command, complaint in {
        f"info {tmp_path}": "config.json",
        f"generate {trained}/run/model --prompt a --top-p 2 --device cpu": "top_p cannot be 2",
        f"convert {trained}/run/model {trained}/run/model --to huggingface": "the same folder",
        f"train --out {tmp_path}/a": "give --data or --tokens",
        f"train --out {tmp_path}/b --tokens {trained}/0.txt": "--tokens needs --vocab-size",
        f"train --out {tmp_path}/c --data {tmp_path}/no.txt": "no.txt",
        f"{begin} --accumulate 0": "accumulate must be at least 1, got 0",
        f"{begin} --steps 0": "steps must be at least 1, got 0",
        f"{begin} --save-every -1": "save_every must be at least 1, got -1",
        f"{begin} --warmup 5": "warmup must be a share of the steps, 0 to 1, got 5",
        f"{begin} --rate nan": "rate must be 0 or more, got nan",
        f"{begin} --clip 0": "clip must be above 0, got 0",
        f"{begin} --held-out 1.5": "above 0 and below 1: 1.5",
        f"{begin} --held-out 0.001": "0 held-out tokens are too few for windows of 512",
        f"{begin} --length 100000": "tokens are too few for windows of 100000",
        f"{begin} --config {config}": "config: has no d_model, n_layer, vocab_size",
        f"train --out {tmp_path}/e --tokens {trained}/0.txt --vocab-size 9": "has a token 3",
        f"generate {trained}/run/model --prompt a --max-new-tokens -1": "must be 0 or more, got -1",
        f"train --out {trained}/run --resume --steps 9": "--steps cannot be changed with --resume",
        f"train --out {trained}/run --resume --fp32": "--fp32 cannot be changed with --resume",
        f"{begin} --seed -1": "seed must be from 0 to 2^32 - 1, got -1",
        f"{begin} --vocab-size 300": "--vocab-size has no meaning with --data",
        f"{begin} --token-dtype uint32": "--token-dtype has no meaning with --data",
        f"train --out {tmp_path}/f --tokens {trained}/0.txt --vocab-size 9 --tokenizer x.json": (
            "--tokenizer has no meaning with --tokens"
        ),
        f"generate {trained}/run/model --prompt a --seed {2**64}": f"2^63 - 1, got {2**64}",
        f"generate {trained}/run/model --prompt a --temperature inf": "temperature cannot be inf",
    }.items():
        assert run(*command.split()) == 2, command
        said = capsys.readouterr().err
        assert complaint in said and said.count("\n") == 1
    # What was refused left no run behind.
    assert run(*f"{begin} --steps 1 --length 16 --device cpu".split()) == 0


def test_a_tokenizer_that_cannot_be_read(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "own.json").write_text("{")
    begin = ["train", "--out", tmp_path / "a", "--data", trained / "0.txt", "--tokenizer"]
    for name in ("own.json", "none.json"):
        assert run(*begin, tmp_path / name) == 2
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as where it is not installed
    assert run(*begin, tmp_path / "own.json") == 2
    assert "own.json: tokenizers, the package that reads it, is absent" in capsys.readouterr().err


def test_a_loss_plot_or_why_there_is_none(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert (trained / "run/loss.png").stat().st_size > 0
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    options = ["--data", trained / "0.txt", "--config", trained / "config.json"]
    assert run(*TRAIN.split(), *options, "--out", tmp_path) == 0
    assert "no loss.png: matplotlib, which draws it, is not" in capsys.readouterr().out


def test_one_size_is_enough(trained, tmp_path, capsys):
    options = ["--size", "130m", "--config", trained / "config.json", "--data", trained / "0.txt"]
    with pytest.raises(SystemExit) as stopped:
        run("train", "--out", tmp_path, *options)
    assert stopped.value.code == 2
    assert "--config: not allowed with argument --size" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tape", "cuda:77", "meta"])
def test_a_device_that_is_not_there(trained, name, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("generate", trained / "run/model", "--prompt", "a", "--device", name)
    assert stopped.value.code == 2
    assert f"argument --device: no device '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "generate", "train", "convert", "info"])
def test_help_reads_well(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*command.split(), "--help")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "None" not in said
    assert not command or f"mamba2 {command}" in said


def test_it_runs_as_a_module():
    said = subprocess.run(
        [sys.executable, "-m", "mamba2_cuda.cli", "--version"], capture_output=True, text=True
    )
    assert said.returncode == 0 and said.stdout.startswith("mamba2_cuda ")
