"""Text to tokens and back: bytes, or a tokenizer.json of Hugging Face's tokenizers."""

from pathlib import Path

BYTES = "bytes"


def open_tokenizer(name):
    """name: "bytes", or the path of a tokenizer.json or of the folder that holds one."""
    if str(name) == BYTES:
        return ByteTokenizer()
    path = Path(name)
    return HuggingFaceTokenizer(path / "tokenizer.json" if path.is_dir() else path)


class ByteTokenizer:
    """A token is a byte of UTF-8; one more ends a text."""

    name = BYTES
    vocab_size = 257
    eos = 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json; eos is the first that it has of EOS_NAMES, or None."""

    EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError as cause:
            raise ValueError(f"{path}: tokenizers, the package that reads it, is absent") from cause
        self.name = str(path)
        try:
            self.tokenizer = Tokenizer.from_file(self.name)
        except Exception as cause:  # the reader raises nothing narrower
            raise ValueError(f"{path}: cannot be read as a tokenizer: {cause}") from cause
        self.vocab_size = self.tokenizer.get_vocab_size()
        found = (self.tokenizer.token_to_id(name) for name in self.EOS_NAMES)
        self.eos = next((token for token in found if token is not None), None)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        return self.tokenizer.decode(list(tokens))


class TextStream:
    """Tokens one at a time -> pieces of text, held back while a character is incomplete.

    `before`: the tokens of a text that they continue, which is not said again.
    """

    def __init__(self, tokenizer, before=()):
        self.tokenizer, self.tokens = tokenizer, list(before)
        self.said = len(tokenizer.decode(self.tokens))

    def add(self, token):
        """The text that this token completes, which may be empty."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self.rest(text)

    def rest(self, text=None):
        """All text not said yet, complete or not."""
        text = self.tokenizer.decode(self.tokens) if text is None else text
        new, self.said = text[self.said :], max(self.said, len(text))
        return new
