"""What an answer costs as its context grows: a Mamba against a transformer of the same size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from medarch.bench import benchmark, compare
from medarch.bench.memory import peak_memory
from medarch.lm.bridge import to_transformers_config
from medarch.lm.cached_reading import CachedReader, random_tokens
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.hybrid_families import to_transformers_config as to_transformers_mamba_config
from medarch.lm.memory_by_length import storage_bytes
from medarch.ssm.config import MambaConfig
from medarch.ssm.state import RecurrentState

BASELINE = "transformer"


@dataclass(frozen=True)
class Scale:
    """What is compared, and how far.

    Attributes:
        mamba: A decoder of Mamba layers alone.
        transformer: One of attention and feed-forwards, with as many weights.
        grouped: The same with fewer key and value heads; only its cache is looked at.
        contexts: Tokens in front of the answer.
        batch_sizes: Texts that are continued side by side; prompts are read one at a time.
        slow_context: Context at which transformers' Mamba takes part, whose scan is a loop in Python.
        dtype: Of weights and activations.
        rounds: Rounds of each comparison.
    """

    mamba: HybridConfig
    transformer: DecoderConfig
    grouped: DecoderConfig
    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    slow_context: int
    dtype: torch.dtype
    rounds: int


def scale(device: str, quick: bool) -> Scale:
    """The sizes for a device: small ones on a CPU, those of Mamba-2.8B on a GPU.

    The transformer is built as Llama is, as wide as the Mamba and half as deep; the width of its feed-forwards makes
    the numbers of weights equal to within one in a hundred.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if quick:
        configs = pair(vocab_size=61, hidden_size=16, feed_forward=40, layers=2, heads=2, groups=1, longest=32)
        return Scale(*configs, contexts=(8, 16), batch_sizes=(1, 2), slow_context=8, dtype=dtype, rounds=3)
    if device == "cpu":
        configs = pair(vocab_size=2048, hidden_size=256, feed_forward=800, layers=8, heads=4, groups=1, longest=16384)
        short = (256, 512, 1024, 2048, 4096, 8192)
        return Scale(*configs, contexts=short, batch_sizes=(1, 8), slow_context=512, dtype=dtype, rounds=7)
    # state-spaces/mamba-2.8b-hf: 64 layers, 2,560 wide, 16 states, rank 160; heads as wide as Llama's, 128.
    configs = pair(vocab_size=50280, hidden_size=2560, feed_forward=7296, layers=64, heads=20, groups=4, longest=65536)
    long = (4096, 8192, 16384, 32768)
    return Scale(*configs, contexts=long, batch_sizes=(1, 4), slow_context=4096, dtype=dtype, rounds=6)


def pair(
    *, vocab_size: int, hidden_size: int, feed_forward: int, layers: int, heads: int, groups: int, longest: int
) -> tuple[HybridConfig, DecoderConfig, DecoderConfig]:
    """A Mamba, a transformer of half as many layers, and that transformer with ``groups`` key and value heads."""
    mamba = HybridConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=1,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=longest,
        mixers=("mamba",),
        feed_forwards=("none",),
        mamba=MambaConfig(hidden_size),
    )
    transformer = DecoderConfig(
        vocab_size, hidden_size, feed_forward, layers // 2, heads, max_position_embeddings=longest
    )
    return mamba, transformer, replace(transformer, num_key_value_heads=groups)


@benchmark(
    "lm/decoding",
    modules=["medarch.lm.hybrid", "medarch.lm.cached_reading", "medarch.bench.timing", "medarch.bench.memory"],
)
def decoding(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time to the first token, time for each further token, and memory, Mamba against a transformer of its size.

    The weights are random: how long a multiplication takes does not depend on the numbers. On a GPU the sizes are
    those of Mamba-2.8B, in bfloat16; on a CPU both models have about four million weights, in float32, and one thread.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to run tiny sizes, to see that everything works.

    Returns:
        By context: the comparison of the time to the first token (the prompt is read) and of a further token; bytes of
        weights, of what is kept, and at the worst moment of reading. Besides: where the lines cross, what a first call
        takes, the speed of memory, by what a doubled context multiplies the time to the first token, and the models of
        transformers.
    """
    chosen = scale(device, quick)
    models = build_models(chosen, device)
    results: dict[str, Any] = {
        "sizes": describe(chosen, models),
        "repeats": chosen.rounds,
        "copied_bytes_per_second": copy_speed(device, 2**20 if quick else 2**28),
        "first_calls": {name: first_calls(model, min(chosen.contexts), device) for name, model in models.items()},
        "transformers": transformers_models(chosen, device),
        "contexts": {},
    }
    # Contexts take turns as well, so that they can be compared; a card would not hold the caches of all at once.
    for together in [chosen.contexts] if device == "cpu" else [(context,) for context in chosen.contexts]:
        prompts = {
            context: {name: first_token(model, context) for name, model in models.items()} for context in together
        }
        first = compared(prompts, chosen, device)
        further = {batch: next_tokens(models, chosen, together, batch, device) for batch in chosen.batch_sizes}
        for context in together:
            results["contexts"][str(context)] = {
                "first_token": first[context],
                "memory": {name: memory(model, context, device) for name, model in models.items()},
                "next_token": {str(batch): {"launched": each[context]} for batch, each in further.items()},
            }
    results["crossing"] = crossings(results["contexts"])
    results["first_token_doubling"] = {name: doubling(results["contexts"], name) for name in models}
    return results


def build_models(chosen: Scale, device: str) -> dict[str, Decoder]:
    """Both models with random weights, made where they will run."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        models = {"mamba": HybridDecoder(chosen.mamba, generator), BASELINE: Decoder(chosen.transformer, generator)}
    return {name: model.to(chosen.dtype).eval() for name, model in models.items()}


def describe(chosen: Scale, models: dict[str, Decoder]) -> dict[str, Any]:
    """Configurations, weights, and what each context token adds to the cache, also with grouped key and value heads."""
    with torch.device("meta"):
        grouped = Decoder(chosen.grouped)
    described = {}
    for name, model in [*models.items(), ("grouped", grouped.to(chosen.dtype))]:
        layers = model.new_cache(1, 1).layers
        described[name] = {
            "config": model.config.to_dict(),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "bytes_per_token": sum(layer.bytes_per_position for layer in layers),
            "bytes_of_state": sum(layer.used_bytes for layer in layers if isinstance(layer, RecurrentState)),
        }
    return described | {"dtype": str(chosen.dtype).removeprefix("torch.")}


def compared(calls: dict[int, dict[str, Callable[[], Any]]], chosen: Scale, device: str) -> dict[int, dict[str, Any]]:
    """Times of all calls, taken in turns, and told context by context: a slow minute falls on every context alike."""
    together = compare(
        {f"{name} {context}": call for context, each in calls.items() for name, call in each.items()},
        baseline=f"{BASELINE} {min(calls)}",
        rounds=chosen.rounds,
        threads=1,
        device=device,
    )
    return {
        context: replace(
            together, baseline=BASELINE, seconds={name: together.seconds[f"{name} {context}"] for name in each}
        ).to_dict()
        for context, each in calls.items()
    }


def first_token(model: nn.Module, context: int) -> Callable[[], Tensor]:
    """Reads a prompt into an empty cache and names the token that follows."""
    ids = random_tokens(model, 1, context)
    return lambda: CachedReader(model, 1, context).read(ids).argmax(-1)


def first_calls(model: nn.Module, context: int, device: str) -> dict[str, float]:
    """Seconds of the first and of the second call of a model in this process, with the same prompt."""
    call, clock, seconds = first_token(model, context), clock_of(device), []
    for _ in range(2):
        start = clock()
        call().item()
        seconds.append(clock() - start)
    return {"context": context, "first": seconds[0], "second": seconds[1]}


def clock_of(device: str) -> Callable[[], float]:
    """The process's own time on a CPU, which other programs do not lengthen; on a GPU the clock, which waits for it."""
    return time.process_time if device == "cpu" else time.perf_counter


def memory(model: Decoder, context: int, device: str) -> dict[str, int]:
    """Bytes of the weights, of the cache after reading, and of all that is held at the worst moment of reading."""
    weights = storage_bytes(model.parameters())
    read = first_token(model, context)
    peak = peak_memory(read, device=device, warm_up=False)
    reader = CachedReader(model, 1, context)
    for layer in reader.cache.layers:
        layer.length = context
    return {"weights": weights, "cache": reader.cache.used_bytes, "peak": weights + peak}


def next_tokens(
    models: dict[str, Decoder], chosen: Scale, contexts: Sequence[int], batch: int, device: str
) -> dict[int, dict[str, Any]]:
    """Times of one further token at each context, for several texts at once, each operation launched by Python."""
    calls = {
        context: {name: next_token(model, context, batch) for name, model in models.items()} for context in contexts
    }
    return compared(calls, chosen, device)


def next_token(model: Decoder, context: int, batch: int) -> Callable[[], Tensor]:
    """Scores the token after a context that is already in the cache; each call is the same step again."""
    cache = model.new_cache(batch, context + 1)
    for layer in cache.layers:
        tensors = (layer.ssm, layer.conv) if isinstance(layer, RecurrentState) else (layer.keys, layer.values)
        for tensor in tensors:
            tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))
    ids = random_tokens(model, batch, 1)

    @torch.no_grad()
    def call() -> Tensor:
        for layer in cache.layers:
            layer.length = context
        return model(ids, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1)

    return call


def copy_speed(device: str, size: int) -> float:
    """Bytes that a large copy reads and writes in a second: no token can be had faster than what it reads."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = compare({"copy": lambda: target.copy_(source)}, baseline="copy", rounds=5, device=device)
    return 2 * size / timed.quartiles("copy")[1]


def doubling(contexts: dict[str, Any], name: str) -> float:
    """By what the time to the first token is multiplied when the context doubles, on average: 2 where it is linear."""
    seconds = [each["first_token"]["variants"][name]["seconds"]["median"] for each in contexts.values()]
    lengths = [int(context) for context in contexts]
    return (seconds[-1] / seconds[0]) ** (1 / math.log2(lengths[-1] / lengths[0]))


def crossings(contexts: dict[str, Any]) -> dict[str, Any]:
    """Where Mamba becomes the faster one, for each quantity; None where one is faster throughout."""
    found: dict[str, Any] = {"first_token": crossing(ratios(contexts, "first_token"))}
    for batch, kinds in next(iter(contexts.values()))["next_token"].items():
        for kind in kinds:
            found[f"next_token_{batch}_{kind}"] = crossing(ratios(contexts, "next_token", batch, kind))
    return found


def ratios(contexts: dict[str, Any], *keys: str) -> list[tuple[int, float]]:
    """Mamba's time over the transformer's at each context, of the comparison under these keys."""
    found = []
    for context, results in contexts.items():
        for key in keys:
            results = results[key]
        found.append((int(context), results["variants"]["mamba"]["ratio"]["median"]))
    return found


def crossing(points: list[tuple[int, float]]) -> float | None:
    """The context at which the ratio falls through one, on a straight line between logarithms."""
    for (before, high), (after, low) in pairwise(points):
        if high >= 1 > low:
            share = math.log(high) / math.log(high / low)
            return before * (after / before) ** share
    return None


def transformers_models(chosen: Scale, device: str) -> dict[str, Any]:
    """The same sizes as transformers runs them without further kernels, at a context where its Mamba can be waited for.

    One reading of the prompt each, after a short one that is not counted, and the median of some further tokens.
    """
    results: dict[str, Any] = {"context": chosen.slow_context}
    for name, fields in (
        ("mamba", to_transformers_mamba_config(chosen.mamba)),
        (BASELINE, to_transformers_config(chosen.transformer)),
    ):
        model = transformers_model(fields, chosen.dtype, device)
        first_token(model, 4)()
        reader, ids = CachedReader(model, 1, chosen.slow_context + 16), random_tokens(model, 1, chosen.slow_context)
        clock, seconds = clock_of(device), []
        for tokens in [ids] + [ids[:, :1]] * 15:
            start = clock()
            reader.read(tokens).argmax(-1).tolist()
            seconds.append(clock() - start)
        results[name] = {"first_token": seconds[0], "next_token": sorted(seconds[1:])[7]}
        del model, reader
    return results


def transformers_model(fields: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """A model of transformers with random weights.

    Raises:
        ValueError: If transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as missing:
        raise ValueError(
            "lm/decoding compares with transformers, which is not installed: run `make test` once"
        ) from missing
    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
