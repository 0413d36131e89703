"""Generation against the full forward pass, and against what transformers keeps of a distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.generation import complete, generate, keep_top_k, keep_top_p, next_token
from medarch.moe import MoEConfig

VOCABULARY, CONTEXT = 31, 41
PATTERNS = {"dense": ("dense",), "moe": ("moe",), "one of each": ("dense", "moe")}


def make_decoder(generator: torch.Generator, feed_forwards: tuple[str, ...] = ("dense",)) -> Decoder:
    """A decoder whose weights are large enough for its choices to vary from position to position."""
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        feed_forwards=feed_forwards,
        moe=MoEConfig(12, 7, 5, 2, initializer_range=0.6) if "moe" in feed_forwards else None,
        initializer_range=0.6,
    )
    return Decoder(config, generator)


def prompts(batch: int, time: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, time), generator=generator)


@pytest.mark.parametrize("feed_forwards", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("time", [1, 7, 18])
def test_greedy_takes_the_best_of_the_full_forward_pass(
    feed_forwards: tuple[str, ...], time: int, generator: torch.Generator
) -> None:
    model = make_decoder(generator, feed_forwards)
    start = prompts(3, time, generator)
    expected = start
    for _ in range(11):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert len(expected[:, time:].unique()) > 3
    assert torch.equal(generate(model, start, 11), expected)
    assert torch.equal(generate(model, start, 11, use_cache=False), expected)
    assert torch.equal(generate(model, start, 11, top_k=3, top_p=0.4), expected)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_greedy_writes_what_transformers_writes(kind: str, tmp_path: Path, generator: torch.Generator) -> None:
    from transformers import AutoModelForCausalLM

    from medarch.lm.bridge import save_pretrained

    model = make_decoder(generator, PATTERNS[kind])
    save_pretrained(model, None, tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    start = prompts(3, 7, generator)
    expected = theirs.generate(start, max_new_tokens=19, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, start, 19), expected)


def test_the_cache_is_used(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    read: list[int] = []
    model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    generate(model, prompts(2, 5, generator), 4)
    assert read == [5, 1, 1, 1]


def test_sampling_with_and_without_the_cache_is_the_same(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    start = prompts(2, 5, generator)
    drawn = [
        generate(model, start, 13, 1.3, top_k=9, generator=torch.Generator().manual_seed(seed), use_cache=cached)
        for seed, cached in ((3, True), (3, False), (4, True))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    k=st.integers(1, 40),
    p=st.floats(0.01, 1.0),
)
def test_filters_keep_what_those_of_transformers_keep(seed: int, scale: float, k: int, p: float) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = scale * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    theirs = TopKLogitsWarper(k)(None, logits)
    assert torch.equal(keep_top_k(logits, k), theirs)
    after = TopPLogitsWarper(p)(None, theirs)
    assert torch.equal(keep_top_p(theirs, p), after)


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.4, 1), (0.6, 2), (0.76, 3), (0.9, 4), (1.0, 4)])
def test_the_nucleus_worked_out_by_hand(p: float, kept: int) -> None:
    probs = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    finite = keep_top_p(probs.log(), p).isfinite()[0]
    assert int(finite.sum()) == kept
    assert finite[1]
    assert finite[3] == (kept > 1)


def test_the_likeliest_is_kept_however_small_the_nucleus() -> None:
    logits = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(6))
    kept = keep_top_p(logits, 1e-9).isfinite()
    assert torch.equal(kept, torch.nn.functional.one_hot(logits.argmax(-1), VOCABULARY).bool())


def test_a_nucleus_of_everything_leaves_the_unlikely_in() -> None:
    logits = torch.tensor([[0.0, -30.0, 5.0, -18.0]])
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_top_k_worked_out_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, 0.0, -1.0, 0.0]])
    assert keep_top_k(logits, 2).isfinite().tolist() == [[False, True, False, True], [True, True, False, True]]
    assert torch.equal(keep_top_k(logits, 9), logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = 20_000
    drawn = next_token(logits.expand(draws, 4), temperature, generator=torch.Generator().manual_seed(8))
    frequency = drawn.bincount(minlength=4) / draws
    weights = torch.exp(logits / temperature)
    probs = weights / weights.sum()
    assert ((frequency - probs).abs() < 4.5 * (probs * (1 - probs) / draws).sqrt()).all()


def test_what_is_filtered_out_is_never_drawn() -> None:
    logits = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).expand(3_000, 5)
    for arguments, allowed in (({"top_k": 2}, {3, 4}), ({"top_p": 0.45}, {3, 4}), ({"top_k": 3, "top_p": 0.3}, {4})):
        drawn = next_token(logits, 1.0, generator=torch.Generator().manual_seed(9), **arguments)
        assert set(drawn.tolist()) == allowed


def test_a_finished_row_is_filled_while_the_others_go_on(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    start = prompts(5, 3, generator)
    free = generate(model, start, 12)[:, 3:].tolist()
    # A token that some row says early and another late or never, so that rows end at different times.
    end = max(range(VOCABULARY), key=lambda token: len({row.index(token) if token in row else 99 for row in free}))
    length = max(row.index(end) + 1 if end in row else 12 for row in free)
    expected = [(row[: row.index(end)] if end in row else row) + [end] * length for row in free]
    assert len({row.index(end) for row in expected}) > 1
    found = generate(model, start, 12, end_of_text=end)[:, 3:].tolist()
    assert found == [row[:length] for row in expected]


def test_generation_ends_when_every_row_has_ended(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    start = prompts(1, 3, generator)
    first = int(generate(model, start, 1)[0, -1])
    assert generate(model, start, 12, end_of_text=first).shape == (1, 4)


class Letters:
    """A tokenizer for the small vocabulary: a to z, with the end of text as number 0."""

    end_of_text = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: list[int]) -> str:
        assert 0 not in ids
        return "".join(chr(96 + token) for token in ids)


@pytest.mark.parametrize("prompt", ["seizure", ""])
def test_a_text_is_continued_from_an_end_of_text(prompt: str, generator: torch.Generator) -> None:
    model = make_decoder(generator)
    ids = torch.tensor([[0, *Letters().encode(prompt)]])
    expected = generate(model, ids, 9, end_of_text=0)[0, 1:].tolist()
    text = complete(model, Letters(), prompt, 9)  # type: ignore[arg-type]
    assert text == Letters().decode([token for token in expected if token])
    assert text.startswith(prompt)
    assert len(text) > len(prompt)


def test_the_end_of_text_is_not_part_of_the_text(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    with torch.no_grad():  # whatever was read, the end of text is likeliest
        model.lm_head.zero_()
    assert complete(model, Letters(), "abc", 9) == "abc"  # type: ignore[arg-type]


def test_as_much_is_written_as_the_context_holds(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    assert generate(model, prompts(1, 7, generator), CONTEXT - 7).shape == (1, CONTEXT)


@pytest.mark.parametrize(
    ("shape", "new", "message"),
    [
        ((1, 42), 1, "42 tokens .* max_position_embeddings=41"),
        ((1, 41), 1, "41 tokens and max_new_tokens=1 .* max_position_embeddings=41: shorten the prompt"),
        ((2, 30), 12, "30 tokens and max_new_tokens=12 .* max_position_embeddings=41: ask for at most 11"),
        ((1, 0), 3, r"the prompt is empty, shape \(1, 0\)"),
        ((0, 3), 3, r"the prompt is empty, shape \(0, 3\)"),
        ((3,), 3, r"of shape \(batch, time\), got .* shape \(3,\)"),
        ((1, 3), 0, "max_new_tokens=0"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(
    shape: tuple[int, ...], new: int, message: str, generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_decoder(generator), torch.ones(shape, dtype=torch.long), new)


def test_words_of_another_vocabulary_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"31.*tokens 0 to 30"):
        generate(make_decoder(generator), torch.tensor([[1, VOCABULARY]]), 2)
    with pytest.raises(ValueError, match="whole numbers"):
        generate(make_decoder(generator), torch.ones(1, 3), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-320}, "temperature=1e-320 are not finite: take temperature=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_token(torch.arange(5.0)[None], **arguments)  # type: ignore[arg-type]


def test_scores_that_are_no_numbers_are_refused_and_the_mode_restored(generator: torch.Generator) -> None:
    model = make_decoder(generator).train()
    generate(model, prompts(1, 3, generator), 2)
    assert model.training
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(model, prompts(1, 3, generator), 2)
    assert model.training
