"""Recipes, and the way from a finished run to a checkpoint folder."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from medarch.cli import app
from medarch.data.corpus import Corpus, Document
from medarch.lm import recipes, release
from medarch.lm.batches import pack
from medarch.lm.checkpoint import FILE, load_state
from medarch.lm.config import DecoderConfig
from medarch.lm.evaluation import evaluate
from medarch.lm.loading import load
from medarch.lm.recipes import RECIPES, Recipe, Text, count_parameters, find_recipe
from medarch.lm.tokenizer import Tokenizer
from medarch.lm.training import TrainingConfig
from medarch.moe.config import MoEConfig

TINY = Recipe(
    "tiny",
    "a decoder for tests",
    DecoderConfig(300, 16, 24, 2, 2, feed_forwards=("moe",), moe=MoEConfig(16, 8, 4, 2), router_aux_loss_coef=0.01),
    TrainingConfig(steps=6, batch_size=2, length=12, warmup_steps=2, eval_every=3, checkpoint_every=2),
)


@pytest.fixture
def tiny_text(monkeypatch: pytest.MonkeyPatch) -> Text:
    def some(part: str, count: int) -> tuple[Document, ...]:
        return tuple(Document(f"{part} {n}", f"term {n}", f"term {n}: a {part} finding of {n}.", None)
                     for n in range(count))  # fmt: skip

    corpus = Corpus(some("common", 30), some("rare", 3), some("other", 4), some("foreign", 5))
    tokenizer = Tokenizer.train([document.text for document in corpus.train], 300)
    text = Text(corpus, tokenizer, pack(tokenizer, corpus.train))
    monkeypatch.setattr(release, "load_text", lambda: text)
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)
    return text


def test_the_two_models_compute_as_much_for_a_token_and_one_holds_more() -> None:
    dense, moe = (RECIPES[name] for name in ("dense", "moe"))
    assert dense.training == moe.training
    total, active = count_parameters(dense.model)
    assert total == active == sum(weight.numel() for weight in dense.build().parameters())
    moe_total, moe_active = count_parameters(moe.model)
    assert moe_total == sum(weight.numel() for weight in moe.build().parameters())
    routers = 4 * 8 * 192
    assert moe_active - routers == active
    assert moe_total - moe_active == 4 * 6 * 3 * 192 * 160  # six idle experts of three matrices in each of four layers


def test_the_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (TINY.change(seed=seed).build().embed_tokens.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_shorter_run_keeps_the_share_of_the_warm_up() -> None:
    assert find_recipe("moe").change(steps=300).training.warmup_steps == 20
    assert find_recipe("moe").change(steps=3).training.warmup_steps == 1
    assert find_recipe("moe").change(steps=300, warmup_steps=7).training.warmup_steps == 7
    assert find_recipe("moe").change(seed=4).training.warmup_steps == 100


def test_a_run_is_exported_with_what_was_measured(tiny_text: Text, tmp_path: Path) -> None:
    folder = release.run_recipe(TINY, tmp_path, command="medarch train tiny")
    assert folder == tmp_path / "checkpoint"
    facts = json.loads((folder / release.PROVENANCE).read_text())
    # Measured on what was written, which is rounded to bfloat16, and not on the model that it came from.
    stored, tokenizer = load(str(folder))
    measured = evaluate(stored, tokenizer, tiny_text.corpus.test, context=12)
    assert facts["results"]["test"]["bits_per_byte"] == pytest.approx(measured.bits_per_byte, rel=1e-5)
    state = load_state(tmp_path)
    assert state is not None
    exact = TINY.build()
    exact.load_state_dict(state.weights)
    unrounded = evaluate(exact, tokenizer, tiny_text.corpus.test, context=12).bits_per_byte
    assert abs(facts["results"]["test"]["bits_per_byte"] - unrounded) > 1e-5 * unrounded
    assert set(facts["results"]) == {"validation", "test", "out_of_domain"}
    assert facts["data"]["documents"] == {"train": 30, "validation": 3, "test": 4, "out_of_domain": 5}
    assert facts["source_digest"] == release.source_digest(TINY)
    assert facts["parameters"]["total"] == sum(weight.numel() for weight in exact.parameters())
    log = json.loads((folder / release.LOG).read_text())
    assert log["steps"]["loss"] == pytest.approx([entry["loss"] for entry in state.log["steps"]], rel=1e-6)
    assert log["evaluations"]["step"] == [3, 6]
    card = (folder / release.CARD).read_text()
    assert card == release.model_card(TINY, facts)
    foreign = facts["results"]["out_of_domain"]["bits_per_byte"]
    for shown in (
        f"| 4 test definitions | {measured.bits_per_byte:.3f} ± {measured.standard_error:.3f}",
        f"| 5 entries of ICD-10-CM (out of domain) | {foreign:.3f}",
        f"holds {facts['parameters']['total']:,} weights",
        "medarch train tiny",
        "Not for clinical use",
    ):
        assert shown in card


def test_a_file_that_is_too_large_is_refused(tiny_text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(ValueError, match="exceeds 10,000 bytes"):
        release.run_recipe(TINY, tmp_path)


def test_a_full_disk_at_the_export_keeps_the_run(tiny_text: Text, tmp_path: Path) -> None:
    release.run_recipe(TINY, tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint could not be written \(File too large\); .* is kept: make room"):
            release.run_recipe(TINY, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    made = release.run_recipe(TINY, tmp_path)
    assert made is not None
    assert load(made)[0].config.moe == TINY.model.moe


def test_a_file_in_the_place_of_the_folder_is_refused_before_training(tiny_text: Text, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match=r"taken is no folder for a run \(File exists\): name another"):
        release.run_recipe(TINY, tmp_path / "taken", report=lambda line: pytest.fail(f"trained: {line}"))


def test_the_command_trains_goes_on_and_publishes(
    tiny_text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "checkpoints_folder", lambda: tmp_path / "checkpoints")
    run = CliRunner().invoke
    first = run(app, ["train", "tiny", "--folder", str(tmp_path / "run"), "--release"])
    assert first.exit_code == 0, first.output
    assert "step 6/6" in first.output
    published = tmp_path / "checkpoints" / "tiny"
    assert f"The checkpoint is in {published}." in first.output
    assert "medarch train tiny --release" in (published / "README.md").read_text()
    (published / "stale.safetensors").touch()
    second = run(app, ["train", "tiny", "--folder", str(tmp_path / "run"), "--release"])
    assert second.exit_code == 0
    assert "step" not in second.output.replace("steps", "")  # nothing was left to train
    assert sorted(path.name for path in published.iterdir()) == sorted(
        path.name for path in (tmp_path / "run" / "checkpoint").iterdir()
    )


def test_the_command_says_in_one_line_what_is_wrong(tiny_text: Text, tmp_path: Path) -> None:
    run = CliRunner().invoke
    folder = ["--folder", str(tmp_path / "run")]
    assert run(app, ["train", "tiny", *folder, "--steps", "4"]).exit_code == 0
    before = (tmp_path / "run" / FILE).read_bytes()
    cases = {
        "no recipe 'large'; there are: dense, moe": ["large"],
        "it takes neither --steps nor --seed": ["tiny", "--release", "--steps", "3"],
        "training.steps was 4 and is now 5": ["tiny", *folder, "--steps", "5"],
        "steps must be a whole number": ["tiny", *folder, "--steps", "0"],
    }
    for words, line in cases.items():
        result = run(app, ["train", *line])
        assert result.exit_code == 1
        assert words in result.output
        assert len(result.output.strip().splitlines()) == 1
        assert "Traceback" not in result.output
    assert (tmp_path / "run" / FILE).read_bytes() == before


def test_a_device_that_is_not_there_is_refused(
    tiny_text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["train", "tiny", "--folder", str(tmp_path), "--device", "cuda"])
    assert result.exit_code == 1
    assert "torch finds no CUDA device" in result.output
