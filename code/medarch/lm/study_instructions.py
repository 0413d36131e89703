"""Mamba taught to answer: LoRA of several kinds, every weight, and a transformer beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from medarch.adaptation.lora import LoRAConfig, add_lora, count_trainable
from medarch.adaptation.lora_checks import check_gradients
from medarch.bench.memory import peak_memory
from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.bench.timing import compare
from medarch.data.instructions import TASKS, Instruction, Instructions, load_instructions
from medarch.lm.instruction_baselines import logistic_regression, most_frequent, nearest_definition
from medarch.lm.instruction_tuning import (
    Batch,
    answer_loss,
    collate,
    encode,
    no_longer_than,
    overlaps,
    score,
    tune,
    write_answers,
)
from medarch.lm.loading import load
from medarch.lm.study_spread import summary
from medarch.lm.tokenizer import Tokenizer
from medarch.lm.training import TrainingConfig, parameter_groups

NAME = "lm/instruction-tuning"
SEEDS = (0, 1, 2)
LONGEST = 96  # tokens of an instruction; longer ones are left out, in training and in testing
STEPS, BATCH_SIZE = 160, 8
NAMES, WRITTEN = 200, 40  # held-out terms whose name is scored, and of these, written out token by token
MAMBA = ("in_proj", "x_proj", "dt_proj", "out_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
# With LoRA and without; of three tried for each on the Mamba, with another seed, 80 steps and validation questions.
RATES = {True: 6e-3, False: 1e-3}

VARIANTS: dict[str, tuple[str, LoRAConfig | None]] = {
    "mamba, in_proj, rank 8": ("mamba", LoRAConfig(8, 16, ("in_proj",))),
    "mamba, x_proj and dt_proj, rank 8": ("mamba", LoRAConfig(8, 16, ("x_proj", "dt_proj"))),
    "mamba, all four, rank 2": ("mamba", LoRAConfig(2, 4, MAMBA)),
    "mamba, all four, rank 8": ("mamba", LoRAConfig(8, 16, MAMBA)),
    "mamba, every weight": ("mamba", None),
    "dense, all six, rank 8": ("dense", LoRAConfig(8, 16, ATTENTION)),
    "dense, every weight": ("dense", None),
}
"""What is compared: a checkpoint, and its LoRA or none."""

STEP_SHAPES = {"8 x 64": (8, 64), "1 x 512": (1, 512)}


@benchmark(
    NAME,
    modules=["medarch.lm.instruction_tuning", "medarch.lm.instruction_baselines", "medarch.adaptation.lora_checks"],
    data=["book/checkpoints/mamba/model.safetensors", "book/checkpoints/dense/model.safetensors"],
)
def instruction_tuning(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Held-out instructions before and after fine-tuning, from three seeds, and what a step costs.

    A seed sets the initial LoRA and the order of the data. The base has no seed: it is the committed checkpoint.

    Args:
        device: Where to train, ``"cpu"`` or ``"cuda"``.
        quick: Whether to take a few steps only, to see that everything works.

    Returns:
        For each base and each variant its scores, for each variant its trainable parameters, the baselines without a
        language model, and memory and time of a step.
    """
    parts = Partials(find(NAME), device, quick)
    seeds, steps = (SEEDS[:2], 3) if quick else (SEEDS, STEPS)
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    bases = {base: parts.get(f"base-{base}", partial(_base, base, device, quick)) for base in ("mamba", "dense")}
    for seed in seeds:  # in turns, so that a kill leaves as many of each
        for number, variant in enumerate(VARIANTS):
            run = parts.get(f"{number}-{seed}", partial(_run, variant, seed, steps, device, quick))
            print(f"{variant}, seed {seed}: systems {run['system']['accuracy']:.3f}", flush=True)
            runs[variant].append(run)
    return {
        "repeats": len(seeds),
        "seeds": list(seeds),
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "longest": LONGEST,
        "rates": {"lora": RATES[True], "every weight": RATES[False]},
        "instructions": parts.get("counts", partial(_counts, quick)),
        "bases": bases,
        "variants": {variant: _describe(variant, runs[variant], bases) for variant in VARIANTS},
        "baselines": parts.get("baselines", partial(_baselines, quick)),
        "step": {
            shape: parts.get(f"step-{shape.replace(' ', '')}", partial(_step_cost, *sizes, device, quick))
            for shape, sizes in STEP_SHAPES.items()
        },
    }


def held(tokenizer: Tokenizer, quick: bool = False) -> Instructions:
    """The instructions that are short enough, all of them or a few."""
    parts = load_instructions()
    if quick:
        parts = Instructions(*(part[:60] for part in parts))
    return Instructions(*(tuple(no_longer_than(tokenizer, part, LONGEST)) for part in parts))


def of_task(instructions: Sequence[Instruction], task: str) -> list[Instruction]:
    """Those that ask for one thing."""
    return [each for each in instructions if each.task == task]


def prepare(variant: str, seed: int, device: str = "cpu") -> tuple[Any, Tokenizer]:
    """The checkpoint of a variant with its LoRA, and its tokenizer."""
    base, config = VARIANTS[variant]
    model, tokenizer = load(base, device)
    if config is not None:
        add_lora(model, config, torch.Generator().manual_seed(seed))
    return model, tokenizer


def measure(model: Any, tokenizer: Tokenizer, instructions: Sequence[Instruction]) -> dict[str, Any]:
    """Scores of each task, and how many words the first few names that the model writes share with the right ones."""
    found: dict[str, Any] = {}
    for task in TASKS:
        asked = of_task(instructions, task)[: NAMES if task == "name" else None]
        result = score(model, encode(tokenizer, asked))
        found[task] = {
            "loss": result.loss,
            "accuracy": result.accuracy,
            "standard_error": result.standard_error,
            "answers": len(asked),
        }
    names = of_task(instructions, "name")[:WRITTEN]
    found["name"]["overlap"] = statistics.fmean(overlaps(write_answers(model, tokenizer, names), names))
    return found


def _base(base: str, device: str, quick: bool) -> dict[str, Any]:
    model, tokenizer = load(base, device)
    return measure(model, tokenizer, held(tokenizer, quick).test) | {"parameters": count_trainable(model)[1]}


def _run(variant: str, seed: int, steps: int, device: str, quick: bool) -> dict[str, Any]:
    model, tokenizer = prepare(variant, seed, device)
    parts = held(tokenizer, quick)
    examples = encode(tokenizer, parts.train)
    adapted = VARIANTS[variant][1] is not None
    if adapted:  # an adapter that learns nothing would make the comparison a false one
        batch = collate(examples[:BATCH_SIZE], device=device)
        check_gradients(model, lambda: answer_loss(model, batch))
    trainable = count_trainable(model)[0]
    log = tune(model, examples, training(steps, seed, adapted))
    losses = log.column("loss")
    return measure(model, tokenizer, parts.test) | {
        "trainable": trainable,
        "seconds_per_step": log.seconds / steps,
        "curve": [statistics.fmean(losses[first : first + 10]) for first in range(0, steps, 10)],
    }


def training(steps: int, seed: int, adapted: bool) -> TrainingConfig:
    """How a variant is trained."""
    return TrainingConfig(
        steps=steps,
        batch_size=BATCH_SIZE,
        length=LONGEST,
        learning_rate=RATES[adapted],
        warmup_steps=steps // 10,
        weight_decay=0.0,
        seed=seed,
    )


def _describe(variant: str, runs: list[dict[str, Any]], bases: dict[str, Any]) -> dict[str, Any]:
    base = bases[VARIANTS[variant][0]]
    config = VARIANTS[variant][1]
    result: dict[str, Any] = {
        "base": VARIANTS[variant][0],
        "lora": None if config is None else config.to_dict(),
        "trainable": runs[0]["trainable"],
        "seconds_per_step": summary([run["seconds_per_step"] for run in runs]),
        "curves": [run["curve"] for run in runs],
    }
    for task in TASKS:
        names = ("loss", "accuracy", "overlap") if task == "name" else ("loss", "accuracy")
        result[task] = {name: summary([run[task][name] for run in runs]) for name in names}
        result[task]["loss_minus_base"] = summary([run[task]["loss"] - base[task]["loss"] for run in runs])
        result[task]["accuracy_minus_base"] = summary([run[task]["accuracy"] - base[task]["accuracy"] for run in runs])
    return result


def _counts(quick: bool) -> dict[str, dict[str, int]]:
    _, tokenizer = load("dense")
    found, everything = held(tokenizer, quick), load_instructions()
    return {
        part: {"all": len(getattr(everything, part)), "used": len(getattr(found, part))}
        | {task: len(of_task(getattr(found, part), task)) for task in TASKS}
        for part in ("train", "test")
    }


def _baselines(quick: bool) -> dict[str, Any]:
    _, tokenizer = load("dense")
    parts = held(tokenizer, quick)
    train, asked = of_task(parts.train, "system"), of_task(parts.test, "system")
    result: dict[str, Any] = {"system": {}, "name": {}}
    for method in (most_frequent, logistic_regression):
        right = [answer == each.answer for answer, each in zip(method(train, asked), asked, strict=True)]
        result["system"][method.__name__] = statistics.fmean(right)
    names = of_task(parts.test, "name")[:WRITTEN]
    answers = nearest_definition(of_task(parts.train, "name"), names)
    result["name"]["nearest_definition"] = {
        "accuracy": statistics.fmean(answer == each.answer for answer, each in zip(answers, names, strict=True)),
        "overlap": statistics.fmean(overlaps(answers, names)),
    }
    return result


def make_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """One update of what asks for a gradient."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-6)

    def call() -> None:
        answer_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # so that nothing but AdamW's means is held between two steps

    return call


def _step_cost(batch_size: int, length: int, device: str, quick: bool) -> dict[str, Any]:
    """Memory and time of a step: Mamba and the dense transformer, with LoRA and with every weight."""
    tokens = torch.randint(2048, (batch_size, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask)
    steps: dict[str, Callable[[], None]] = {}
    result: dict[str, Any] = {"tokens": batch_size * length, "memory": {}}
    for name in COSTED:
        model, _ = prepare(name, 0, device)
        steps[name] = make_step(model, batch)
        trained, held_parameters = count_trainable(model)
        result["memory"][name] = {
            "weights": 4 * held_parameters,
            "optimizer": 8 * trained,  # AdamW's two means, which the first step makes and all later ones keep
            "gradients_and_activations": peak_memory(steps[name], device=device),
        }
    rounds = 3 if quick else 9
    result["time"] = compare(steps, baseline="dense, every weight", rounds=rounds, device=device).to_dict()
    return result


COSTED = ("dense, every weight", "dense, all six, rank 8", "mamba, every weight", "mamba, all four, rank 8")
"""The variants whose step is weighed and timed."""
