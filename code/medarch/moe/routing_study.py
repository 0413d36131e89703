"""Does it matter who chooses? One classifier, many routers, several seeds, and the number of experts a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.bench import count_flops
from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.moe.classifier import Examples, Task, TextClassifier, accuracy_and_f1, balancing_loss, load_task
from medarch.moe.config import MoEConfig
from medarch.moe.expert_choice import ExpertChoiceRouter, experts_per_token
from medarch.moe.fixed import HashRouter, RandomRouter
from medarch.moe.layer import MoELayer
from medarch.moe.noisy import NoisyTopKRouter, importance, smooth_load, squared_variation
from medarch.moe.router import NO_EXPERT, Routing, TopKRouter
from medarch.moe.soft import DenseRouter, SoftMoE, SoftRouting
from medarch.moe.specialisation import expert_by_system, normalised_mutual_information
from medarch.moe.study import paired_difference, summary
from medarch.moe.switch import SwitchRouter

NAME = "moe/routing-study"
SEEDS = (0, 1, 2)
EPOCHS = 4
HIDDEN, WIDTH = 128, 128  # the width that works on a token is the same for every number of experts a token


def sized(k: int) -> MoEConfig:
    """k experts a token out of 4k, each 1/k as wide: the same weights held and the same weights used."""
    return MoEConfig(HIDDEN, WIDTH // k, num_experts=4 * k, num_experts_per_tok=k, norm_topk_prob=k > 1)


@dataclass(frozen=True)
class Variant:
    """One way to route.

    Attributes:
        config: Sizes of the layer.
        build: Makes the layer from the sizes and a generator.
        balance: Weight of the balancing loss.
    """

    config: MoEConfig
    build: Callable[[MoEConfig, torch.Generator], nn.Module]
    balance: float = 0.0


def _with(router: Callable[..., nn.Module], **options: Any) -> Callable[[MoEConfig, torch.Generator], MoELayer]:
    return lambda config, generator: MoELayer(config, generator, router=router(config, generator, **options))


def _noisy(config: MoEConfig, generator: torch.Generator) -> MoELayer:
    noise = torch.Generator().manual_seed(generator.initial_seed())
    return MoELayer(config, generator, router=NoisyTopKRouter(config, generator, noise_generator=noise))


SLOTS_PER_EXPERT = 6  # 48 slots, for the 19 words that a definition has on average

VARIANTS: dict[str, Variant] = {
    "top1": Variant(sized(1), _with(TopKRouter), 0.01),
    "top2": Variant(sized(2), _with(TopKRouter), 0.01),
    "top4": Variant(sized(4), _with(TopKRouter), 0.01),
    "top8": Variant(sized(8), _with(TopKRouter), 0.01),
    "top2_no_loss": Variant(sized(2), _with(TopKRouter)),
    "switch": Variant(sized(1), _with(SwitchRouter, capacity_factor=1.25), 0.01),
    "noisy": Variant(sized(2), _noisy, 0.1),
    "expert_choice": Variant(sized(2), _with(ExpertChoiceRouter)),
    "dense": Variant(sized(2), _with(DenseRouter)),
    "soft": Variant(sized(2), lambda config, generator: SoftMoE(config, SLOTS_PER_EXPERT, generator)),
    "hash": Variant(sized(2), _with(HashRouter)),
    "random": Variant(sized(2), _with(RandomRouter)),
}


class RoutedClassifier(TextClassifier):
    """The classifier of ``medarch.moe.classifier`` with any routed layer in the place of its mixture.

    Token choice decides for each word alone. Expert choice and a capacity see all words of the batch as one
    group, as in the papers; Soft MoE mixes the words of one definition.

    Args:
        task: What is to be told apart.
        variant: The layer.
        generator: Source of the initial weights.
    """

    def __init__(self, task: Task, variant: Variant, generator: torch.Generator) -> None:
        super().__init__(len(task.vocabulary), len(task.systems), variant.config, "none", generator)
        self.routed = variant.build(variant.config, generator)

    def words(self, tokens: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]) -> Tensor:
        """Vectors of the words that the mask keeps, each with the mean of its definition added."""
        text = mask.nonzero()[:, 0]
        words = F.embedding(tokens[mask], self.embedding)
        return words + F.linear(self.mean(words, mask), self.context)[text]

    def mean(self, words: Float[Tensor, "words hidden"], mask: Bool[Tensor, "batch length"]) -> Tensor:
        """Mean of each definition's words."""
        total = words.new_zeros(len(mask), words.shape[-1]).index_add(0, mask.nonzero()[:, 0], words)
        return total / mask.sum(1).clamp(min=1)[:, None]

    def classify_words(
        self, words: Float[Tensor, "words hidden"], mask: Bool[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch classes"], Routing | SoftRouting]:
        """Scores of each system and the routing of the words."""
        inputs = self.norm(words)
        if isinstance(self.routed, SoftMoE):
            padded = inputs.new_zeros(*mask.shape, inputs.shape[-1]).index_put((mask,), inputs)
            change, routing = self.routed(padded, mask)
            change = change[mask]
        else:
            change, routing = self.routed(inputs)
        return F.linear(self.mean(words + change, mask), self.classify), routing

    @property
    def router(self) -> TopKRouter:
        """The router of a layer that has one."""
        assert isinstance(self.routed, MoELayer)
        return self.routed.router

    def balance(self, words: Float[Tensor, "words hidden"], routing: Routing) -> Float[Tensor, ""]:
        """The loss that keeps the load even: Shazeer's two for the noisy router, Switch's for the others."""
        if isinstance(self.router, NoisyTopKRouter):
            load = smooth_load(self.router.scores(self.norm(words)), self.router.config.num_experts_per_tok)
            return squared_variation(importance(routing)) + squared_variation(load)
        # The router's wish before any capacity.
        wished = routing.probs.topk(self.router.config.num_experts_per_tok).indices
        return balancing_loss(routing._replace(indices=wished))


def train_routed(
    task: Task, variant: Variant, *, seed: int, epochs: int = EPOCHS, batch_size: int = 128, learning_rate: float = 6e-3
) -> RoutedClassifier:
    """Trains as ``medarch.moe.classifier.train_classifier`` does, with its settings and its batches.

    Args:
        task: The task.
        variant: The way to route.
        seed: Of weights, order and dropped words.
        epochs: Passes over the training definitions.
        batch_size: Definitions a step.
        learning_rate: At its peak, after a tenth of the steps.

    Returns:
        The classifier in evaluation mode.
    """
    model = RoutedClassifier(task, variant, torch.Generator().manual_seed(seed))
    shuffle = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(task.train.labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    for _ in range(epochs):
        for index in torch.randperm(len(task.train.labels), generator=shuffle).split(batch_size):
            batch = Examples(*(part[index] for part in task.train))
            mask = batch.mask & (torch.rand(batch.mask.shape, generator=shuffle) >= 0.3)
            words = model.words(batch.tokens, mask)
            scores, routing = model.classify_words(words, mask)
            loss = F.cross_entropy(scores, batch.labels)
            if variant.balance and isinstance(routing, Routing):
                loss = loss + variant.balance * model.balance(words, routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def measure(task: Task, model: RoutedClassifier, examples: Examples, batch_size: int = 128) -> dict[str, float]:
    """Quality on some examples, and how the words were spread over the experts.

    Examples are taken in batches of the training's size and in their order, since under expert choice the
    batch belongs to the decision.
    """
    scores, wished, counts, served = [], [], [], []
    for index in torch.arange(len(examples.labels)).split(batch_size):
        batch = Examples(*(part[index] for part in examples))
        words = model.words(batch.tokens, batch.mask)
        score, routing = model.classify_words(words, batch.mask)
        scores.append(score)
        if isinstance(routing, SoftRouting):
            continue
        text = batch.mask.nonzero()[:, 0]
        counts.append(_by_definition(routing.indices, text, len(index), routing.probs.shape[-1]))
        served.append(experts_per_token(routing))
        own = isinstance(model.router, ExpertChoiceRouter)
        wished.append(routing.indices if own else routing.probs.topk(model.router.config.num_experts_per_tok).indices)
    every = torch.cat(scores)
    predictions = every.argmax(dim=-1)
    accuracy, macro_f1 = accuracy_and_f1(predictions, examples.labels)
    found = {"accuracy": accuracy, "macro_f1": macro_f1, "nats": float(F.cross_entropy(every, examples.labels))}
    if not counts:
        return found
    asked = torch.cat([indices.flatten() for indices in wished])
    load = asked[asked != NO_EXPERT].bincount(minlength=counts[0].shape[-1]).double()
    number = torch.cat(served).double()
    table = expert_by_system(torch.cat(counts), examples.labels, len(task.systems))
    return found | {
        "max_over_mean_load": float(load.max() / load.mean()),
        "unserved": float((number == 0).double().mean()),
        "experts_per_token": float(number.mean()),
        "experts_per_token_sd": float(number.std()),
        "nmi": normalised_mutual_information(table),
    }


def _by_definition(indices: Tensor, text: Tensor, definitions: int, experts: int) -> Int[Tensor, "batch experts"]:
    flat = (text[:, None] * experts + indices)[indices != NO_EXPERT]
    return flat.bincount(minlength=definitions * experts).view(definitions, experts)


def flops_of_layer(layer: nn.Module, tokens: int, hidden_size: int = HIDDEN) -> float:
    """Forward operations of a routed layer for one token of a group of this size, counted while it runs."""
    hidden_states = torch.randn(1, tokens, hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return count_flops(layer.eval(), hidden_states) / tokens


@benchmark(NAME, modules=["medarch.moe.routing_study"])
def routing_study(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Quality, balance and cost of one classifier under twelve ways to route, several seeds each.

    The task, the number of epochs and all settings are those of moe/classifier-study, where they were chosen
    with a top-2 mixture on the validation definitions; nothing was tuned for the other ways to route. Test
    definitions serve for the final numbers alone.

    Args:
        device: Only ``"cpu"``.
        quick: Whether to train on a few definitions, to see that everything works.

    Returns:
        Each variant's measures over the seeds with its operations a token; the range of the mean accuracy
        over the number of experts a token; and paired differences of expert choice and token choice.

    Raises:
        ValueError: For another device.
    """
    if device != "cpu":
        raise ValueError(f"{NAME} is a study of small models and runs on the cpu, not on {device!r}")
    task = load_task()
    seeds: tuple[int, ...] = SEEDS
    epochs = EPOCHS
    if quick:
        seeds, epochs = SEEDS[:2], 1
        task = task.map(lambda part: part[:384])
    parts = Partials(find(NAME), device, quick)
    length = round(float(task.test.mask.sum() / len(task.test.labels)))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in seeds:
        for name in VARIANTS:
            run = parts.get(f"{name}-{seed}", partial(_run, task, name, seed, epochs))
            print(f"{name}, seed {seed}: accuracy {run['accuracy']:.4f}", flush=True)
            runs[name].append(run)
    variants: dict[str, dict[str, Any]] = {
        name: {measure: summary([run[measure] for run in found]) for measure in found[0]}
        for name, found in runs.items()
    }
    for name, variant in VARIANTS.items():
        layer = variant.build(variant.config, torch.Generator().manual_seed(0))
        variants[name]["flops_per_token"] = flops_of_layer(layer, length)
        variants[name]["parameters"] = sum(weight.numel() for weight in layer.parameters())
    by_k = {k: variants[f"top{k}"]["accuracy"]["mean"] for k in (1, 2, 4, 8)}
    tested = len(task.test.labels)
    return {
        "repeats": len(seeds),
        "words_per_definition": length,
        "standard_error_at_90_percent": (0.9 * 0.1 / tested) ** 0.5,
        "variants": variants,
        "experts_per_token": {
            "accuracy": {str(k): mean for k, mean in by_k.items()},
            "best_minus_two": max(by_k.values()) - by_k[2],
        },
        "token_choice_minus_expert_choice": {
            measure: paired_difference(
                [run[measure] for run in runs["top2"]], [run[measure] for run in runs["expert_choice"]]
            )
            for measure in ("nmi", "accuracy")
        },
    }


def _run(task: Task, name: str, seed: int, epochs: int) -> dict[str, float]:
    return measure(task, train_routed(task, VARIANTS[name], seed=seed, epochs=epochs), task.test)
