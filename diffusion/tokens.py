"""The number of tokens of a prompt, counted without torch or a model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

MAX_TEXT_TOKENS = 512  # what Z-Image's text encoder was trained with, chat template included
FILE = "tokenizer.json"

# Qwen's chat template around one message, as `prompt_encoder` applies it; a test keeps the two equal.
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@cache
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))


def count(folder: Path, prompt: str) -> int:
    """Return how many tokens the text encoder gets for `prompt`, the template's own included.

    Args:
        folder: the tokenizer's folder.
        prompt: the text.
    """
    return len(_tokenizer(folder / FILE).encode(TEMPLATE.format(prompt=prompt), add_special_tokens=False).ids)
