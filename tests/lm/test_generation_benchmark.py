"""The benchmark does the work that it times: of fixed length, greedy, cached and warm, clocked when it is done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medarch.lm import generation_benchmark
from medarch.lm.cached_reading import CachedReader, random_tokens
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.generation import generate
from medarch.lm.generation_benchmark import GenerationTimes, Spread, benchmark_generation
from medarch.lm.study_routers import build_tiny


def tiny() -> Decoder:
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.4,
    )
    return Decoder(config, torch.Generator().manual_seed(0)).eval()


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config).eval()


def read_greedily(model: nn.Module, ids: Tensor, new_tokens: int) -> list[int]:
    reader = CachedReader(model, 1, ids.shape[1] + new_tokens)
    tokens = [int(reader.read(ids).argmax())]
    while len(tokens) < new_tokens:
        tokens.append(int(reader.read(torch.tensor([[tokens[-1]]])).argmax()))
    return tokens


def test_what_is_read_step_by_step_is_what_our_generate_writes() -> None:
    model = tiny()
    ids = random_tokens(model, 1, 7)
    assert read_greedily(model, ids, 9) == generate(model, ids, 9)[0, 7:].tolist()


@pytest.mark.parametrize("family", ["mixtral", "jamba", "mamba"])
def test_what_is_read_step_by_step_is_what_transformers_generates(family: str) -> None:
    model = mamba() if family == "mamba" else build_tiny(family)
    ids = random_tokens(model, 1, 7)
    model.generation_config.eos_token_id = None
    # Without a mask, generate would take the prompt's tokens of number 0 for padding.
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert read_greedily(model, ids, 9) == expected[0, 7:].tolist()


def test_every_run_reads_the_prompt_once_and_then_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    found = benchmark_generation(model, random_tokens(model, 3, 5), new_tokens=4, runs=3)
    # One run ahead of the three, of the same shapes.
    assert seen == [(3, 5), (3, 1), (3, 1), (3, 1)] * 4
    assert (found.batch_size, found.prompt_tokens, found.new_tokens) == (3, 5, 4)
    assert len(found.first_token) == len(found.per_token) == 3


def test_clock_is_read_when_the_device_has_finished_and_the_warm_up_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    finished: list[float] = []

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            assert finished, "the clock was read before the device had finished"
            finished.clear()
            return now

    model = tiny()
    calls = 0

    def work(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal now, calls
        warm = calls < 4
        calls += 1
        now += (1000 if warm else 1) * (7.0 if args[0].shape[1] > 1 else 2.0)

    model.register_forward_pre_hook(work)
    monkeypatch.setattr(generation_benchmark, "time", Clock)
    monkeypatch.setattr(generation_benchmark, "_finish", lambda device: finished.append(1.0))
    found = benchmark_generation(model, random_tokens(model, 1, 5), new_tokens=4, runs=3)
    assert found.first_token == (7.0, 7.0, 7.0)
    assert found.per_token == (2.0, 2.0, 2.0)


def test_spreads() -> None:
    times = GenerationTimes("cpu", 4, 8, 3, first_token=(5.0, 1.0, 3.0), per_token=(0.5, 0.25, 1.0))
    assert times.time_to_first_token == Spread(2.0, 3.0, 4.0)
    assert times.time_per_token == Spread(0.375, 0.5, 0.75)
    assert times.tokens_per_second == Spread(4 / 0.75, 8.0, 4 / 0.375)


def test_the_training_mode_comes_back() -> None:
    model = tiny().train()
    benchmark_generation(model, random_tokens(model, 1, 3), new_tokens=2, runs=3)
    assert model.training


def test_bad_questions_are_answered() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"new_tokens=1 and runs=3"):
        benchmark_generation(model, random_tokens(model, 1, 3), new_tokens=1, runs=3)
    with pytest.raises(ValueError, match=r"new_tokens=4 and runs=2"):
        benchmark_generation(model, random_tokens(model, 1, 3), new_tokens=4, runs=2)
    with pytest.raises(ValueError, match=r"length=0"):
        random_tokens(model, 1, 0)
    with pytest.raises(ValueError, match=r"Linear has no config.vocab_size"):
        random_tokens(nn.Linear(2, 2), 1, 3)
    switch = build_tiny("switch_transformers")
    with pytest.raises(ValueError, match=r"SwitchTransformersForConditionalGeneration is no causal language model"):
        CachedReader(switch, 1, 3)
