"""The book's own checkpoints: what their cards say is what is measured, and their recipes begin as their logs do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medarch.lm import release, verify
from medarch.lm.catalogue import count_parameters, find_recipe, recipe_names
from medarch.lm.loading import checkpoints_folder, load
from medarch.lm.recipes import load_text

NAMES = recipe_names()


def read(name: str, file: str) -> dict[str, Any]:
    return json.loads((checkpoints_folder() / name / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_made_of_what_was_measured(name: str) -> None:
    facts, recipe = read(name, release.PROVENANCE), find_recipe(name)
    assert facts["training"] == json.loads(json.dumps(dataclasses.asdict(recipe.training)))
    assert facts["model"] == recipe.model.to_dict()
    assert (facts["parameters"]["total"], facts["parameters"]["active"]) == count_parameters(recipe.model)
    card = " --device cuda" * (facts["device"]["class"] == "cuda")
    assert facts["command"] == f"medarch train {name} --release{card}"
    text = (checkpoints_folder() / name / release.CARD).read_text(encoding="utf-8")
    assert text == release.model_card(recipe, facts)


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


READ_BY_TRANSFORMERS_ALONE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, file = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
assert not [name for name in sys.modules if name.startswith("medarch")]
torch.save((ids, logits), file)
"""


@pytest.mark.parametrize("name", NAMES)
def test_transformers_alone_has_the_same_logits(name: str, tmp_path: Path) -> None:
    text = "Seizure: An intermittent abnormality of nervous system physiology. \u2764 ß"
    model, tokenizer = load(name)
    command = [sys.executable, "-c", READ_BY_TRANSFORMERS_ALONE, str(checkpoints_folder() / name), text]
    read = subprocess.run([*command, str(tmp_path / "read.pt")], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    ids, logits = torch.load(tmp_path / "read.pt")
    assert ids.tolist() == [tokenizer.encode(text)]
    with torch.no_grad():
        ours = model(ids).logits
    assert float((ours - logits).abs().max()) < 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_and_the_figures_come_out_again(name: str) -> None:
    text, (_, tokenizer) = load_text(), load(name)
    assert tokenizer.encode(text.corpus.test[0].text) == text.tokenizer.encode(text.corpus.test[0].text)
    assert verify.check(name) == []


def test_a_checkpoint_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, log = read("dense", release.PROVENANCE), read("dense", release.LOG)
    log["steps"]["gradient_norm"][2] *= 1.01
    facts["results"]["test"]["bits_per_byte"] *= 1.001
    monkeypatch.setattr(verify, "_read", lambda name, file: {release.PROVENANCE: facts, release.LOG: log}[file])
    with pytest.raises(ValueError, match=r"(?s)gradient_norm of step 3 is.*bits per byte on the test text are"):
        verify.verify("dense")
    facts["data"]["sha256"] = "0"
    assert verify.check("dense") == ["the training text is another"]


def test_a_checkpoint_of_other_code_is_stale_until_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: dict[str, str] = {}

    def told(name: str, file: str) -> dict[str, str]:
        if file == release.PROVENANCE:
            return {"source_digest": "old"}
        return {"source_digest": verified[name]} if name in verified else {}

    monkeypatch.setattr(verify, "_read", told)
    assert set(verify.stale_checkpoints()) == set(NAMES)
    verified["moe"] = verify.source_digest(find_recipe("moe"))
    assert set(verify.stale_checkpoints()) == set(NAMES) - {"moe"}


def test_a_checkpoint_of_attention_does_not_stand_on_state_spaces() -> None:
    digests = {name: verify.source_digest(find_recipe(name)) for name in NAMES}
    assert digests["dense"] == digests["moe"]
    assert digests["mamba"] == digests["hybrid"] != digests["dense"]
