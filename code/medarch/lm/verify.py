"""Whether the committed checkpoints are still what the present code makes of their recipes.

A checkpoint carries the digest of the code that trained it. When that code changes, most changes leave the numbers
as they were (a new kind of layer, say), and training again to find out would be wasteful. So the first steps of the
recipe are repeated and held against the committed log, and the committed weights are evaluated again and held
against the committed figures. If both agree, the digest of the present code is written down beside the checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from medarch.bench import provenance
from medarch.lm.catalogue import find_recipe, recipe_names
from medarch.lm.checkpoint import data_hash, load_state, write_atomically
from medarch.lm.evaluation import evaluate
from medarch.lm.loading import checkpoints_folder, load
from medarch.lm.recipes import load_text
from medarch.lm.release import LOG, PROVENANCE, source_digest
from medarch.lm.training import train

VERIFIED = "verified.json"
STEPS = 3
# Processors round differently, and a few steps let that grow a little.
STEP_TOLERANCE, RESULT_TOLERANCE = 2e-3, 1e-4


class _EnoughError(Exception):
    """Ends a training that was only to begin."""


def first_steps(name: str, steps: int = STEPS) -> dict[str, list[float]]:
    """Trains a recipe for its first steps.

    Args:
        name: Of the recipe.
        steps: How many; the learning rates are those of the whole run.

    Returns:
        Loss, learning rate and norm of the gradient of each step.
    """
    recipe, text = find_recipe(name), load_text()

    def stop(step: int) -> None:
        if step == steps:
            raise _EnoughError

    with tempfile.TemporaryDirectory() as folder:
        try:
            training = dataclasses.replace(recipe.training, checkpoint_every=steps)
            train(recipe.build(), text.tokens, training, folder, before_step=stop)
        except _EnoughError:
            pass
        state = load_state(Path(folder))
    assert state is not None
    return {key: [entry[key] for entry in state.log["steps"]] for key in ("loss", "learning_rate", "gradient_norm")}


def check(name: str) -> list[str]:
    """Where the present code disagrees with a committed checkpoint; nothing where it agrees.

    Args:
        name: Of a committed checkpoint that has a recipe.

    Returns:
        One sentence for each disagreement.

    Raises:
        ValueError: There is no such recipe.
    """
    recipe, text = find_recipe(name), load_text()
    facts, log = _read(name, PROVENANCE), _read(name, LOG)
    told = []
    if json.loads(json.dumps(dataclasses.asdict(recipe.training))) != facts["training"]:
        told.append("the recipe's training is not the one that made it")
    if recipe.model.to_dict() != facts["model"]:
        told.append("the recipe's model is not the one that was trained")
    if data_hash(text.tokens) != facts["data"]["sha256"]:
        told.append("the training text is another")
    if told:
        return told
    for key, values in first_steps(name).items():
        for number, (found, logged) in enumerate(zip(values, log["steps"][key], strict=False), start=1):
            if not math.isclose(found, logged, rel_tol=STEP_TOLERANCE):
                told.append(f"{key} of step {number} is {found:.6g}, and {logged:.6g} in the log")
    model, tokenizer = load(name)
    result = evaluate(model, tokenizer, text.corpus.test, context=recipe.training.length)
    recorded = facts["results"]["test"]["bits_per_byte"]
    if not math.isclose(result.bits_per_byte, recorded, rel_tol=RESULT_TOLERANCE):
        told.append(f"bits per byte on the test text are {result.bits_per_byte:.6g}, and {recorded:.6g} on the card")
    return told


def verify(name: str) -> Path:
    """Checks a committed checkpoint against the present code, and writes down that it fits.

    Returns:
        The file that says so.

    Raises:
        ValueError: It does not; the message lists the disagreements.
    """
    told = check(name)
    if told:
        again = f"`medarch train {name} --release` makes it anew"
        raise ValueError(f"checkpoint {name!r} does not fit the present code: {'; '.join(told)}. {again}")
    facts = {
        "source_digest": source_digest(find_recipe(name)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps_repeated": STEPS,
        "versions": provenance.versions(),
    }
    path = checkpoints_folder() / name / VERIFIED
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())
    return path


def stale_checkpoints() -> dict[str, str]:
    """The committed checkpoints that were neither trained nor verified with the present code, each with what to do."""
    digests = {name: source_digest(find_recipe(name)) for name in recipe_names()}
    return {
        name: f"`medarch verify {name}`, and `medarch train {name} --release` if it does not fit any more"
        for name, digest in digests.items()
        if digest not in (_read(name, PROVENANCE)["source_digest"], _read(name, VERIFIED).get("source_digest"))
    }


def _read(name: str, file: str) -> dict[str, Any]:
    path = checkpoints_folder() / name / file
    if not path.is_file() and file == VERIFIED:
        return {}
    return json.loads(path.read_text(encoding="utf-8"))
