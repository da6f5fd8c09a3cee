"""Generation: it says what the whole forward would, and draws from the right distribution."""

import math

import pytest
import torch
from test_model import HYBRID, make_model

from mamba2_cuda.model import Decoder, Sampling, generate

GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6]]


def by_whole_forwards(model, prompt, count, eos=()):
    """The most likely continuation, with no cache."""
    said = []
    while len(said) < count and not (said and said[-1] in eos):
        logits = model(torch.tensor([prompt + said]))[0, -1, :29]
        said.append(logits.argmax().item())
    return said


@pytest.fixture(params=[{}, HYBRID], ids=["mamba2", "hybrid"])
def model(request):
    return make_model(**request.param)


@torch.no_grad()
def test_greedy_is_the_most_likely_token_of_whole_forwards(model):
    expected = [by_whole_forwards(model, prompt, 20) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == 3, "the rows must differ for this to show anything"
    assert generate(model, PROMPTS, 20, sampling=GREEDY) == expected


def test_a_decoder_forgets_between_prompts(model):
    decoder = Decoder(model, 3, 25, sampling=GREEDY)
    first = decoder.generate(PROMPTS, 20)
    decoder.generate([[7, 7], [8], [28, 0, 3, 4]], 5)
    assert decoder.generate(PROMPTS, 20) == first


@torch.no_grad()
def test_a_decoder_follows_the_weights(model):
    decoder = Decoder(model, 1, 25, sampling=GREEDY)
    for prompt in ([6], [6, 2]):
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        assert decoder.generate([prompt], 20) == [by_whole_forwards(model, prompt, 20)]


@torch.no_grad()
def test_a_row_ends_at_eos_and_the_others_go_on(model):
    free = [by_whole_forwards(model, prompt, 40) for prompt in PROMPTS]
    eos = (free[0][2], 31)
    expected = [by_whole_forwards(model, prompt, 40, eos) for prompt in PROMPTS]
    assert len(expected[0]) <= 3 and expected[0][-1] == eos[0]
    assert generate(model, PROMPTS, 40, sampling=GREEDY, eos=eos) == expected


def test_the_callback_hears_every_token_as_it_comes(model):
    heard, eos = [], (generate(model, PROMPTS, 3, sampling=GREEDY)[0][2],)
    said = generate(model, PROMPTS, 40, sampling=GREEDY, eos=eos, callback=heard.append)
    for row, text in enumerate(said):
        told = [tokens[row] for tokens in heard]
        assert told == text + [None] * (len(heard) - len(text))


def test_a_seed_repeats_the_draws(model):
    first, again, other = (generate(model, PROMPTS, 20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_rows_of_padding_in_the_vocabulary_are_never_chosen(model):
    with torch.no_grad():
        model.lm_head.weight[29:] *= 100
        logits = model(torch.tensor([PROMPTS[0]]))
    assert logits[0, :, 29:].abs().max() > logits[0, :, :29].abs().max()
    said = generate(model, PROMPTS, 50, sampling=Sampling(temperature=5.0), seed=0)
    assert max(map(max, said)) < 29


CHANCES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    "options, kept",
    [
        (dict(), 5),
        (dict(top_k=2), 2),
        (dict(top_k=9), 5),
        (dict(top_p=0.39), 1),
        (dict(top_p=0.65), 2),
        (dict(top_p=0.75), 3),
        (dict(min_p=0.3), 3),
        (dict(min_p=0.8), 1),
        (dict(top_k=3, min_p=0.7), 2),
        # Of the three that top_k leaves, 0.47 + 0.35 = 0.82 is already enough.
        (dict(top_k=3, top_p=0.8), 2),
        (dict(temperature=0.5, top_p=0.8), 2),
    ],
)
def test_draws_follow_the_chances_of_what_is_kept(options, kept):
    sampling, draws = Sampling(**options), 20_000
    place = torch.tensor([2, 4, 1, 0, 3])  # likely tokens do not come first
    logits = torch.empty(5).index_copy(0, place, CHANCES.log())
    chances = CHANCES ** (1 / options.get("temperature", 1))
    chances = torch.where(torch.arange(5) < kept, chances, 0)
    chances = chances / chances.sum()
    tokens = sampling.choose(logits.expand(draws, 5), generator=torch.Generator().manual_seed(0))
    share = tokens.bincount(minlength=5)[place] / draws
    assert (share[kept:] == 0).all()
    deviation = (chances * (1 - chances) / draws).sqrt()
    assert ((share - chances).abs() <= 5 * deviation).all(), (share, chances)


def test_repetition_penalty_weakens_what_occurred():
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.5]])
    occurred = torch.tensor([[True, False, False, False]])
    assert Sampling(temperature=0).choose(logits) == 0
    assert Sampling(temperature=0, repetition_penalty=1.2).choose(logits, occurred) == 1
    negative, occurred = -logits, torch.tensor([[False, False, True, True]])
    assert Sampling(temperature=0, repetition_penalty=1.0).choose(negative, occurred) == 3
    occurred = torch.tensor([[True, True, True, False]])
    assert Sampling(temperature=0, repetition_penalty=9.0).choose(-logits.abs(), occurred) == 3


def test_a_strong_repetition_penalty_repeats_nothing(model):
    said = generate(model, PROMPTS, 10, sampling=Sampling(temperature=0, repetition_penalty=1e9))
    positive = [prompt + text for prompt, text in zip(PROMPTS, said)]
    free = generate(model, PROMPTS, 10, sampling=GREEDY)
    assert any(len(set(p + f)) < len(p + f) for p, f in zip(PROMPTS, free))
    for prompt, text in zip(PROMPTS, positive):
        new = text[len(prompt) :]
        assert len(set(new)) == len(new) and not set(new) & set(prompt)


def test_a_prompt_may_hold_what_only_pads_the_vocabulary(model):
    """Rows 29 to 31 of the embedding: none is ever chosen, but all can be read."""
    sampling = Sampling(temperature=0, repetition_penalty=1e9)
    (said,) = generate(model, [[3, 31, 29]], 10, sampling=sampling)
    assert len(set(said)) == 10 and max(said) < 29 and 3 not in said


@pytest.mark.parametrize("option", [dict(temperature=-1), dict(top_p=0), dict(min_p=math.nan)])
def test_impossible_settings_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Sampling(**option)


def test_impossible_prompts_are_refused(model):
    for prompts in ([[1], []], []):
        with pytest.raises(ValueError, match="none of them empty"):
            generate(model, prompts, 3)
    with pytest.raises(ValueError, match="max_new_tokens: must be 0 or more, got -5"):
        generate(model, PROMPTS, -5)
    assert generate(model, PROMPTS, 0) == [[], [], []]
    for token in (-1, 32):
        with pytest.raises(ValueError, match=r"tokens must be in 0\.\.31, got"):
            generate(model, [[1, token]], 3)
    with pytest.raises(ValueError, match="prompts: must be 3, got 1"):
        Decoder(model, 3, 7).generate([[1]], 3)
    with pytest.raises(ValueError, match="5 \\+ 3 new tokens in room for 7"):
        Decoder(model, 3, 7).generate(PROMPTS, 3)


@pytest.mark.gpu
def test_a_captured_step_is_the_eager_step(model, cuda):
    model = model.to(cuda, torch.float32)
    for sampling in (GREEDY, Sampling(top_k=5, repetition_penalty=1.2)):
        eager, captured = (
            Decoder(model, 3, 40, sampling=sampling, cuda_graph=graph) for graph in (False, True)
        )
        for prompts in (PROMPTS, [[4], [5], [6]]):
            assert captured.generate(prompts, 30, seed=3) == eager.generate(prompts, 30, seed=3)
