"""Generation: a prompt in one forward, then a token at a time, as a CUDA graph on CUDA."""

import array
import itertools

import torch

from .sampling import Sampling

FROM_THE_MODEL = Sampling()
WARM_UP_STEPS = 2  # before a CUDA graph is captured
LOOK_EVERY = 16  # tokens between looks at whether all rows have ended: each waits for the device


def generate(
    model, prompts, max_new_tokens, *, sampling=FROM_THE_MODEL, eos=(), seed=None,
    callback=None, cuda_graph=True,
):  # fmt: skip
    """What the model says after each prompt: a list of lists of tokens, an ending eos included.

    prompts     lists of tokens, each with one at least; their lengths may differ
    eos         tokens that end a row
    seed        of the draws; without one they differ from call to call
    callback    is called with each new token of every row, None for rows that have ended
    cuda_graph  capture the step of one token in a CUDA graph (on CUDA)
    """
    longest = check_prompts(prompts, max_new_tokens)
    decoder = Decoder(
        model, len(prompts), longest + max_new_tokens, sampling=sampling, eos=eos,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    return decoder.generate(prompts, max_new_tokens, seed=seed, callback=callback)


def check_prompts(prompts, max_new_tokens):
    """The length of the longest."""
    if not prompts or not all(prompts):
        raise ValueError("prompts: there must be one, and none of them empty")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: must be 0 or more, got {max_new_tokens}")
    return max(map(len, prompts))


def as_tensor(rows):
    """Rows of tokens, all of one length, as torch.tensor has it, in a fifth of its time."""
    flat = array.array("q", itertools.chain.from_iterable(rows))
    return torch.frombuffer(flat, dtype=torch.int64).view(len(rows), -1)


class Decoder:
    """Buffers, and on CUDA a captured graph, for generating again and again at one batch size.

    state_dtype  of the mixers' states: fp32 unless it says otherwise. The weights' 16 bits halve
                 what a step of many rows moves, and round the state at every token
    """

    def __init__(
        self, model, batch, max_length, *, sampling=FROM_THE_MODEL, eos=(), cuda_graph=True,
        state_dtype=None,
    ):  # fmt: skip
        self.model, self.sampling, self.max_length = model, sampling, max_length
        device = model.lm_head.weight.device
        self.device, self.vocab_size = device, model.config.vocab_size
        self.vocabulary = model.config.padded_vocab_size  # rows of the embedding
        self.cache = model.allocate_cache(batch, max_length, state_dtype=state_dtype)
        self.eos = torch.tensor(list(eos), dtype=torch.int64, device=device)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # the last one
        self.tokens = self.token.new_zeros(batch, max_length + WARM_UP_STEPS)  # the new ones
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.occurred = None
        if sampling.repetition_penalty != 1:
            self.occurred = torch.zeros(batch, self.vocabulary, dtype=torch.bool, device=device)
        self.generator = torch.Generator(device)
        self.graph = None
        if cuda_graph and device.type == "cuda":
            self.capture()

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, *, seed=None, callback=None):
        """As the function of this name."""
        self.start(prompts, max_new_tokens, seed)
        texts, taken = [[] for _ in prompts], 0
        new = self.tokens[:, self.cache.seen :]
        for i in range(max_new_tokens):
            if i:
                self.step()
            look = len(self.eos) and (i + 1) % LOOK_EVERY == 0
            if callback is not None or look or i + 1 == max_new_tokens:
                self.collect(texts, new[:, taken : i + 1].tolist(), callback)
                taken = i + 1
                if len(self.eos) and self.ended.all():
                    break
        return texts

    def collect(self, texts, tokens, callback):
        """Adds tokens (rows of columns) to the texts, up to their end."""
        eos = set(self.eos.tolist())
        added = []
        for text, row in zip(texts, tokens):
            if text and text[-1] in eos:
                row = []
            elif eos:
                last = next((i for i, token in enumerate(row) if token in eos), len(row))
                row = row[: last + 1]
            text += row
            added.append(row)
        if callback is not None:
            for i in range(len(tokens[0])):
                callback([row[i] if i < len(row) else None for row in added])

    def start(self, prompts, max_new_tokens, seed):
        """Reads the prompts and chooses each row's first token."""
        longest = check_prompts(prompts, max_new_tokens)
        if len(prompts) != len(self.token):
            raise ValueError(f"prompts: must be {len(self.token)}, got {len(prompts)}")
        if longest + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompts: {longest} + {max_new_tokens} new tokens in room for {self.max_length}"
            )
        pads = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        rows = as_tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        least, most = (end.item() for end in rows.aminmax())
        if least < 0 or most >= self.vocabulary:
            raise ValueError(
                f"prompts: tokens must be in 0..{self.vocabulary - 1}, got {least}..{most}"
            )
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed: must be from 0 to 2^63 - 1, got {seed}")
        self.forget()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        rows = rows.to(self.device)
        if self.occurred is not None:
            real = torch.arange(longest, device=self.device) >= pads[:, None]
            row, _ = real.nonzero(as_tuple=True)
            self.occurred[row, rows[real]] = True
        ragged = any(len(p) != longest for p in prompts)
        self.advance(rows, pads if ragged else None)
        self.cache.padded = True  # as captured; without padding its count is 0

    def step(self):
        """One token more for every row."""
        if self.graph is None:
            self.advance(self.token)
        else:
            self.graph.replay()
            self.cache.seen += 1

    def advance(self, tokens, pads=None):
        """The token after `tokens` (b, l), into self.token, and into self.tokens at its place."""
        logits = self.model(tokens, cache=self.cache, pads=pads, last_only=True)
        logits = logits[:, 0, : self.vocab_size]
        occurred = None if self.occurred is None else self.occurred[:, : self.vocab_size]
        token = self.sampling.choose(logits, occurred, self.generator)
        if len(self.eos):
            token = torch.where(self.ended, self.eos[0], token)
            self.ended |= (token[:, None] == self.eos).any(1)
        if self.occurred is not None:
            self.occurred.scatter_(1, token[:, None], True)
        self.token.copy_(token[:, None])
        self.tokens.index_copy_(1, self.cache.first[None], self.token)

    def forget(self):
        self.cache.reset()
        self.token.zero_()
        self.ended.zero_()
        if self.occurred is not None:
            self.occurred.zero_()

    @torch.no_grad()
    def capture(self):
        """Captures one step. What it does to the buffers meanwhile, `start` undoes."""
        self.cache.padded = True
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.advance(self.token)
                self.cache.seen = 1  # a step, not a prompt, whatever room there is
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.forget()
        self.cache.seen, self.cache.padded = 1, True
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=stream):
            self.advance(self.token)
        self.forget()
