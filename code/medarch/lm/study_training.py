"""What each piece of advice on training mixtures is worth: short runs of a small decoder that differ in one thing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.bench.timing import compare
from medarch.data.corpus import Corpus, Document, load_corpus
from medarch.data.icd import load_entries
from medarch.lm.batches import pack, sample_batch
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.evaluation import evaluate
from medarch.lm.tokenizer import Tokenizer
from medarch.lm.training import TrainingConfig, train
from medarch.lm.upcycling import upcycle_decoder
from medarch.moe.balance import evenness
from medarch.moe.config import MoEConfig
from medarch.moe.curriculum import (
    active_experts,
    freeze_experts,
    scale_learning_rate,
    set_active_experts,
    train_only,
    unfreeze_experts,
)
from medarch.moe.layer import MoELayer
from medarch.moe.precision import BFloat16Router, rounding
from medarch.moe.router import Routing

NAME = "lm/moe-training"
SEEDS = (0, 1, 2, 3)
STEPS = 100
HIDDEN = 64
VOCABULARY = 2048
RATE = 6e-3
STRESS = 5  # times the rate, for the stressed runs
EXPERT, USED, HELD = 48, 2, 8
FINE_TUNING_STEPS = 40
FINE_TUNED = ("nothing", "all", "all but experts", "experts", "half of the experts frozen", "routers")


@dataclass(frozen=True)
class Variant:
    """One way to train, which differs from the plain one in a single field.

    Attributes:
        kind: ``"moe"`` or ``"dense"``.
        initial_scale: Factor on the initial weights of everything but the embedding.
        initial_router_scale: Factor on the initial weights of the routers.
        bfloat16_router: Whether the routers compute in bfloat16.
        router_rate: Factor on the learning rate of the routers.
        norm_before_router: Whether a router reads the normalised residual stream, as its experts do.
        warmup: Share of the updates over which the learning rate rises.
        clip: Greatest norm of the gradient.
        z_loss: Coefficient of the router's z-loss.
        schedule: Active experts over the first half of the training.
        learning_rate: At its peak.
    """

    kind: str = "moe"
    initial_scale: float = 1.0
    initial_router_scale: float = 1.0
    bfloat16_router: bool = False
    router_rate: float = 1.0
    norm_before_router: bool = True
    warmup: float = 0.1
    clip: float = 1.0
    z_loss: float = 0.0
    schedule: tuple[int, ...] = ()
    learning_rate: float = RATE


_CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"kind": "dense"},
    "router_small": {"initial_router_scale": 0.1},
    # The plain runs have a variance of one over the width, scale 1 in the sense of Fedus et al. 2021 (section
    # 2.4), who recommend a tenth of it.
    "weights_small": {"initial_scale": 0.1**0.5},
    "router_bfloat16": {"bfloat16_router": True},
    "router_slow": {"router_rate": 0.1},
    "router_before_norm": {"norm_before_router": False},
    "no_warmup": {"warmup": 0.0},
    "no_clipping": {"clip": 1e9},
    "z_loss": {"z_loss": 1e-3},
    "dense_to_sparse": {"schedule": (8, 4, 2)},
    "one_expert_first": {"schedule": (1, 2)},
}
_STRESSED = ("plain", "router_bfloat16", "router_slow", "no_warmup", "no_clipping", "z_loss", "weights_small")
VARIANTS = {name: Variant(**changes) for name, changes in _CHANGES.items()}
STRESSED = {name: dataclasses.replace(VARIANTS[name], learning_rate=STRESS * RATE) for name in _STRESSED}


@dataclass(frozen=True)
class Setting:
    """What all runs share: the text, its size and the number of updates."""

    corpus: Corpus
    tokenizer: Tokenizer
    tokens: Tensor
    documents: tuple[Document, ...]
    steps: int
    length: int
    rounds: int
    device: str

    def training(self, variant: Variant, seed: int, steps: int | None = None, **changes: Any) -> TrainingConfig:
        """The run of a variant."""
        steps = self.steps if steps is None else steps
        config = TrainingConfig(
            steps=steps,
            batch_size=8,
            length=self.length,
            learning_rate=variant.learning_rate,
            warmup_steps=round(variant.warmup * steps),
            clip=variant.clip,
            seed=seed,
        )
        return dataclasses.replace(config, **changes)

    def bits(self, model: nn.Module, documents: Sequence[Document] | None = None) -> float:
        """Bits per byte on documents, those of the validation part by default."""
        assert isinstance(model, Decoder)
        return evaluate(model, self.tokenizer, documents or self.documents).bits_per_byte


@benchmark(
    NAME,
    modules=[
        *(f"medarch.lm.{name}" for name in ("decoder", "training", "evaluation", "tokenizer", "upcycling")),
        *(f"medarch.moe.{name}" for name in ("curriculum", "precision", "balance")),
        "medarch.data.corpus",
    ],
)
def training_study(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Bits per byte of small decoders trained in different ways, with the same seeds, text and order of batches.

    Every variant differs from the plain run in one thing. Seeds change the initial weights and the order of the
    data, alike for all variants, so that differences are taken seed by seed. Every second validation
    document gives the numbers; nothing was chosen by them, since no setting was tuned.

    Args:
        device: Where to train.
        quick: Whether to train a few tiny steps, to see that everything works.

    Returns:
        For each variant its results and their difference from the plain run; growing a mixture from a dense
        model; fine-tuning parts of one; steps and time to the quality of the dense model.
    """
    corpus = load_corpus()
    tokenizer = Tokenizer.train((document.text for document in corpus.train), VOCABULARY)
    setting = Setting(
        corpus,
        tokenizer,
        pack(tokenizer, corpus.train).to(device),
        documents=corpus.validation[:20] if quick else corpus.validation[::2],
        steps=6 if quick else STEPS,
        length=16 if quick else 128,
        rounds=3 if quick else 15,
        device=device,
    )
    seeds = SEEDS[:2] if quick else SEEDS
    parts = Partials(find(NAME), device, quick)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {"usual": {}, "stressed": {}}
    grown, tuned = [], []
    for seed in seeds:  # variants take turns within a seed, so that their times can be compared
        for group, variants in (("usual", VARIANTS), ("stressed", STRESSED)):
            for name, variant in variants.items():
                run = parts.get(f"{group}-{name}-{seed}", partial(_run, setting, variant, seed))
                print(f"seed {seed}, {group}, {name}: {run['bits_per_byte']}", flush=True)
                runs[group].setdefault(name, []).append(run)
        grown.append(parts.get(f"grown-{seed}", partial(_grow, setting, seed)))
        tuned.append(parts.get(f"tuned-{seed}", partial(_fine_tune, setting, seed)))
    step_time = parts.get("step-time", partial(_step_time, setting))
    return {
        "repeats": len(seeds),
        "sizes": {"steps": setting.steps, "tokens": setting.steps * 8 * setting.length, "rate": RATE, "stress": STRESS},
        "variants": {group: _variants(found) for group, found in runs.items()},
        "upcycling": {
            name: paired([run[name] for run in grown], [run["dense_continued"] for run in grown]) for name in grown[0]
        },
        "fine_tuning": _fine_tuning(tuned),
        "to_target": _to_target(runs["usual"]["plain"], runs["usual"]["dense"], setting.steps, step_time),
    }


def build(variant: Variant, seed: int) -> Decoder:
    """The decoder of a variant with its initial weights."""
    routed = variant.kind == "moe"
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=USED * EXPERT,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        feed_forwards=("moe",) if routed else ("dense",),
        initializer_range=HIDDEN**-0.5,
        moe=MoEConfig(HIDDEN, EXPERT, HELD, USED, initializer_range=HIDDEN**-0.5) if routed else None,
        router_aux_loss_coef=0.01 if routed else 0.0,
        router_z_loss_coef=variant.z_loss,
    )
    model = Decoder(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed_tokens" not in name:
                weight.mul_(variant.initial_scale)
    for layer in model.layers if routed else ():
        _change_router(layer, variant)
    return model


def _change_router(layer: Any, variant: Variant) -> None:
    mixture = layer.feed_forward
    if variant.bfloat16_router:
        rounded = BFloat16Router(mixture.config)
        rounded.load_state_dict(mixture.router.state_dict())
        mixture.router = rounded
    with torch.no_grad():
        mixture.router.weight.mul_(variant.initial_router_scale)
    if variant.router_rate != 1:
        scale_learning_rate(mixture.router, "weight", variant.router_rate)
    if not variant.norm_before_router:
        layer.feed_forward = RoutedBeforeNorm(layer.feed_forward_norm, mixture)
        layer.feed_forward_norm = nn.Identity()


class RoutedBeforeNorm(nn.Module):
    """A mixture whose router reads the residual stream as it is; its experts read it normalised as ever."""

    def __init__(self, norm: nn.Module, mixture: MoELayer) -> None:
        super().__init__()
        self.norm, self.mixture = norm, mixture

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The mixture's answer and the routing."""
        routing = self.mixture.router(hidden_states, mask)
        return self.mixture.experts(self.norm(hidden_states), routing.indices, routing.weights), routing


def _run(setting: Setting, variant: Variant, seed: int) -> dict[str, Any]:
    model = build(variant, seed).to(setting.device)
    mixtures = [module for module in model.modules() if isinstance(module, MoELayer)]

    def schedule(step: int) -> None:
        for mixture in mixtures if variant.schedule else ():
            set_active_experts(mixture, active_experts(step, setting.steps, variant.schedule))

    curve = []
    follow = variant in (VARIANTS["plain"], VARIANTS["dense"])

    def measure(trained: nn.Module) -> dict[str, float]:
        curve.append(setting.bits(trained))
        return {}

    config = setting.training(variant, seed, eval_every=max(1, setting.steps // 10) if follow else 0)
    try:
        log = train(model, setting.tokens, config, before_step=schedule, evaluate=measure)
    except (FloatingPointError, ValueError) as diverged:
        return {"bits_per_byte": None, "diverged": str(diverged)}
    norms = log.column("gradient_norm")
    return {
        "bits_per_byte": curve[-1],
        "curve": curve,
        "largest_gradient": max(norms),
        "clipped": sum(norm > variant.clip for norm in norms) / len(norms),
    } | (_routers(setting, model) if mixtures else {})


@torch.no_grad()
def _routers(setting: Setting, model: Decoder) -> dict[str, float]:
    """How large the logits are on held-out text, what rounding would do to them, and how even the load is."""
    tokens = pack(setting.tokenizer, setting.documents).to(setting.device)
    batch, _ = sample_batch(tokens, 16, setting.length, torch.Generator().manual_seed(0))
    routed = [routing for routing in model(batch).routings if routing is not None]
    rounded = [rounding(routing.logits, USED) for routing in routed]
    loads = [evenness(routing.statistics.counts.cpu()) for routing in routed]
    return {
        "largest_logit": max(each.largest_logit for each in rounded),
        "changed_by_rounding": sum(each.changed for each in rounded) / len(rounded),
        "max_over_mean_load": max(each.max_over_mean for each in loads),
    }


def _grow(setting: Setting, seed: int) -> dict[str, float]:
    """A dense decoder, then a mixture grown from it, for as many tokens together as a mixture from scratch."""
    generator = torch.Generator().manual_seed(seed)
    steps = setting.steps // 2
    narrow = dataclasses.replace(build(VARIANTS["dense"], seed).config, intermediate_size=EXPERT)
    dense = Decoder(narrow, generator).to(setting.device)
    train(dense, setting.tokens, setting.training(VARIANTS["plain"], seed, steps))
    found = {"dense_half_way": setting.bits(dense)}
    grown = upcycle_decoder(dense, HELD, USED, generator=generator)
    found["upcycled_at_once"] = setting.bits(grown)
    second = setting.training(VARIANTS["plain"], seed + 100, steps)
    for name, model in (("upcycled", grown), ("dense_continued", dense)):
        train(model, setting.tokens, second)
        found[name] = setting.bits(model)
    scratch = build(VARIANTS["plain"], seed).to(setting.device)
    train(scratch, setting.tokens, setting.training(VARIANTS["plain"], seed, steps))
    train(scratch, setting.tokens, second)
    found["mixture_from_scratch"] = setting.bits(scratch)
    return found


def icd_documents(corpus: Corpus, quick: bool = False) -> tuple[list[Document], list[Document]]:
    """ICD-10-CM for training and for testing, which share no category (the three characters before the point).

    Those for testing are of the corpus's out-of-domain documents; a fifth of the categories is theirs.
    """
    sampled = {document.id for document in corpus.out_of_domain}
    parts: tuple[list[Document], list[Document]] = ([], [])
    for entry in load_entries():
        held_out = hashlib.sha256(f"category {entry.code[:3]}".encode()).digest()[0] < 51
        name = f"ICD-10-CM {entry.code}"
        if held_out == (name in sampled):
            text = f"{entry.title}: {'; '.join(entry.notes)}"
            parts[held_out].append(Document(name, entry.title, text, None))
    return (parts[0][:200], parts[1][:20]) if quick else parts


def _fine_tune(setting: Setting, seed: int) -> dict[str, dict[str, float]]:
    """A trained mixture is taught the language of ICD-10-CM, one part of it at a time."""
    quick = setting.steps < STEPS
    seen, unseen = icd_documents(setting.corpus, quick)
    tokens = pack(setting.tokenizer, seen).to(setting.device)
    trained = build(VARIANTS["plain"], seed).to(setting.device)
    train(trained, setting.tokens, setting.training(VARIANTS["plain"], seed))
    config = TrainingConfig(
        steps=3 if quick else FINE_TUNING_STEPS, batch_size=8, length=setting.length, learning_rate=1e-3, warmup_steps=2
    )
    config = dataclasses.replace(config, seed=seed)
    found = {}
    for part in FINE_TUNED:
        model = copy.deepcopy(trained)
        mixtures = [module for module in model.modules() if isinstance(module, MoELayer)]
        weights = 0
        if part in ("all", "half of the experts frozen"):
            weights = train_only(model, "all")
        elif part != "nothing":
            weights = train_only(model, part)
        if part == "half of the experts frozen":
            for mixture in mixtures:
                freeze_experts(mixture, range(HELD // 2))
                weights -= sum(weight.numel() for weight in mixture.experts.parameters()) // 2
        if weights:
            train(model, tokens, config)
        for mixture in mixtures:
            unfreeze_experts(mixture)
        found[part] = {"weights": weights, "new": setting.bits(model, unseen), "old": setting.bits(model)}
    return found


def _step_time(setting: Setting) -> dict[str, Any]:
    """Time of one update of the mixture over one of the dense model of its active size, taken in turns."""
    batch = sample_batch(setting.tokens, 8, setting.length, torch.Generator().manual_seed(0))

    def update(model: Decoder) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

        def call() -> None:
            optimizer.zero_grad()
            model.loss(model(batch[0]), batch[1])[0].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return call

    calls = {name: update(build(VARIANTS[name], 0).to(setting.device)) for name in ("dense", "plain")}
    found = compare(calls, baseline="dense", rounds=setting.rounds, threads=1, device=setting.device)
    median, low, high = found.ratio("plain")
    return {"median": median, "low": low, "high": high}


def _variants(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    plain = runs["plain"]
    described: dict[str, Any] = {}
    for name, found in runs.items():
        kept = [(a, b) for a, b in zip(found, plain, strict=True) if a["bits_per_byte"] and b["bits_per_byte"]]
        described[name] = {"diverged": len(found) - sum(run["bits_per_byte"] is not None for run in found)}
        if len(kept) > 1:
            described[name] |= {
                "bits_per_byte": spread([run["bits_per_byte"] for run, _ in kept]),
                "minus_plain": paired(*([run["bits_per_byte"] for run in side] for side in zip(*kept, strict=True))),
            }
        for measure in ("largest_gradient", "clipped", "largest_logit", "changed_by_rounding", "max_over_mean_load"):
            values = [run[measure] for run in found if measure in run]
            if len(values) > 1:
                described[name][measure] = spread(values)
    return described


def _fine_tuning(tuned: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    return {
        part: {
            "weights": tuned[0][part]["weights"],
            **{side: spread([run[part][side] for run in tuned]) for side in ("new", "old")},
            "new_minus_all": paired([run[part]["new"] for run in tuned], [run["all"]["new"] for run in tuned]),
        }
        for part in FINE_TUNED
    }


def _to_target(
    plain: list[dict[str, Any]], dense: list[dict[str, Any]], steps: int, step_time: dict[str, Any]
) -> dict[str, Any]:
    """Steps and time of the mixture over the dense model's until both have the worse one's final quality."""
    ratios = []
    for mixture, other in zip(plain, dense, strict=True):
        target = max(mixture["bits_per_byte"], other["bits_per_byte"])
        reached = [first_reach(run["curve"], target, steps) for run in (mixture, other)]
        ratios.append(reached[0] / reached[1])
    return {
        "steps": spread(ratios),
        "time_of_a_step": step_time,
        "time": spread([ratio * step_time["median"] for ratio in ratios]),
    }


def first_reach(curve: Sequence[float], target: float, steps: int) -> float:
    """The step at which a falling curve first reaches a target, interpolated between its points.

    Args:
        curve: Values at even distances, the last of them after ``steps`` updates.
        target: At least the curve's least value.
        steps: Updates in all.

    Raises:
        ValueError: If the curve never reaches the target.
    """
    every = max(1, steps // 10)
    places = [every * (index + 1) for index in range(len(curve) - 1)] + [steps]
    for index, value in enumerate(curve):
        if value <= target:
            if index == 0:
                return float(places[0])
            before = curve[index - 1]
            share = (before - target) / (before - value)
            return places[index - 1] + share * (places[index] - places[index - 1])
    raise ValueError(f"the curve ends at {curve[-1]} and never reaches {target}")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1), least, greatest, and the values."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {"mean": mean, "sd": deviation, "min": min(values), "max": max(values), "values": list(values)}


def paired(left: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """Mean of the differences seed by seed, with Student's 95 % interval, and whether it leaves zero out."""
    from scipy.stats import t

    described = spread([a - b for a, b in zip(left, right, strict=True)])
    count = len(described["values"])
    half = float(t.ppf(0.975, count - 1)) * described["sd"] / math.sqrt(count)
    low, high = described["mean"] - half, described["mean"] + half
    return described | {"low": low, "high": high, "told": not low <= 0 <= high, "left": spread(left)}
