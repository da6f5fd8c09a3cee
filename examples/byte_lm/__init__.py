"""A small Mamba-2 byte-level language model, trained on Python's own standard library."""
