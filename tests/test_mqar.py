"""Associative recall: the task is what it says, the score counts what it should, all of it runs."""

import itertools
import json

import pytest
import torch

from examples.mqar import __main__ as mqar
from examples.mqar import train
from examples.mqar.models import MIXERS, Recall
from examples.mqar.task import draw, pairs_at
from examples.mqar.train import accuracy

L, PAIRS, VOCAB = 32, 8, 40
SMALL = f"--length {L} --vocab {VOCAB} --batch 4 --steps 4 --device cpu".split()


def test_every_key_is_asked_for_once_and_its_value_is_the_answer():
    tokens, queries, answers = draw(16, L, PAIRS, VOCAB, torch.Generator().manual_seed(0))
    assert tokens.shape == (16, L) and tokens.max() < VOCAB
    for row, where, values in zip(tokens, queries, answers):
        pairs = dict(zip(row[0 : 2 * PAIRS : 2].tolist(), row[1 : 2 * PAIRS : 2].tolist()))
        assert len(pairs) == PAIRS, "keys are distinct"
        assert max(pairs) < VOCAB // 2 <= min(pairs.values())
        assert len(set(where.tolist())) == PAIRS and where.min() >= 2 * PAIRS
        assert [pairs[key] for key in row[where].tolist()] == values.tolist()
        assert sorted(pairs) == sorted(row[where].tolist())
    assert len(queries.unique()) > PAIRS, "the queries' places differ from row to row"
    with pytest.raises(ValueError, match="11 pairs need 33 tokens of 32"):
        draw(1, 32, 11, VOCAB)


def test_the_curriculum_goes_from_few_pairs_to_a_quarter():
    pairs = [pairs_at(step / 100, 256) for step in range(100)]
    assert pairs[::25] == [8, 16, 32, 64] and pairs == sorted(pairs) and pairs[-1] == 64


@pytest.mark.parametrize("kind", MIXERS)
def test_a_model_answers_from_what_came_before(kind):
    torch.manual_seed(0)
    model = Recall(kind, 16, 8, VOCAB, L)
    tokens, queries, _ = draw(2, L, PAIRS, VOCAB)
    logits = model(tokens, queries)
    assert logits.shape == (2, PAIRS, VOCAB)
    first = queries.min(1).indices
    later = tokens.clone()
    for row in range(2):
        later[row, queries[row, first[row]] + 1 :] = 0
    changed = (model(later, queries) != logits).any(-1)
    asked_first = torch.zeros_like(changed).scatter(1, first[:, None], True)
    assert not changed[asked_first].any() and changed[~asked_first].any()


@pytest.mark.parametrize("wrong", [0, 2])
def test_accuracy_is_the_share_of_right_answers(wrong):
    class Oracle(torch.nn.Module):
        def forward(self, tokens, queries):
            keys = tokens.gather(1, queries)
            match = keys[:, :, None] == tokens[:, None, 0 : 2 * PAIRS : 2]
            answers = tokens.gather(1, 1 + 2 * match.int().argmax(-1))
            answers[:, :wrong] = 0  # a key, never a value
            return torch.nn.functional.one_hot(answers, VOCAB).float()

    assert accuracy(Oracle(), mqar.parse(SMALL)) == 1 - wrong / PAIRS


def test_a_run_leaves_rows_a_table_and_a_plot(tmp_path):
    for mixer in ("mamba2", "attention"):
        command = ["--mixer", mixer, "--d-model", "16", "--d-state", "8", "--rates", "0.01"]
        assert mqar.main([*SMALL, *command, "--out", str(tmp_path)]) == 0
    rows = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["mixer"] for row in rows] == ["mamba2", "attention"]
    assert (
        f"| mamba2 | 8 | 16 | {rows[0]['accuracy']:.3f} | 0.00 M | 1.0e-02 |"
        in (tmp_path / "table.md").read_text()
    )
    assert (tmp_path / "mqar.png").stat().st_size > 0


def test_a_run_ends_when_its_time_is_over(tmp_path, monkeypatch):
    clock = itertools.count(step=0.1)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    command = ["--mixer", "mamba1", "--d-model", "16", "--budget-seconds", "0.5", "--steps", "1"]
    assert mqar.main([*SMALL, *command, "--rates", "1e-3", "1e-2", "--out", str(tmp_path)]) == 0
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    # A look at the clock every 20 steps, 0.1 s apart, and 0.25 s for each rate.
    assert row["steps"] == 60


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MIXERS)
def test_captured_steps_train(kind, cuda, tmp_path):
    """Few keys and pairs are learnt in moments: every draw of a graph is another."""
    command = f"--mixer {kind} --d-model 64 --d-state 16 --length {L} --vocab {VOCAB} --batch 64"
    command += f" --steps 400 --rates 3e-3 --device {cuda} --out {tmp_path}"
    assert mqar.main(command.split()) == 0
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["accuracy"] > 3 / (VOCAB // 2)
