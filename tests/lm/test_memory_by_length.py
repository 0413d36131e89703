"""Weights, cache and activations are told apart, and the length is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medarch.bench.memory import peak_memory
from medarch.lm.cached_reading import CachedReader, random_tokens
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.memory_by_length import memory_by_length, storage_bytes


def ours(tie: bool = True) -> Decoder:
    config = DecoderConfig(
        vocab_size=251,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
    )
    return Decoder(config, torch.Generator().manual_seed(0))


def theirs() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=251,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("build", [ours, theirs])
def test_the_cache_is_what_the_formula_says(build: object) -> None:
    model = build()  # type: ignore[operator]
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].shape), with_kwargs=True)
    found = memory_by_length(model, [13, 26], batch_size=5)
    assert {tuple(shape) for shape in seen} == {(5, 13), (5, 26)}
    for each, length in zip(found, (13, 26), strict=True):
        assert each.length == length
        # Keys and values, 3 layers, batch 5, 2 heads of width 4, float32.
        assert each.cache == 2 * 3 * 5 * 2 * length * 4 * 4
        assert each.weights == storage_bytes([*model.parameters(), *model.buffers()])
        assert each.peak == each.weights + each.cache + each.activations
    assert found[1].activations > found[0].activations > 0


def test_cache_and_activations_together_are_the_peak_of_reading() -> None:
    model = ours().eval()
    ids = random_tokens(model, 2, 19)

    def read() -> object:
        reader = CachedReader(model, 2, 19)
        return reader.read(ids), reader.cache

    found = memory_by_length(model, [19], batch_size=2)[0]
    assert found.cache + found.activations == peak_memory(read)


def test_only_the_last_position_is_scored() -> None:
    """Scores of all 101 positions of 251 tokens would alone take 101 kB."""
    found = memory_by_length(ours(), [101])[0]
    assert found.activations < 101 * 251 * 4


def test_shared_memory_counts_once() -> None:
    tied, untied = memory_by_length(ours(True), [3])[0], memory_by_length(ours(False), [3])[0]
    assert untied.weights - tied.weights == 251 * 16 * 4
    tensor = torch.zeros(7, 4)
    assert storage_bytes([tensor, tensor[2:], tensor.T]) == 7 * 4 * 4


def test_the_same_on_every_run() -> None:
    model = ours()
    assert memory_by_length(model, [17]) == memory_by_length(model, [17])
    assert model.training
