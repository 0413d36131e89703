"""The study of instruction tuning: its pieces on few examples, and what the page says of its record."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medarch.adaptation.lora import adapters
from medarch.bench.records import load_named
from medarch.data.instructions import Instruction, Instructions, load_instructions
from medarch.lm import study_instructions as study
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.instruction_baselines import logistic_regression, most_frequent, nearest_definition
from medarch.lm.instruction_tuning import Batch, encode
from medarch.lm.training import TrainingLog

LOG = TrainingLog([{"loss": 1.0}])


def asked(*pairs: tuple[str, str]) -> list[Instruction]:
    return [Instruction(f"HP:{number}", "name", text, answer) for number, (text, answer) in enumerate(pairs)]


TRAIN = asked(
    ("A red eye.", "eye"), ("An eye that waters.", "eye"), ("A murmur of the heart.", "heart"), ("A dry eye.", "eye")
)


def test_the_baselines_by_hand() -> None:
    questions = asked(("The heart beats.", "heart"), ("An eye.", "eye"))
    assert most_frequent(TRAIN, questions) == ["eye", "eye"]
    assert logistic_regression(TRAIN, questions) == ["heart", "eye"]
    named = asked(
        ("Fluid below the skin.", "Oedema"), ("Pain behind the eye.", "Headache"), ("Skin of one colour.", "A")
    )
    assert nearest_definition(named, asked(("Pain of the eye.", ""), ("Fluid skin below.", ""))) == [
        "Headache",
        "Oedema",
    ]
    for method in (most_frequent, logistic_regression, nearest_definition):
        with pytest.raises(ValueError, match="no instructions to learn from"):
            method([], questions)


def test_baselines_learn_from_the_training_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def kept(method: Any) -> Any:
        def call(train: list[Instruction], questions: list[Instruction]) -> list[str]:
            seen[method.__name__] = {each.term_id for each in train}, {each.term_id for each in questions}
            return method(train, questions)

        call.__name__ = method.__name__
        return call

    for method in (most_frequent, logistic_regression, nearest_definition):
        monkeypatch.setattr(study, method.__name__, kept(method))
    study._baselines(quick=True)
    terms = {part: {each.term_id for each in getattr(load_instructions(), part)} for part in ("train", "test")}
    assert len(seen) == 3
    for learned, asked_for in seen.values():
        assert learned <= terms["train"]
        assert asked_for <= terms["test"]
        assert not learned & asked_for


def test_a_run_trains_on_one_part_and_measures_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    train, test = tuple(asked(("A red eye.", "eye"))) * 8, tuple(asked(("An ear.", "ear")))
    monkeypatch.setattr(study, "held", lambda *_: Instructions(train, (), test))
    monkeypatch.setattr(study, "check_gradients", lambda *_: seen.update(checked=True))
    monkeypatch.setattr(study, "encode", lambda tokenizer, part: seen.update(encoded=part) or encode(tokenizer, part))
    monkeypatch.setattr(study, "tune", lambda _model, _examples, config: seen.update(rate=config.learning_rate) or LOG)
    monkeypatch.setattr(study, "measure", lambda _model, _tokenizer, part: seen.update(measured=part) or {})
    study._run("mamba, in_proj, rank 8", 0, 1, "cpu", True)
    assert seen == {"checked": True, "encoded": train, "rate": study.RATES[True], "measured": test}
    assert study.RATES[True] > study.RATES[False]


def test_every_variant_can_be_made_and_differs_by_seed() -> None:
    for variant, (base, config) in study.VARIANTS.items():
        first, _ = study.prepare(variant, 0)
        found = adapters(first)
        if config is None:
            assert not found
            assert all(parameter.requires_grad for parameter in first.parameters())
        else:
            layers = 6 if base == "mamba" else 4
            assert len(found) == layers * len(config.targets)
    assert set(study.COSTED) <= set(study.VARIANTS)
    one, two = (adapters(study.prepare("mamba, in_proj, rank 8", seed)[0]) for seed in (1, 2))
    assert not torch.equal(one["layers.0.mixer.in_proj"].A, two["layers.0.mixer.in_proj"].A)


def test_a_step_moves_what_is_trained_and_leaves_no_gradient() -> None:
    model = Decoder(DecoderConfig(23, 12, 14, 1, 2), torch.Generator().manual_seed(0))
    tokens = torch.randint(23, (2, 8), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 7, dtype=torch.bool))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    study.make_step(model, batch)()
    assert not [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert all(weight.grad is None for weight in model.parameters())


def test_the_study_is_resumable_and_compares_with_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Kept:
        def __init__(self, *_: object) -> None:
            pass

        def get(self, key: str, compute: Any) -> Any:
            return made.setdefault(key, compute())

    def scores(value: float) -> dict[str, Any]:
        each = {"loss": value, "accuracy": value / 10, "overlap": value / 20}
        return {"name": dict(each), "system": dict(each)}

    monkeypatch.setattr(study, "Partials", Kept)
    monkeypatch.setattr(study, "_base", lambda base, *_: scores(5.0 + (base == "dense")))
    monkeypatch.setattr(study, "_counts", lambda *_: {})
    monkeypatch.setattr(study, "_baselines", lambda *_: {})
    monkeypatch.setattr(study, "_step_cost", lambda *_: {})
    monkeypatch.setattr(
        study,
        "_run",
        lambda variant, seed, *_: scores(1.0 + seed) | {"trainable": 7, "seconds_per_step": 1.0, "curve": [2.0]},
    )
    results = study.instruction_tuning()
    assert len(made) == 2 + 3 * len(study.VARIANTS) + 2 + len(study.STEP_SHAPES)
    first = results["variants"]["mamba, in_proj, rank 8"]
    assert first["system"]["loss"]["values"] == [1.0, 2.0, 3.0]
    assert first["system"]["loss_minus_base"]["values"] == [-4.0, -3.0, -2.0]
    assert results["variants"]["dense, every weight"]["name"]["loss_minus_base"]["mean"] == pytest.approx(-4.0)
    assert first["name"]["overlap"]["mean"] == pytest.approx(0.1)
    assert (results["repeats"], first["lora"]["targets"]) == (3, ["in_proj"])


def test_the_record_says_what_the_page_says_of_it() -> None:
    record = load_named(study.NAME)
    results = record.results
    assert record.repeats == len(results["seeds"]) == 3
    assert (results["steps"], results["batch_size"], results["longest"]) == (study.STEPS, 8, 96)
    # The fine-tuned Mamba beats its base, with every kind of LoRA, on both tasks, whatever the seed.
    for name, variant in results["variants"].items():
        for task in ("name", "system"):
            assert max(variant[task]["loss_minus_base"]["values"]) < 0, (name, task)
            assert variant[task]["loss_minus_base"]["high"] < 0
        assert variant["system"]["accuracy_minus_base"]["low"] > 0 or "x_proj and dt_proj" in name
    sizes = {name: variant["trainable"] for name, variant in results["variants"].items()}
    assert sizes["mamba, all four, rank 8"] == 4 * sizes["mamba, all four, rank 2"]
    assert sizes["mamba, all four, rank 8"] < 0.1 * sizes["mamba, every weight"]
    # Counting words beats them all.
    linear = results["baselines"]["system"]["logistic_regression"]
    assert all(max(variant["system"]["accuracy"]["values"]) < linear for variant in results["variants"].values())
