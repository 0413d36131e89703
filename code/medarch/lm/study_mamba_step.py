"""What one training step of a Mamba or a hybrid costs, over that of a dense decoder of the same active size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from medarch.bench import benchmark, compare
from medarch.lm.catalogue import find_recipe, make_decoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.study_step import check_agreement, own_loss, step, their_loss, transformers_twin
from medarch.ssm.config import MambaConfig

BASELINE = "dense"


@benchmark("lm/mamba-step", modules=["medarch.lm.hybrid_recipes", "medarch.lm.hybrid_bridge", "medarch.bench.timing"])
def mamba_step(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time of a training step of the book's Mamba and hybrid over that of its dense model, one thread.

    A step is the forward and backward pass, the clipping and AdamW, on 8 sequences of 256 tokens. The sizes are those
    of the book's checkpoints. Llama and Mamba of transformers have the same weights and do the same work; its Mamba
    uses the parallel scan of the package mambapy, without which a step takes many times as long.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        The comparison, with the sizes.

    Raises:
        ValueError: If ours and theirs disagree in the scores or in a gradient: what is wrong is not timed.
    """
    batch, length, rounds = (2, 13, 3) if quick else (8, 256, 9)
    configs = {name: find_recipe(name).model for name in (BASELINE, "mamba", "hybrid")}
    if quick:
        tiny: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        configs[BASELINE] = type(configs[BASELINE])(**tiny, num_hidden_layers=2)
        configs["mamba"] = HybridConfig(
            **tiny, num_hidden_layers=2, mixers=("mamba",), feed_forwards=("none",), mamba=MambaConfig(16)
        )
        configs["hybrid"] = HybridConfig(
            **tiny, num_hidden_layers=2, mixers=("mamba", "attention"), mamba=MambaConfig(16), positions="none"
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = configs[BASELINE].vocab_size
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator).to(device)
    steps: dict[str, Callable[[], None]] = {}
    for name, config in configs.items():
        ours = make_decoder(config, generator).to(device)
        steps[name] = step(ours, own_loss(ours, tokens))
        if name == "hybrid":
            continue
        theirs = transformers_twin(ours).to(device).train()
        for module in theirs.modules():
            if hasattr(module, "use_mambapy"):
                module.use_mambapy = True
        check_agreement(ours, theirs, tokens)
        steps[f"transformers_{theirs.config.model_type}"] = step(theirs, their_loss(theirs, tokens))
    return {
        "sizes": {name: config.to_dict() for name, config in configs.items()},
        "tokens": batch * length,
        "repeats": rounds,
        "comparison": compare(steps, baseline=BASELINE, rounds=rounds, threads=1, device=device).to_dict(),
    }
