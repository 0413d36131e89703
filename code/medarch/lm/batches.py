"""From documents to batches: one long row of tokens, and random windows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from medarch.lm.tokenizer import Tokenizer


class _Text(Protocol):
    @property
    def text(self) -> str: ...


def pack(tokenizer: Tokenizer, documents: Sequence[_Text]) -> Int[Tensor, "tokens"]:
    """All documents in one row, in their order, with an end of text before the first and after each.

    The first end of text gives the first document what every other one has: a token to be predicted from.

    Args:
        tokenizer: of the model.
        documents: with a ``text``, such as those of ``medarch.data.corpus``.

    Raises:
        ValueError: there is no document.
    """
    if not documents:
        raise ValueError("an empty corpus: no documents to pack")
    row = [tokenizer.end_of_text]
    for ids in tokenizer.encode_all([document.text for document in documents]):
        row.extend(ids)
        row.append(tokenizer.end_of_text)
    return torch.tensor(row)


def sample_batch(
    tokens: Int[Tensor, "tokens"], batch_size: int, length: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Windows of a row of tokens, from starts that are drawn evenly with replacement.

    Args:
        tokens: from ``pack``.
        batch_size: windows, at least 1.
        length: tokens per window, at least 1.
        generator: on the CPU, whatever the device of ``tokens``.

    Returns:
        Inputs, and for each of them the token that follows it.

    Raises:
        ValueError: a number is less than 1, or there are fewer than ``length + 1`` tokens.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch_size={batch_size} and length={length} must be at least 1")
    if len(tokens) < length + 1:
        raise ValueError(
            f"{len(tokens)} tokens are too few for windows of length={length}, which need {length + 1} with the "
            "token that follows; take a shorter length or more documents"
        )
    starts = torch.randint(len(tokens) - length, (batch_size, 1), generator=generator)
    windows = tokens[(starts + torch.arange(length + 1)).to(tokens.device)]
    return windows[:, :-1], windows[:, 1:]
