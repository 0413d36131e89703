"""How well a language model predicts text: bits per byte and perplexity, each document by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medarch.data.corpus import Document
from medarch.lm.decoder import Decoder

if TYPE_CHECKING:
    from medarch.lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """What a model needs to write down a set of documents.

    Attributes:
        document_nats: for each document, in the given order, the negative log-likelihood of its tokens and of
            its end, in nats.
        document_tokens: for each document the number of tokens predicted, its end included.
        document_bytes: for each document the length of its text in UTF-8.
    """

    document_nats: tuple[float, ...]
    document_tokens: tuple[int, ...]
    document_bytes: tuple[int, ...]

    @property
    def nats(self) -> float:
        """Negative log-likelihood of everything, in nats."""
        return math.fsum(self.document_nats)

    @property
    def tokens(self) -> int:
        """Tokens predicted, one end of text for each document included."""
        return sum(self.document_tokens)

    @property
    def bytes(self) -> int:
        """Length of all texts in UTF-8."""
        return sum(self.document_bytes)

    @property
    def loss(self) -> float:
        """Cross entropy in nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(nats / tokens)``: it depends on the tokenizer, and compares only models that share one."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """``nats / (ln 2 * bytes)``, which compares models with different tokenizers, and with compressors."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def standard_error(self) -> float:
        """Standard error of ``bits_per_byte`` that the choice of documents leaves; NaN for a single document.

        The documents are taken as a sample, and bits per byte as a ratio of two sums over it (Cochran,
        Sampling Techniques, 3rd edition, 1977, chapter 6).
        """
        count, ratio = len(self.document_nats), self.nats / self.bytes
        if count < 2:
            return math.nan
        pairs = zip(self.document_nats, self.document_bytes, strict=True)
        squares = math.fsum((nats - ratio * size) ** 2 for nats, size in pairs)
        return math.sqrt(squares * count / (count - 1)) / (math.log(2) * self.bytes)


class Window(NamedTuple):
    """A stretch of one document: the ids, and how many of the predictions at its end are to be scored."""

    document: int
    ids: list[int]
    scored: int


def windows(document: int, ids: list[int], context: int, stride: int) -> Iterator[Window]:
    """Cuts a document into stretches that the model can read, so that each token is predicted exactly once.

    The first window scores all of its predictions. Each later one begins ``stride`` tokens after the one
    before and scores only what that one did not reach, so that every token but the first ``context`` is
    predicted from at least ``context - stride`` tokens before it.

    Args:
        document: number of the document, passed on.
        ids: its tokens, between two ends of text: ``n + 2`` of them, which makes ``n + 1`` predictions.
        context: the longest input that the model reads.
        stride: tokens from the beginning of one window to that of the next.

    Yields:
        Windows of at most ``context + 1`` ids: the inputs and, shifted by one, the targets.
    """
    reached, total = 0, len(ids) - 1
    for start in range(0, total, stride):
        end = min(start + context, total)
        yield Window(document, ids[start : end + 1], end - reached)
        reached = end
        if end == total:
            return


@torch.no_grad()
def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[Document | str],
    batch_size: int = 32,
    context: int | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Predicts each document from its beginning to its end, none of them knowing of another.

    A document is read as the training data has it: after an end of text come its tokens, and then the end of
    text that the model has to predict as well. What is longer than the context is cut into overlapping
    windows in which each token is predicted once. The result does not depend on ``batch_size`` beyond
    rounding: windows of like length share a batch, and padding is behind the text, where causal attention
    does not see it.

    Args:
        model: the decoder; its training mode is restored afterwards.
        tokenizer: the tokenizer that it was trained with.
        documents: documents of the corpus, or plain texts.
        batch_size: windows that are computed together.
        context: longest input in tokens; the model's ``max_position_embeddings`` where it is absent.
        stride: step between the windows of a long document; half the context where it is absent.

    Returns:
        The sums, from which bits per byte and perplexity follow.

    Raises:
        ValueError: If there is no document, a document is empty, an argument is out of its range, the
            tokenizer is not the model's, or the model gives a prediction that is not finite.
    """
    texts = [document if isinstance(document, str) else document.text for document in documents]
    limit = model.config.max_position_embeddings
    context = limit if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    _check(texts, batch_size, context, stride, limit)
    end, device = tokenizer.end_of_text, next(model.parameters()).device
    sequences = [[end, *tokenizer.encode(text), end] for text in texts]
    if (largest := max(map(max, sequences))) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model has vocab_size={model.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    cut = [window for number, ids in enumerate(sequences) for window in windows(number, ids, context, stride)]
    nats = [0.0] * len(texts)
    was_training = model.training
    model.eval()
    try:
        cut.sort(key=lambda window: len(window.ids))
        for first in range(0, len(cut), batch_size):
            group = cut[first : first + batch_size]
            for window, total in zip(group, _score(model, group, device), strict=True):
                nats[window.document] += total
    finally:
        model.train(was_training)
    if wrong := [number for number, value in enumerate(nats) if not math.isfinite(value)]:
        raise ValueError(
            f"the model's prediction of {len(wrong)} document(s) is not finite, first of number {wrong[0]}, "
            f"{texts[wrong[0]][:40]!r}: look for NaN among its weights"
        )
    sizes = tuple(len(text.encode("utf8")) for text in texts)
    return Evaluation(tuple(nats), tuple(len(ids) - 1 for ids in sequences), sizes)


def _score(model: Decoder, group: Sequence[Window], device: torch.device) -> list[float]:
    """Nats of the scored predictions of each window, computed together."""
    length = max(len(window.ids) for window in group) - 1
    inputs = torch.zeros(len(group), length, dtype=torch.long)
    targets = torch.full_like(inputs, -100)
    mask = torch.zeros_like(inputs, dtype=torch.bool)
    for row, (_, ids, scored) in enumerate(group):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        mask[row, : len(ids) - 1] = True
        targets[row, len(ids) - 1 - scored : len(ids) - 1] = torch.tensor(ids[len(ids) - scored :])
    inputs, targets, mask = inputs.to(device), targets.to(device), mask.to(device)
    logits: Tensor = model(inputs, mask).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=-100)
    return losses.view_as(targets).double().sum(1).tolist()


def _check(texts: list[str], batch_size: int, context: int, stride: int, limit: int) -> None:
    """Refuses what could not be evaluated, or would silently mean something else."""
    if not texts:
        raise ValueError("there is no document to evaluate: the list is empty")
    if "" in texts:
        raise ValueError(f"document {texts.index('')} is empty: it has no byte to be predicted")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 1 <= context <= limit:
        raise ValueError(f"context={context} must lie between 1 and the model's max_position_embeddings={limit}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must lie between 1 and context={context}, or tokens would be left out")
