"""The book's own checkpoints: what their cards say is what is measured, and their recipes begin as their logs do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from medarch.lm import release
from medarch.lm.checkpoint import data_hash, load_state
from medarch.lm.evaluation import evaluate
from medarch.lm.loading import checkpoints_folder, load
from medarch.lm.recipes import RECIPES, count_parameters, load_text
from medarch.lm.training import train

NAMES = sorted(RECIPES)


def read(name: str, file: str) -> dict[str, Any]:
    return json.loads((checkpoints_folder() / name / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_made_of_what_was_measured(name: str) -> None:
    facts, recipe = read(name, release.PROVENANCE), RECIPES[name]
    assert facts["training"] == json.loads(json.dumps(dataclasses.asdict(recipe.training)))
    assert facts["model"] == recipe.model.to_dict()
    assert (facts["parameters"]["total"], facts["parameters"]["active"]) == count_parameters(recipe.model)
    assert facts["command"] == f"medarch train {name} --release"
    card = (checkpoints_folder() / name / release.CARD).read_text(encoding="utf-8")
    assert card == release.model_card(recipe, facts)


@pytest.mark.parametrize("name", NAMES)
def test_the_log_is_that_of_the_whole_run(name: str) -> None:
    log, facts = read(name, release.LOG), read(name, release.PROVENANCE)
    steps = facts["training"]["steps"]
    assert log["steps"]["step"] == list(range(1, steps + 1))
    assert log["evaluations"]["step"][-1] == steps
    # The last evaluation saw the unrounded weights; what bfloat16 changes is far below the error over documents.
    found = facts["results"]["validation"]
    assert abs(log["evaluations"]["bits_per_byte"][-1] - found["bits_per_byte"]) < 0.2 * found["standard_error"]


def test_the_files_are_as_small_as_promised() -> None:
    files = [path for path in checkpoints_folder().rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= release.MAX_FILE_BYTES
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert not [path.name for path in files if path.suffix not in {".json", ".safetensors", ".md"}]


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_bits_per_byte_are_measured_again(name: str) -> None:
    model, tokenizer = load(name)
    text, facts = load_text(), read(name, release.PROVENANCE)
    assert tokenizer.encode(text.corpus.test[0].text) == text.tokenizer.encode(text.corpus.test[0].text)
    found = evaluate(model, tokenizer, text.corpus.test, context=facts["training"]["length"])
    assert found.bits_per_byte == pytest.approx(facts["results"]["test"]["bits_per_byte"], rel=1e-4)
    assert found.perplexity == pytest.approx(facts["results"]["test"]["perplexity_per_token"], rel=1e-3)


class Enough(Exception):  # noqa: N818, it is no error
    """Raised after a few steps."""


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_begins_as_the_log_does(name: str, tmp_path: Path) -> None:
    text, log, recipe = load_text(), read(name, release.LOG), RECIPES[name]
    assert data_hash(text.tokens) == read(name, release.PROVENANCE)["data"]["sha256"]

    def stop(step: int) -> None:
        if step == 3:
            raise Enough

    training = dataclasses.replace(recipe.training, checkpoint_every=3)
    with pytest.raises(Enough):
        train(recipe.build(), text.tokens, training, tmp_path, before_step=stop)
    state = load_state(tmp_path)
    assert state is not None
    for number, entry in enumerate(state.log["steps"]):
        for quantity in ("loss", "learning_rate", "gradient_norm"):
            # Other processors round otherwise, and three steps let that grow a little.
            assert entry[quantity] == pytest.approx(log["steps"][quantity][number], rel=2e-3), (number, quantity)
