"""The book's four checkpoints side by side: how well they predict, what they find again, and what a token costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.bench.timing import compare
from medarch.data.corpus import Document
from medarch.lm.catalogue import count_parameters
from medarch.lm.decoder import Decoder
from medarch.lm.evaluation import Evaluation, evaluate
from medarch.lm.loading import load
from medarch.lm.recipes import load_text
from medarch.lm.study_spread import error_of_difference
from medarch.lm.tokenizer import Tokenizer

NAME = "lm/four-checkpoints"
CHECKPOINTS = ("dense", "moe", "mamba", "hybrid")
BASELINE = "dense"
PARTS = ("test", "out_of_domain")
CONTEXT = 256  # tokens of a training window
DISTANCES = (0, 64, 128)
LENGTHS = (64, 512, 4096, 16384)


class Readings(NamedTuple):
    """Texts of which each holds one definition twice, with other definitions in between.

    Attributes:
        input_ids: The texts, padded at their right ends.
        first: Where the definition's tokens stand when it is read for the first time.
        second: Where they stand when it is read again.
        sizes: Bytes of each definition, its first token left out.
    """

    input_ids: Int[Tensor, "texts time"]
    first: Int[Tensor, "texts tokens"]
    second: Int[Tensor, "texts tokens"]
    sizes: Int[Tensor, "texts"]


def repeated(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    distance: int,
    tokens: int = 32,
    count: int = 200,
    generator: torch.Generator | None = None,
) -> Readings:
    """Definitions that come twice: the first ``tokens`` of one, then of others up to ``distance`` more, then again.

    A model that has read a text is asked for what it has read. Every text begins with an end of text, and so does each
    definition in it, as in the training data.

    Args:
        tokenizer: Of the model.
        texts: Definitions; those of fewer than ``tokens`` tokens are left out.
        distance: Tokens between the end of the first reading and the end of text before the second.
        tokens: Length of the definition that is read twice, cut to it.
        count: Texts to make.
        generator: Source of randomness for what stands in between.

    Raises:
        ValueError: If a size is out of its range, or no text is long enough.
    """
    if distance < 0 or tokens < 1 or count < 1:
        raise ValueError(f"distance={distance}, tokens={tokens} and count={count}: none may be less than 0, 1 and 1")
    encoded = [tokenizer.encode(text) for text in texts]
    chosen = [ids[:tokens] for ids in encoded if len(ids) >= tokens][:count]
    if not chosen:
        raise ValueError(f"none of the {len(encoded)} texts has tokens={tokens}")
    end = tokenizer.end_of_text
    rows = []
    for ids in chosen:
        between: list[int] = []
        while len(between) < distance:
            other = encoded[int(torch.randint(len(encoded), (1,), generator=generator))]
            between += [] if other[:tokens] == ids else [end, *other]
        rows.append([end, *ids, *between[:distance], end, *ids])
    places = torch.arange(tokens).expand(len(rows), -1)
    sizes = torch.tensor([len(tokenizer.decode(ids[1:]).encode()) for ids in chosen])
    return Readings(torch.tensor(rows), places + 1, places + tokens + distance + 2, sizes)


def random_twice(vocab_size: int, tokens: int, count: int, generator: torch.Generator) -> Readings:
    """Random tokens, and the same once more: nothing but the memory of what was read can tell what comes next."""
    ids = torch.randint(1, vocab_size, (count, tokens), generator=generator)
    places = torch.arange(tokens).expand(count, -1)
    return Readings(ids.repeat(1, 2), places, places + tokens, torch.full((count,), tokens))


@torch.no_grad()
def read_twice(model: Decoder, readings: Readings, batch_size: int = 50) -> dict[str, Any]:
    """How well a model predicts a definition when it reads it for the first time, and when it reads it again.

    The first token of either reading is left out: at the first token of a repetition nothing says yet that it is one.

    Returns:
        For each reading ``bits_per_byte`` with its ``standard_error`` over the texts, and ``right``, the share of
        tokens that the model named as the likeliest.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {"first": [], "second": []}
    right: dict[str, list[Tensor]] = {"first": [], "second": []}
    for start in range(0, len(readings.input_ids), batch_size):
        ids = readings.input_ids[start : start + batch_size].to(device)
        logits = model(ids[:, :-1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        hits = logits.argmax(-1) == ids[:, 1:]
        for name in found:
            # The prediction of a token stands one position before it.
            places = getattr(readings, name)[start : start + batch_size, 1:].to(device) - 1
            found[name].append(losses.gather(1, places).sum(1).double().cpu())
            right[name].append(hits.gather(1, places).double().mean(1).cpu())
    results = {}
    for name in found:
        nats, share = torch.cat(found[name]).tolist(), torch.cat(right[name])
        measured = Evaluation(tuple(nats), (readings.first.shape[1] - 1,) * len(nats), tuple(readings.sizes.tolist()))
        results[name] = {
            "bits_per_byte": measured.bits_per_byte,
            "standard_error": measured.standard_error,
            "right": float(share.mean()),
            "right_error": float(share.std() / math.sqrt(len(share))),
        }
    return results


@torch.no_grad()
def name_gain(
    model: Decoder, tokenizer: Tokenizer, documents: Sequence[Document], batch_size: int = 50
) -> dict[str, Any]:
    """What a model makes of the name when it predicts the definition behind it: the true name against another's.

    Every definition is read twice, once behind its own name and once behind that of the next document in the list, and
    the same tokens are scored both times.

    Args:
        model: The decoder.
        tokenizer: Its tokenizer.
        documents: Documents whose text is the name, a colon and the definition; two or more.

    Returns:
        Bits per byte of the definitions behind ``own`` and ``other`` names, and their ``gain`` with its
        ``standard_error`` over the documents.

    Raises:
        ValueError: If there are fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} document(s): the name of another one is needed")
    texts = [document.text.removeprefix(f"{document.name}:") for document in documents]
    definitions = [tokenizer.encode(text)[: CONTEXT // 2] for text in texts]
    sizes = [len(tokenizer.decode(ids).encode()) for ids in definitions]
    names = [tokenizer.encode(f"{document.name}:")[: CONTEXT // 2 - 1] for document in documents]
    nats = {
        kind: _definition_nats(model, tokenizer.end_of_text, given, definitions, batch_size)
        for kind, given in (("own", names), ("other", names[1:] + names[:1]))
    }
    gap = error_of_difference(*({"document_nats": nats[kind], "document_bytes": sizes} for kind in ("other", "own")))
    bits = {kind: math.fsum(values) / (math.log(2) * sum(sizes)) for kind, values in nats.items()}
    return bits | {"gain": bits["other"] - bits["own"], "standard_error": gap}


@contextmanager
def silenced(layer: Any) -> Iterator[None]:
    """While it lasts, the layer's mixer adds nothing to the residual stream."""
    hook = layer.mixer.register_forward_hook(lambda mixer, inputs, answer: torch.zeros_like(answer))
    try:
        yield
    finally:
        hook.remove()


def _definition_nats(
    model: Decoder, end: int, names: list[list[int]], definitions: list[list[int]], batch_size: int
) -> list[float]:
    device = next(model.parameters()).device
    nats: list[float] = []
    for first in range(0, len(names), batch_size):
        heads, tails = names[first : first + batch_size], definitions[first : first + batch_size]
        rows = [[end, *head, *tail] for head, tail in zip(heads, tails, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=device)
        losses = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for row, head, loss in zip(rows, heads, losses.view(len(rows), -1).double(), strict=True):
            nats.append(float(loss[len(head) : len(row) - 1].sum()))  # padding stands behind, and is not scored
    return nats


def silence_each(model: Decoder, tokenizer: Tokenizer, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """``name_gain`` with one mixer after the other taken out, and with all of them in place as the last entry.

    Args:
        model: The decoder.
        tokenizer: Its tokenizer.
        documents: As for ``name_gain``.

    Returns:
        One entry a layer, with its ``mixer``, and one with ``mixer`` None.
    """
    found = []
    for layer, (mixer, _) in zip(model.layers, model.config.layer_kinds, strict=True):
        with silenced(layer):
            found.append({"mixer": mixer} | name_gain(model, tokenizer, documents))
    return [*found, {"mixer": None} | name_gain(model, tokenizer, documents)]


def lengthened(model: Decoder, context: int) -> Decoder:
    """The same model, allowed to read ``context`` tokens; beyond those that it was trained on its words mean little."""
    model.config = dataclasses.replace(model.config, max_position_embeddings=context)
    return model


@torch.no_grad()
def next_token_call(model: Decoder, length: int, piece: int = 512) -> tuple[Callable[[], Tensor], int]:
    """What reads one more token after ``length`` others, any number of times, and the bytes of what was kept of them.

    Args:
        model: On the device where it is to be timed.
        length: Tokens read before; random ones.
        piece: How many of them are read at once, so that long prompts need no long rows of attention scores.

    Returns:
        A function without arguments, and the bytes of its memory.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(model.config.vocab_size, (1, length + 1), generator=generator).to(device)
    cache = model.new_cache(1, length + 1)
    for part in ids[:, :length].split(piece, dim=1):
        model(part, cache=cache, logits_to_keep=1)
    kept = cache.used_bytes

    @torch.no_grad()
    def call() -> Float[Tensor, "batch time vocab"]:
        answer = model(ids[:, length:], cache=cache, logits_to_keep=1).logits
        for layer in cache.layers:
            layer.length = length  # keys and values of the token are overwritten next time; a state goes on from it
        return answer

    return call, kept


def measure(name: str, device: str, documents: int | None, count: int) -> dict[str, Any]:
    """Everything about one checkpoint but its speed.

    Args:
        name: Of the checkpoint.
        device: Where to run.
        documents: How many documents of each part to read, all where it is None.
        count: Texts for the questions about what was read.

    Returns:
        ``results``, and ``evaluated`` with each document's part in them.
    """
    text = load_text()
    definitions = [document.text for document in text.corpus.test]
    model, tokenizer = load(name, device)
    total, active = count_parameters(model.config)
    results: dict[str, Any] = {"parameters": {"total": total, "active": active}}
    evaluated: dict[str, Any] = {}
    for part in PARTS:
        found = evaluate(model, tokenizer, getattr(text.corpus, part)[:documents], context=CONTEXT)
        evaluated[part] = {
            "document_nats": list(found.document_nats), "document_bytes": list(found.document_bytes)
        }  # fmt: skip
        results[part] = {"bits_per_byte": found.bits_per_byte, "standard_error": found.standard_error}
    results["again"] = {
        str(distance): read_twice(
            model,
            repeated(tokenizer, definitions, distance, count=count, generator=torch.Generator().manual_seed(0)),
        )
        for distance in DISTANCES
    }
    results["name"] = name_gain(model, tokenizer, text.corpus.test[:documents])
    generator = torch.Generator().manual_seed(0)
    results["random"] = read_twice(model, random_twice(len(tokenizer), 64, count, generator))
    if name == "hybrid":
        results["silenced"] = silence_each(model, tokenizer, text.corpus.test[:count])
    return {"results": results, "evaluated": evaluated}


@benchmark(NAME, modules=["medarch.lm.study_four"])
def four_checkpoints(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """The committed dense, sparse, Mamba and hybrid checkpoints: bits per byte, recall of what was read, decode cost.

    Bits per byte are those of whole documents, each by itself, with the standard error over documents; the difference
    to the dense model is taken document by document. Recall is measured on the checkpoints as they are, without any
    further training: the first 32 tokens of a test definition, then other definitions, then the same tokens again; 64
    random tokens twice; and definitions behind their own name and behind that of another, for the hybrid also with one
    mixer after the other taken out. Decode cost is the time of one more token after a number of others, in turns with
    the dense model, and the bytes kept of those others.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to take a few documents and short lengths only, to see that everything works.

    Returns:
        The results by checkpoint, and the timings by length.
    """
    documents, count, rounds = (8, 5, 2) if quick else (None, 200, 15)
    lengths = LENGTHS[:2] if quick else LENGTHS
    parts = Partials(find(NAME), device, quick)
    models: dict[str, dict[str, Any]] = {}
    evaluated: dict[str, dict[str, Any]] = {}
    for name in CHECKPOINTS:
        measured = parts.get(name, partial(measure, name, device, documents, count))
        models[name], evaluated[name] = measured["results"], measured["evaluated"]
        print(f"{name}: {models[name]['test']['bits_per_byte']:.4f} bits per byte on test", flush=True)
    for name in CHECKPOINTS:
        for part in PARTS:
            gap = models[name][part]["bits_per_byte"] - models[BASELINE][part]["bits_per_byte"]
            error = error_of_difference(evaluated[name][part], evaluated[BASELINE][part])
            models[name][part]["over_dense"] = {"difference": gap, "standard_error": error}
    decoders = {name: lengthened(load(name, device)[0], max(lengths) + 1) for name in CHECKPOINTS}
    decode = {}
    for length in lengths:
        calls = {name: next_token_call(model, length) for name, model in decoders.items()}
        for name, (_, kept) in calls.items():
            models[name].setdefault("memory_bytes", {})[str(length)] = kept
        timed = compare(
            {name: call for name, (call, _) in calls.items()}, baseline=BASELINE, rounds=rounds, device=device
        )
        decode[str(length)] = timed.to_dict()
    return {
        "repeats": rounds,
        "texts": count,
        "documents": {part: len(evaluated[BASELINE][part]["document_bytes"]) for part in PARTS},
        "distances": list(DISTANCES),
        "lengths": list(lengths),
        "models": models,
        "decode": decode,
    }
