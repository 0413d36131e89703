"""From a finished run to a checkpoint folder: weights that other libraries open, measurements, and a model card."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medarch.bench import provenance
from medarch.data import hpo, icd
from medarch.data.cards import DataCard
from medarch.lm.bridge import MAX_FILE_BYTES, from_pretrained, save_pretrained
from medarch.lm.catalogue import count_parameters
from medarch.lm.checkpoint import data_hash, write_atomically
from medarch.lm.decoder import Decoder
from medarch.lm.distributed import workers
from medarch.lm.evaluation import evaluate
from medarch.lm.hybrid_recipes import HybridRecipe
from medarch.lm.loading import checkpoints_folder
from medarch.lm.recipes import Recipe, load_text, validation
from medarch.lm.training import TrainingLog, train

MEASURED = ("validation", "test", "out_of_domain")
BEHIND = ("medarch.lm.recipes", "medarch.lm.training", "medarch.lm.evaluation")
# What keeps a run and joins processes, but changes no number of a run in one process.
BOOKKEEPING = ("medarch.lm.checkpoint", "medarch.lm.distributed")
LOG, PROVENANCE, CARD = "training-log.json", "provenance.json", "README.md"


def source_digest(recipe: Recipe) -> str:
    """Digest of the code that a checkpoint of the book stands on."""
    own = ("medarch.lm.hybrid_recipes",) if isinstance(recipe, HybridRecipe) else ()
    return provenance.source_digest((*BEHIND, *own), without=BOOKKEEPING)


def run_recipe(
    recipe: Recipe,
    folder: Path,
    device: str = "cpu",
    command: str = "",
    report: Callable[[str], None] | None = None,
) -> Path | None:
    """Trains a recipe, or goes on with it, and exports the finished model.

    Args:
        recipe: What to train.
        folder: Where the run's state is kept.
        device: ``"cpu"`` or ``"cuda"``; under ``torchrun`` each process takes the GPU of its local rank.
        command: What makes this run again, for the model card.
        report: Called with lines of progress.

    Returns:
        The folder of the exported checkpoint, ``checkpoint`` below ``folder``; None in all processes but the first.

    Raises:
        ValueError, FloatingPointError, OSError: As ``train`` does.
    """
    machine = provenance.device(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{folder} is no folder for a run ({error.strerror}): name another one") from error
    digest, date = source_digest(recipe), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with workers(device) as group:
        text = load_text()
        model = recipe.build(group.device(device))
        log = train(
            model,
            text.tokens,
            recipe.training,
            folder,
            evaluate=validation(text.tokenizer, text.corpus.validation, recipe.training.length),
            report=report,
            workers=group,
        )
        if not group.first:
            return None
        facts = {
            "recipe": recipe.name,
            "command": command or f"medarch train {recipe.name}",
            "date": date,
            "device": machine | {"processes": group.size, "threads": torch.get_num_threads()},
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "source_digest": digest,
            "training": dataclasses.asdict(recipe.training),
            "data": {
                "sha256": data_hash(text.tokens),
                "tokens": len(text.tokens),
                "documents": {part: len(getattr(text.corpus, part)) for part in ("train", *MEASURED)},
            },
        }
    try:
        return export(model.cpu(), recipe, log, facts, folder / "checkpoint")
    except Exception as error:
        # Where its file cannot be written, the tokenizers library raises an exception without a kind.
        if not isinstance(error, OSError) and type(error) is not Exception:
            raise
        cause = getattr(error, "strerror", None) or error
        raise OSError(
            getattr(error, "errno", None),
            f"{folder / 'checkpoint'} could not be written ({cause}); the finished run in {folder} is kept: make room "
            "and give the same command again",
        ) from error


def export(model: Decoder, recipe: Recipe, log: TrainingLog, facts: dict[str, Any], folder: Path) -> Path:
    """Writes a checkpoint folder and measures what was written, the rounded weights and not those they came from.

    Args:
        model: The trained model.
        recipe: What it was trained by.
        log: What training measured.
        facts: Where the run comes from; the measurements are added to them.
        folder: Where to; an earlier export there is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: If a file of the checkpoint exceeds ``MAX_FILE_BYTES``.
    """
    text = load_text()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_pretrained(model, text.tokenizer, folder, dtype=torch.bfloat16)
    large = [path.name for path in folder.iterdir() if path.stat().st_size > MAX_FILE_BYTES]
    if large:
        raise ValueError(f"{folder / large[0]} exceeds {MAX_FILE_BYTES:,} bytes, the most that one file may have")
    stored, tokenizer = from_pretrained(folder)
    total, active = count_parameters(recipe.model)
    results = {}
    for part in MEASURED:
        measured = evaluate(stored, tokenizer, getattr(text.corpus, part), context=recipe.training.length)
        results[part] = {
            "bits_per_byte": measured.bits_per_byte,
            "standard_error": measured.standard_error,
            "perplexity_per_token": measured.perplexity,
            "tokens": measured.tokens,
            "bytes": measured.bytes,
        }
    facts = facts | {
        "model": recipe.model.to_dict(),
        "parameters": {"total": total, "active": active},
        "seconds": round(log.seconds, 1),
        "tokens_trained_on": log.tokens,
        "results": results,
    }
    for name, content in ((LOG, compact_log(log)), (PROVENANCE, facts)):
        write_atomically(folder / name, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / CARD, model_card(recipe, facts).encode())
    return folder


def publish(checkpoint: Path, name: str) -> Path:
    """Puts an exported checkpoint in the place of the book's own of that name."""
    target = checkpoints_folder() / name
    target.mkdir(parents=True, exist_ok=True)
    for old in target.iterdir():
        if not (checkpoint / old.name).exists():
            old.unlink()
    for path in sorted(checkpoint.iterdir()):
        write_atomically(target / path.name, path.read_bytes())
    return target


def compact_log(log: TrainingLog) -> dict[str, Any]:
    """The log by column, with seven significant digits: what float32 holds."""

    def columns(entries: list[dict[str, float]]) -> dict[str, list[float]]:
        return {name: [_short(entry[name]) for entry in entries] for name in (entries[0] if entries else {})}

    return {"steps": columns(log.steps), "evaluations": columns(log.evaluations)}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _mixers(model: dict[str, Any]) -> str:
    """What the layers mix positions by, for the card."""
    told = []
    if "mamba" in model["mixers"]:
        told.append(f"a state of {model['mamba']['state_size']} numbers in each channel of a Mamba layer,")
    if "attention" in model["mixers"]:
        heads, shared = model["num_attention_heads"], model["num_key_value_heads"]
        told.append(f"{heads} attention heads that share {shared} key and value head{'s' * (shared > 1)},")
    return " ".join(told)


def model_card(recipe: Recipe, facts: dict[str, Any]) -> str:
    """The README of a checkpoint, every number of which is taken from what was measured.

    Args:
        recipe: What the model was trained by.
        facts: The content of ``provenance.json``.

    Returns:
        Markdown with the front matter that model hubs read.
    """
    training, results, device, documents = (
        facts["training"], facts["results"], facts["device"], facts["data"]["documents"]
    )  # fmt: skip
    model = facts["model"]
    names = {
        "validation": "validation definitions",
        "test": "test definitions",
        "out_of_domain": "entries of ICD-10-CM (out of domain)",
    }
    rows = "\n".join(
        f"| {documents[part]:,} {names[part]} | {result['bits_per_byte']:.3f} ± {result['standard_error']:.3f} "
        f"| {result['perplexity_per_token']:.1f} |"
        for part, result in results.items()
    )
    epochs = facts["tokens_trained_on"] / facts["data"]["tokens"]
    return f"""---
license: cc-by-4.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A small language model of clinical findings: {recipe.name}

This is {recipe.summary}, with {model["num_hidden_layers"]} layers of width {model["hidden_size"]}, \
{_mixers(model)} \
and a vocabulary of {model["vocab_size"]:,} byte-pair tokens. It holds {facts["parameters"]["total"]:,} weights, \
of which one token meets {facts["parameters"]["active"]:,}. It was made to be taken apart in a textbook. It writes \
sentences in the style of a dictionary of clinical findings, and what they say is not to be relied on. \
**Not for clinical use.**

## Measured

The weights as they are stored here, in bfloat16, computed with in float32:

| Text | Bits per byte | Perplexity per token |
| --- | --- | --- |
{rows}

Behind ± stands one standard error over the choice of documents. A document longer than the {training["length"]} \
tokens of a training window was read in overlapping windows of that length. Another seed changes the result as well; \
the book's record `lm/checkpoint-spread` says by how much in shorter runs. Perplexity per token compares only models \
that share this tokenizer.

## Training

{documents["train"]:,} definitions of the Human Phenotype Ontology ({facts["data"]["tokens"]:,} tokens), read about \
{epochs:.1f} times: {training["steps"]:,} steps of {training["batch_size"]} × {training["length"]} tokens with AdamW, \
learning rate {training["learning_rate"]:g} after {training["warmup_steps"]} steps of warm-up, falling along a cosine \
to {training["min_lr_ratio"]:g} of it, weight decay {training["weight_decay"]:g}, gradients clipped at \
{training["clip"]:g}, seed {training["seed"]}. It took {facts["seconds"] / 60:.0f} minutes on {_machine(device)}, \
with PyTorch {facts["versions"]["torch"]}. `training-log.json` holds the loss of every step, `provenance.json` the \
hash of the data, the digest of the code and the versions. To make it again:

```
{facts["command"]}
```

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("book/checkpoints/{recipe.name}")
tokenizer = AutoTokenizer.from_pretrained("book/checkpoints/{recipe.name}")
```

The book's own code opens it with `medarch.lm.loading.load("{recipe.name}")`.

## Data

Trained on and tested with: {_cited(hpo.CARD)}

Tested on, and never trained on: {_cited(icd.CARD)}
"""


def _cited(card: DataCard) -> str:
    """A data card in one paragraph."""
    barred = card.may_not_be_used_for
    return f"{card.citation}. {card.licence}. It may not be used for: {barred[0].lower()}{barred[1:]}."


def _machine(device: dict[str, Any]) -> str:
    if "gpu" in device:
        return f"{device['processes']} × {device['gpu']}"
    threads = device["threads"] * device["processes"]
    return f"{threads} {'thread' if threads == 1 else 'threads'} of a processor ({device['cpu']})"
