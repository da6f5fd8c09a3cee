"""The demo's parts: text, model, training loop."""

from dataclasses import replace

import pytest
import torch

from examples.byte_lm.corpus import is_held_out, standard_library, windows
from examples.byte_lm.model import ByteLM, Sizes
from examples.byte_lm.train import History, ProgressBar, Recipe, schedule, train

SIZES = Sizes(d_model=16, layers=2, p=8, n=8)


@pytest.fixture
def library(tmp_path):
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f"# module {i}\n" + "value = value + 1\n" * 30)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("not of the library")
    return tmp_path


def test_held_out_files_are_not_trained_on(library):
    text, held_out = (bytes(part.tolist()) for part in standard_library(library))
    for path in library.glob("*.py"):
        mark = f"# module {path.stem[1:]}\n".encode()
        there = held_out if is_held_out(path.relative_to(library)) else text
        assert mark in there
        assert (mark in text) != (mark in held_out)
    assert b"not of the library" not in text + held_out


def test_target_is_the_next_byte():
    inputs, targets = windows(torch.arange(100, dtype=torch.uint8), torch.tensor([3, 90]), 5)
    assert inputs.tolist() == [[3, 4, 5, 6, 7], [90, 91, 92, 93, 94]]
    assert torch.equal(targets, inputs + 1)


def test_a_state_continues_a_text():
    torch.manual_seed(0)
    model = ByteLM(SIZES).double()
    tokens = torch.randint(256, (2, 90))
    with torch.no_grad():
        whole, _ = model(tokens)
        first, states = model(tokens[:, :70])
        second, states = model(tokens[:, 70:89], states)
        last, _ = model(tokens[:, 89:], states)
    torch.testing.assert_close(torch.cat([first, second, last], 1), whole, rtol=0, atol=1e-12)


def test_sample_repeats():
    torch.manual_seed(0)
    model = ByteLM(SIZES)
    first, again = (model.generate(b"ab", 9, generator=torch.Generator().manual_seed(3))
                    for _ in range(2))  # fmt: skip
    assert first == again
    assert first.startswith(b"ab")
    assert len(first) == 11


def test_training_lowers_the_loss(library):
    torch.manual_seed(0)
    recipe = Recipe(steps=25, batch=4, length=64, rate=1e-2, seconds=100, validate_every=10)
    lines = []
    model = ByteLM(SIZES)
    history = train(model, standard_library(library), recipe, torch.device("cpu"), lines.append)
    assert history.validated == [10, 20, 25]
    assert history.train[0] > 7.5  # a new model knows nothing of 8 bits
    assert history.validation[-1] < 4.5
    assert "step 25/25" in lines[-1]
    assert "bits/byte" in lines[-1]


def test_training_ends_in_time(library):
    recipe = Recipe(steps=10_000, batch=1, length=16, rate=1e-3, seconds=0.5)
    model = ByteLM(SIZES)
    corpus = standard_library(library)
    history = train(model, corpus, replace(recipe, validation_windows=1), torch.device("cpu"))
    assert 0 < history.steps[-1] < 10_000


def test_schedule_warms_up_and_falls():
    rates = [schedule(i / 100, warmup=0.1) for i in range(101)]
    assert rates.index(max(rates)) == 10
    assert rates[0] < 0.02
    assert rates[-1] == pytest.approx(0.1)


def test_progress_is_reported_off_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    lines = []
    bar = ProgressBar(100, lines.append)
    for step in range(1, 101):
        bar.show(step, step / 100, History(train=[3.0], validation=[3.1]))
    assert len(lines) == 20
    assert lines[0].startswith("[#.")
    assert lines[-1].startswith("[" + "#" * 24 + "] step 100/100")
    bar.show(7, 1.0, History(train=[3.0]))
    assert lines[-1].endswith("(time is up)")
