"""How much attention does a stack of Mamba layers need to look things up? The same stack with more and more of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.parallel_parts import compute_parts
from medarch.lm.recall_models import ModelSpec
from medarch.lm.recall_tasks import MultiQueryRecall
from medarch.lm.recall_training import Trial, score_on_tasks, train_on_tasks
from medarch.lm.study_spread import summary
from medarch.ssm.config import MambaConfig

NAME = "lm/attention-ratio"
LAYERS = 4
PLACES: dict[int, tuple[int, ...]] = {0: (), 1: (2,), 2: (1, 3), 4: (0, 1, 2, 3)}
"""Which of the four layers are attention, by how many there are."""
PAIRS = (2, 4, 8)
LENGTH = 32
SEEDS = (0, 1, 2)
MEMORY_AT = (32, 4096, 262144)


@dataclass(frozen=True)
class MixedSpec(ModelSpec):
    """Four layers of which some are attention and the others Mamba, every one with a feed-forward.

    Attributes:
        attention_layers: How many are attention, one of ``PLACES``. Beside Mamba it has no positions; alone, where
            nothing else could tell the order, they are rotary.
    """

    kind: str = "hybrid"
    hidden_size: int = 32
    num_hidden_layers: int = LAYERS
    state_size: int = 4
    attention_layers: int = 1

    @property
    def mixers(self) -> tuple[str, ...]:
        """The layers' mixers, the first layer first."""
        return tuple("attention" if layer in PLACES[self.attention_layers] else "mamba" for layer in range(LAYERS))

    def build(self, vocab_size: int, seed: int, context: int = 16384) -> HybridDecoder:
        """The model with its initial weights; see ``ModelSpec.build``."""
        mixers = self.mixers
        mamba = MambaConfig(self.hidden_size, state_size=self.state_size) if "mamba" in mixers else None
        config = HybridConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_hidden_layers=LAYERS,
            num_attention_heads=1,
            max_position_embeddings=context,
            initializer_range=0.06,
            mixers=mixers,
            mamba=mamba,
            positions="rotary" if mamba is None else "none",
        )
        return HybridDecoder(config, torch.Generator().manual_seed(seed))


def tasks(pairs: tuple[int, ...] = PAIRS) -> tuple[MultiQueryRecall, ...]:
    """The same question with ever more to be held: so many pairs of a key and a value, then questions to the end."""
    return tuple(
        MultiQueryRecall(length=LENGTH, pairs=each, keys=16, values=16, questions=LENGTH - 2 * each) for each in pairs
    )


def memory_bytes(model: HybridDecoder, length: int) -> dict[str, int]:
    """What the model keeps of ``length`` tokens, in the type of its weights: keys and values, and states."""
    cache = model.new_cache(1, 1)
    grows = sum(layer.bytes_per_position for layer in cache.layers)
    return {"key_value": grows * length, "state": cache.state_bytes}


def run(attention_layers: int, seed: int, steps: int, batch_size: int, sequences: int) -> dict[str, Any]:
    """One model trained on all tasks in turns, and its accuracy on each of them afterwards."""
    trial = Trial(MixedSpec(attention_layers=attention_layers), tasks(), 3e-3, steps, batch_size, seed)
    model, learned = train_on_tasks(trial)
    return learned | {"accuracy": score_on_tasks(model, tasks(), sequences)}


@benchmark(NAME, modules=["medarch.lm.study_attention_ratio"])
def attention_ratio(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Recall by the number of attention layers: none, one, two or all four of four, three seeds each.

    The task is multi-query recall in sequences of 32 tokens, with 2, 4 and 8 pairs in turns during training, each of
    them tested by itself. A Mamba layer keeps 4 numbers in each of 64 channels. Training ends where every batch of the
    last fifty has at least 99 in a hundred answers right, or after 700 updates.

    Args:
        device: ``"cpu"``; the models are too small for a graphics card to be of use.
        quick: Whether to take a few steps only, to see that everything works.

    Returns:
        For each number of attention layers the accuracies and steps over the seeds, and the memory by length.
    """
    if device != "cpu":
        raise ValueError(f"{NAME} is measured on device='cpu', got {device!r}")
    parts = Partials(find(NAME), device, quick)
    steps, batch_size, sequences, seeds = (3, 4, 8, SEEDS[:2]) if quick else (700, 32, 512, SEEDS)
    jobs = {
        f"{count}-{seed}": partial(run, count, seed, steps, batch_size, sequences) for seed in seeds for count in PLACES
    }
    runs = compute_parts(parts, jobs, lambda name, found: print(name, found["accuracy"], found["steps"], flush=True))
    vocabulary = max(task.vocab_size for task in tasks())
    models = {}
    for count in PLACES:
        own = [runs[f"{count}-{seed}"] for seed in seeds]
        model = MixedSpec(attention_layers=count).build(vocabulary, 0)
        models[str(count)] = {
            "mixers": list(MixedSpec(attention_layers=count).mixers),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "accuracy": {str(pairs): summary([each["accuracy"][i] for each in own]) for i, pairs in enumerate(PAIRS)},
            "steps": [each["steps"] for each in own],
            "solved": [each["solved"] for each in own],
            "curves": [each["curve"] for each in own],
            "memory_bytes": {str(length): memory_bytes(model, length) for length in MEMORY_AT},
        }
    return {
        "repeats": len(seeds),
        "seeds": list(seeds),
        "steps": steps,
        "pairs": list(PAIRS),
        "chance": {str(task.pairs): task.chance for task in tasks()},
        "models": models,
    }
