"""What more experts buy: small language models of several sizes and numbers of experts, on the same tokens."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.data.corpus import Corpus, load_corpus
from medarch.lm.batches import pack
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.evaluation import evaluate
from medarch.lm.scaling import Form, Point, extrapolate, fit_law
from medarch.lm.tokenizer import Tokenizer
from medarch.lm.training import TrainingConfig, train
from medarch.moe.accounting import expected_distinct_experts
from medarch.moe.batching import expected_distinct_by_load, mean_distinct_experts
from medarch.moe.config import MoEConfig

NAME = "lm/scaling"
LAYERS = 4
USED = 2  # experts a token
VOCABULARY = 1024
INITIAL = 0.06  # standard deviation of the initial weights
DENSE = (16, 24, 32, 48, 64)
ROUTED = (16, 32, 64)
EXPANSIONS = (2, 4, 8)
# A dense model of the total size of the mixture with this expansion stands beside it.
COMPARED = ((64, 4),)
AGAIN = ((64, 1), (64, 4))  # trained with further seeds, for the spread
SEEDS = (0, 1)
BATCHES = (1, 2, 4, 8, 16, 32, 64)

Key = tuple[int, int, int, int]  # hidden size, expansion, widening of a dense layer, seed


def decoder_config(hidden_size: int, expansion: int, widening: int = 1, vocab_size: int = VOCABULARY) -> DecoderConfig:
    """A decoder of the study: two experts, as wide together as the dense layer, serve each token.

    Args:
        hidden_size: Width D; a dense feed-forward layer is 2 D wide, an expert D.
        expansion: Experts held over experts used; 1 for a dense model.
        widening: How many times as wide a dense model's feed-forward layers are.
        vocab_size: Of the tokenizer.
    """
    routed = expansion > 1
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=USED * hidden_size * widening,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden_size // 8,
        initializer_range=INITIAL,
        feed_forwards=("moe",) if routed else ("dense",),
        moe=MoEConfig(hidden_size, hidden_size, USED * expansion, USED, initializer_range=INITIAL) if routed else None,
        router_aux_loss_coef=0.01 if routed else 0.0,
    )


def parameters(model: Decoder) -> dict[str, int]:
    """Parameters in all, those that one token meets, and those without the embedding: the size N of the laws."""
    total = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    idle = 0
    if config.moe is not None:
        share = 1 - config.moe.num_experts_per_tok / config.moe.num_experts
        routed = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
        idle = round(routed * share)
    return {"total": total, "active": total - idle, "size": total - idle - model.embed_tokens.weight.numel()}


MODULES = ("scaling", "training", "decoder", "evaluation", "tokenizer", "batches")


@benchmark(NAME, modules=[*(f"medarch.lm.{name}" for name in MODULES), "medarch.moe.batching", "medarch.data.corpus"])
def scaling(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Held-out loss of small decoders over size and number of experts, with laws fitted and extrapolated.

    All see the same number of tokens, less than the corpus holds, under the same schedule; those of one seed see
    the same tokens in the same order. Learning rate and initial weights were chosen by a few trials with the dense
    model of width 64. Wider models are left out: those of 128 did not reach its loss within as many steps under any
    setting that was tried, so that their loss would tell of the training and not of the size. Losses are those of the
    validation documents.

    Args:
        device: Where to train.
        quick: Whether to train few and tiny ones for a few steps, to see that everything works.

    Returns:
        Each model's sizes and losses, the spread over seeds, the laws and their errors on what they did not see.
    """
    corpus = load_corpus()
    steps, length, documents = (6, 32, 600) if quick else (300, 128, len(corpus.train))
    corpus = Corpus(corpus.train[:documents], corpus.validation[: 30 if quick else None], (), ())
    tokenizer = Tokenizer.train((document.text for document in corpus.train), VOCABULARY)
    parts = Partials(find(NAME), device, quick)
    config = TrainingConfig(steps, batch_size=8, length=length, learning_rate=1e-2, warmup_steps=steps // 10)
    few = 2 if quick else None
    tokens = pack(tokenizer, corpus.train).to(device)
    keys: list[Key] = [(hidden, 1, 1, 0) for hidden in DENSE]
    keys += [(hidden, x, 1, 0) for hidden in ROUTED for x in EXPANSIONS[:few]]
    keys += [(hidden, 1, x, 0) for hidden, x in COMPARED]
    keys += [(hidden, x, 1, seed) for hidden, x in AGAIN for seed in SEEDS[1:]]
    models = []
    for key in keys:
        run = parts.get("-".join(map(str, key)), partial(_run, key, tokens, corpus, tokenizer, config))
        models.append(run)
        print(f"hidden {key[0]}, expansion {key[1]}, widening {key[2]}, seed {key[3]}: {run['loss']:.4f}", flush=True)
    return {
        "repeats": len(SEEDS),
        "training": {"steps": steps, "tokens": steps * 8 * length, "corpus_tokens": len(tokens)},
        "models": models,
    } | _laws(models)


def _run(key: Key, tokens: Tensor, corpus: Corpus, tokenizer: Tokenizer, config: TrainingConfig) -> dict[str, Any]:
    hidden_size, expansion, widening, seed = key
    sizes = decoder_config(hidden_size, expansion, widening, tokenizer.vocab_size)
    model = Decoder(sizes, torch.Generator().manual_seed(seed)).to(tokens.device)
    begun = time.process_time()
    train(model, tokens, dataclasses.replace(config, seed=seed))
    seconds = time.process_time() - begun
    found = evaluate(model, tokenizer, corpus.validation)
    routed = {} if expansion == 1 else {"distinct_experts": touched(model, pack(tokenizer, corpus.validation))}
    return {
        "hidden": hidden_size,
        "expansion": expansion,
        "widening": widening,
        "seed": seed,
        **parameters(model),
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "seconds": seconds,
    } | routed


@torch.no_grad()
def touched(model: Decoder, tokens: Tensor) -> dict[str, dict[str, float]]:
    """Different experts that batches of held-out tokens touch, the mean over the layers, by the size of the batch.

    ``unrelated`` tokens come from anywhere in the text, ``consecutive`` ones follow one another; ``by_load``
    is the expectation for unrelated tokens from each expert's popularity, and ``even`` the one with equal popularity.
    """
    assert model.config.moe is not None
    moe, width = model.config.moe, 128
    rows = tokens[: len(tokens) // width * width].view(-1, width).to(next(model.parameters()).device)
    routings = [model(chunk).routings for chunk in rows.split(32)]
    generator = torch.Generator().manual_seed(0)
    result: dict[str, dict[str, float]] = {}
    for batch_size in BATCHES:
        found = dict.fromkeys(("unrelated", "consecutive", "by_load"), 0.0)
        for layer in range(LAYERS):
            indices = torch.cat([chunk[layer].indices.flatten(0, 1).cpu() for chunk in routings])
            chances = torch.bincount(indices.flatten(), minlength=moe.num_experts) / len(indices)
            found["unrelated"] += mean_distinct_experts(indices, batch_size, generator) / LAYERS
            found["consecutive"] += mean_distinct_experts(indices, batch_size, generator, consecutive=True) / LAYERS
            found["by_load"] += expected_distinct_by_load(chances, batch_size) / LAYERS
        result[str(batch_size)] = found | {"even": expected_distinct_experts(moe, batch_size)}
    return result


def _laws(models: list[dict[str, Any]]) -> dict[str, Any]:
    first = [model for model in models if model["seed"] == 0 and model["widening"] == 1]
    points = [Point(model["size"], model["expansion"], model["loss"]) for model in first]
    dense = [point for point in points if point.expansion == 1]
    # The router adds a little to a mixture's active size: the law sees the size of the dense model beside it.
    size_of = {model["hidden"]: model["size"] for model in first if model["expansion"] == 1}
    both = {model["hidden"] for model in first if model["expansion"] > 1}
    routed = [Point(size_of[m["hidden"]], m["expansion"], m["loss"]) for m in first if m["hidden"] in both]
    law, most = fit_law(routed, "routed"), max(point.expansion for point in routed)
    forms: tuple[Form, ...] = ("logarithm", "power", "offset")
    spread = {}
    for hidden, expansion in AGAIN:
        losses = [m["loss"] for m in models if (m["hidden"], m["expansion"], m["widening"]) == (hidden, expansion, 1)]
        if len(losses) > 1:
            spread[f"{hidden}-{expansion}"] = {"min": min(losses), "max": max(losses), "runs": len(losses)}
    return {
        "spread": spread,
        "law": {"coefficients": law.coefficients, "residual": law.residual},
        "extrapolated": {
            "routed": extrapolate(routed, "routed").to_dict(),
            "more_experts": extrapolate(routed, "routed", lambda p: p.expansion == most).to_dict(),
            **{form: extrapolate(dense, form).to_dict() for form in forms},
        },
    }
