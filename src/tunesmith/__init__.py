"""Tunesmith fine-tunes language models on your own data, on the machine you have, and proves that it worked."""

__version__ = "0.1.0"
