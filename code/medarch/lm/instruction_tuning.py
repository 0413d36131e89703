"""Teaching a language model to answer: examples whose answers alone are counted, and the loop that trains on them."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from medarch.data.instructions import Instruction
from medarch.lm.decoder import Decoder
from medarch.lm.generation import generate
from medarch.lm.training import TrainingConfig, TrainingLog, learning_rate, parameter_groups, step_seed

if TYPE_CHECKING:
    from medarch.lm.tokenizer import Tokenizer

IGNORED = -100
"""Target of a position that is not counted; what ``cross_entropy`` leaves out."""


class Example(NamedTuple):
    """One instruction in tokens, between two ends of text, as a document stands in the training data.

    Attributes:
        ids: End of text, prompt, answer, end of text.
        answer_start: Where the answer begins; it and all after it is to be predicted.
    """

    ids: list[int]
    answer_start: int


class Batch(NamedTuple):
    """Examples side by side, padded at the right.

    Attributes:
        input_ids: What the model reads.
        targets: For each position the token that follows, where that is of the answer; ``IGNORED`` elsewhere.
        mask: True for a token, False for padding.
    """

    input_ids: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]


def encode(tokenizer: Tokenizer, instructions: Sequence[Instruction]) -> list[Example]:
    """Instructions in tokens, in their order."""
    prompts = tokenizer.encode_all([each.prompt for each in instructions])
    answers = tokenizer.encode_all([f" {each.answer}" for each in instructions])
    end = tokenizer.end_of_text
    return [
        Example([end, *prompt, *answer, end], 1 + len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def no_longer_than(tokenizer: Tokenizer, instructions: Sequence[Instruction], longest: int) -> list[Instruction]:
    """Those of which the model has to read at most ``longest`` tokens.

    Raises:
        ValueError: If there is none.
    """
    pairs = zip(instructions, encode(tokenizer, instructions), strict=True)
    kept = [instruction for instruction, example in pairs if len(example.ids) - 1 <= longest]
    if not kept:
        raise ValueError(f"none of {len(instructions)} instructions has at most longest={longest} tokens")
    return kept


def collate(examples: Sequence[Example], end_of_text: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Puts examples side by side and marks what is to be predicted: the answer and the end of text behind it.

    Padding stands at the right, where a causal model sees it from no token that counts. It consists of ends of
    text, of which one is to be predicted and those behind it are not.

    Raises:
        ValueError: If there is no example.
    """
    if not examples:
        raise ValueError("no examples to put into a batch")
    width = max(len(example.ids) for example in examples) - 1
    shape = len(examples), width
    input_ids, targets = torch.full(shape, end_of_text), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, (ids, answer_start) in enumerate(examples):
        read = len(ids) - 1
        input_ids[row, :read] = torch.tensor(ids[:-1])
        mask[row, :read] = True
        # The token before the answer is the first that has to predict some of it.
        targets[row, answer_start - 1 : read] = torch.tensor(ids[answer_start:])
    return Batch(*(tensor.to(device) for tensor in (input_ids, targets, mask)))


def batches(examples: Sequence[Example], batch_size: int, seed: int, pool: int = 16) -> Iterator[list[Example]]:
    """Batches without end, each epoch in another order, of examples of similar length.

    Args:
        examples: To be drawn from, without replacement within an epoch; what fills no batch is left to the next.
        batch_size: Examples in a batch.
        seed: Decides the order.
        pool: Batches whose examples are sorted by length among themselves; with 1, chance alone decides.

    Raises:
        ValueError: If there are fewer examples than a batch takes.
    """
    if len(examples) < batch_size:
        raise ValueError(f"{len(examples)} examples do not fill a batch of batch_size={batch_size}")
    for epoch in range(1 << 31):
        generator = torch.Generator().manual_seed(step_seed(seed, epoch))
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order) - batch_size + 1, pool * batch_size):
            drawn = sorted(order[first : first + pool * batch_size], key=lambda index: len(examples[index].ids))
            starts = range(0, len(drawn) - batch_size + 1, batch_size)
            for turn in torch.randperm(len(starts), generator=generator).tolist():
                start = starts[turn]
                yield [examples[index] for index in drawn[start : start + batch_size]]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the answers' tokens, in nats a token, with the routers' losses where a decoder has them.

    Args:
        model: A ``Decoder``, or a model of transformers.
        batch: What to read and what to predict.
    """
    if isinstance(model, Decoder):
        return model.loss(model(batch.input_ids, batch.mask), batch.targets, IGNORED)[0]
    return F.cross_entropy(model(batch.input_ids).logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def tune(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainingConfig,
    report: Callable[[str], None] | None = None,
) -> TrainingLog:
    """Trains what asks for a gradient on the answers of examples, in place.

    Args:
        model: A ``Decoder`` or a model of transformers, with or without LoRA.
        examples: From ``encode``.
        config: Steps, examples behind a step (``batch_size``), longest example (``length``), schedule and AdamW.
        report: Called with a line of progress after each tenth of the steps.

    Returns:
        Loss, rate and norm of the gradient at each step, tokens read (padding left out), and processor time.

    Raises:
        ValueError: If an example is longer than ``length``, everything is frozen, or micro-batches are asked for.
        FloatingPointError: If the loss is no longer finite.
    """
    if longer := [len(each.ids) - 1 for each in examples if len(each.ids) - 1 > config.length]:
        raise ValueError(f"an example of {max(longer)} tokens exceeds length={config.length}: use no_longer_than")
    if config.accumulation != 1:
        raise ValueError(f"accumulation={config.accumulation}: examples are few and short, take a smaller batch_size")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas
    )
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device, log, was_training = trained[0].device, TrainingLog(), model.training
    order = batches(examples, config.batch_size, config.seed)
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(config.steps):
            begun = time.process_time()
            torch.manual_seed(step_seed(config.seed, step))
            batch = collate(next(order), device=device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.zero_grad(set_to_none=True)
            loss = answer_loss(model, batch)
            loss.backward()
            value, norm = float(loss.detach()), float(nn.utils.clip_grad_norm_(trained, config.clip))
            if not math.isfinite(value + norm):
                raise FloatingPointError(f"loss {value}, gradient {norm} at step {step + 1}: lower learning_rate")
            optimizer.step()
            log.seconds += time.process_time() - begun
            log.tokens += int(batch.mask.sum())
            entry = {"step": step + 1, "loss": value, "learning_rate": group["lr"], "gradient_norm": norm}
            log.steps.append(entry)
            if report is not None and (step + 1) % max(1, config.steps // 10) == 0:
                report(f"step {step + 1}/{config.steps}  loss {value:.3f}")
    model.train(was_training)
    return log


@dataclass(frozen=True)
class Scores:
    """How a model does on examples, in their order.

    Attributes:
        nats: Negative log-likelihood of each answer and its end, in nats.
        tokens: Tokens of each, the end included.
        exact: Whether each answer is what the model writes greedily: the likeliest token at every step, the end of
            text included, is the right one.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    exact: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """Nats a token of the answers."""
        return math.fsum(self.nats) / sum(self.tokens)

    @property
    def accuracy(self) -> float:
        """Share of answers that are exactly right."""
        return sum(self.exact) / len(self.exact)

    @property
    def standard_error(self) -> float:
        """Of ``accuracy``, that the choice of examples leaves."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.exact))


@torch.no_grad()
def score(model: nn.Module, examples: Sequence[Example], batch_size: int = 32) -> Scores:
    """Reads each example once and looks at how each token of its answer was predicted.

    No answer has to be written for that: greedy writing gives the right answer if, and only if, the likeliest token
    after each of its beginnings is the right one.

    Args:
        model: A ``Decoder`` or a model of transformers; its training mode is restored afterwards.
        examples: From ``encode``.
        batch_size: Examples that are read together; it changes nothing beyond rounding.
    """
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    nats, tokens, exact = [0.0] * len(order), [0] * len(order), [False] * len(order)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            batch = collate([examples[index] for index in rows], device=device)
            logits = model(batch.input_ids).logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")
            counted = batch.targets != IGNORED
            right = ((logits.argmax(-1) == batch.targets) | ~counted).all(-1)
            for row, index in enumerate(rows):
                nats[index] = float(losses[row].double().sum())
                tokens[index], exact[index] = int(counted[row].sum()), bool(right[row])
    finally:
        model.train(was_training)
    return Scores(tuple(nats), tuple(tokens), tuple(exact))


def write_answers(
    model: Decoder, tokenizer: Tokenizer, instructions: Sequence[Instruction], max_new_tokens: int = 20
) -> list[str]:
    """What the model answers, greedily, in the order of the instructions.

    Prompts of the same length are continued together, since padding would stand between a prompt and its answer.
    """
    prompts = tokenizer.encode_all([each.prompt for each in instructions])
    device, end = next(model.parameters()).device, tokenizer.end_of_text
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    answers = [""] * len(prompts)
    for length, rows in sorted(by_length.items()):
        ids = torch.tensor([[end, *prompts[index]] for index in rows], device=device)
        written = generate(model, ids, max_new_tokens, end_of_text=end)[:, length + 1 :].tolist()
        for index, row in zip(rows, written, strict=True):
            answers[index] = tokenizer.decode(row[: row.index(end)] if end in row else row).strip()
    return answers


def overlap(answer: str, truth: str) -> float:
    """How many words two answers share: the harmonic mean of precision and recall (Rajpurkar et al. 2016, section 6.1).

    Case and punctuation do not count; 1 means the same words, 0 none in common.
    """
    found, wanted = (Counter(re.findall(r"[^\W_]+", text.lower())) for text in (answer, truth))
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def overlaps(answers: Sequence[str], instructions: Sequence[Instruction]) -> list[float]:
    """``overlap`` of each answer with the right one."""
    return [overlap(answer, each.answer) for answer, each in zip(answers, instructions, strict=True)]
