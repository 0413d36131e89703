"""What one training step costs: a mixture against a dense decoder, and our decoders against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medarch.bench import benchmark, compare
from medarch.lm.bridge import to_transformers_config, weight_views
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.training import parameter_groups
from medarch.moe.config import MoEConfig

BASELINE = "dense"


@benchmark("lm/training-step", modules=["medarch.lm.decoder", "medarch.lm.bridge", "medarch.bench.timing"])
def training_step(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time of a training step over that of a dense decoder of the same active size, one thread.

    A step is the forward and backward pass with the routers' balancing loss, the clipping and AdamW, on 8
    sequences of 256 tokens. The two decoders have the sizes of the book's checkpoints; Llama and Mixtral of
    transformers have the same weights and do the same work.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        The comparison, with the sizes.

    Raises:
        ValueError: If ours and theirs disagree in the scores or in a gradient: what is wrong is not timed.
    """
    sizes = (61, 24, 40, 2, 3, 1) if quick else (2048, 192, 320, 4, 6, 2)
    batch, length, rounds = (2, 13, 3) if quick else (8, 256, 15)
    moe = MoEConfig(sizes[1], sizes[2] // 2, num_experts=8, num_experts_per_tok=2)
    configs = {
        BASELINE: DecoderConfig(*sizes),
        "moe": DecoderConfig(*sizes, feed_forwards=("moe",), moe=moe, router_aux_loss_coef=0.01),
    }
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(sizes[0], (batch, length + 1), generator=generator).to(device)
    steps: dict[str, Callable[[], None]] = {}
    for name, config in configs.items():
        ours = Decoder(config, generator).to(device)
        theirs = transformers_twin(ours).to(device)
        check_agreement(ours, theirs, tokens)
        steps[name] = step(ours, own_loss(ours, tokens))
        steps[f"transformers_{theirs.config.model_type}"] = step(theirs, their_loss(theirs, tokens))
    return {
        "sizes": {name: config.to_dict() for name, config in configs.items()},
        "tokens": batch * length,
        "repeats": rounds,
        "comparison": compare(steps, baseline=BASELINE, rounds=rounds, threads=1, device=device).to_dict(),
    }


def transformers_twin(model: Decoder) -> Any:
    """The model of transformers that a decoder of ours corresponds to, with copies of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = to_transformers_config(model.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.output_router_logits = model.config.moe is not None
    twin = AutoModelForCausalLM.from_config(config).float()
    missing, unexpected = twin.load_state_dict(weight_views(model, fused=True), strict=False)
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise ValueError(f"weights missing {missing} and unexpected {unexpected} in {type(twin).__name__}")
    return twin


def own_loss(model: Decoder, tokens: Tensor) -> Callable[[], Tensor]:
    """Our loss on these tokens."""
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return lambda: model.loss(model(inputs), targets)[0]


def their_loss(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """The loss of transformers on these tokens; it shifts the labels by itself, and so scores one position less."""
    inputs = tokens[:, :-1].contiguous()
    return lambda: model(input_ids=inputs, labels=inputs, use_cache=False).loss


def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One update of the weights."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-6, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return call


def check_agreement(ours: Decoder, theirs: Any, tokens: Tensor) -> None:
    """Holds the two libraries to the same scores, and to the same gradient of the embedding.

    Raises:
        ValueError: Naming what differs.
    """
    gradients, scores = [], []
    for model, answer in ((ours, lambda: ours(tokens).logits), (theirs, lambda: theirs(input_ids=tokens).logits)):
        model.zero_grad(set_to_none=True)
        scores.append(answer())
        F.cross_entropy(scores[-1].flatten(0, 1), tokens.flatten()).backward()
        weight = ours.embed_tokens.weight if model is ours else theirs.get_input_embeddings().weight
        gradients.append(cast(Tensor, weight.grad))
    for quantity, (own, other) in (("scores", scores), ("gradient of the embedding", gradients)):
        try:
            torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-4 * float(own.detach().abs().max()))
        except AssertionError as difference:
            raise ValueError(f"{type(theirs).__name__} disagrees with ours in the {quantity}: {difference}") from None
