"""Instruction tuning: the answer alone is counted, padding is seen by nothing, and greedy writing is what is scored."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from medarch.adaptation.lora import LoRAConfig, add_lora, base_weights
from medarch.data.instructions import Instruction, load_instructions
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.instruction_tuning import (
    IGNORED,
    Example,
    answer_loss,
    batches,
    collate,
    encode,
    no_longer_than,
    overlap,
    overlaps,
    score,
    tune,
    write_answers,
)
from medarch.lm.loading import checkpoints_folder
from medarch.lm.tokenizer import Tokenizer
from medarch.lm.training import TrainingConfig
from medarch.moe.config import MoEConfig

SIZES = {
    "vocab_size": 290,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
QUESTIONS = [
    Instruction(f"HP:{number}", task, f"The {colour} one{' indeed' * number}.", answer)
    for number, colour in enumerate(("red", "green", "blue", "grey", "white"))
    for task, answer in (("name", f"{colour.title()} thing"), ("system", "eye" if number % 2 else "heart"))
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"{each.prompt} {each.answer}" for each in QUESTIONS], 290)


@pytest.fixture
def model(generator: torch.Generator) -> Decoder:
    return Decoder(DecoderConfig(**SIZES, initializer_range=0.2), generator)


def test_an_example_is_a_document_whose_answer_begins_where_it_says(tokenizer: Tokenizer) -> None:
    for instruction, (ids, start) in zip(QUESTIONS, encode(tokenizer, QUESTIONS), strict=True):
        assert ids[0] == ids[-1] == tokenizer.end_of_text
        assert tokenizer.decode(ids[:start]) == instruction.prompt
        assert tokenizer.decode(ids[start:]) == f" {instruction.answer}"


def test_prompt_and_answer_are_cut_apart_where_the_tokenizer_cuts() -> None:
    """Read as one text, the pieces of the book's tokenizer are those that the two have by themselves."""
    tokenizer, some = Tokenizer.load(checkpoints_folder() / "mamba"), load_instructions().test[::29]
    for instruction, example in zip(some, encode(tokenizer, some), strict=True):
        assert example.ids[1:-1] == tokenizer.encode(f"{instruction.prompt} {instruction.answer}")


def test_the_mask_token_by_token() -> None:
    examples = [Example([0, 11, 12, 13, 21, 22, 0], 4), Example([0, 14, 31, 0], 2), Example([0, 15, 16, 41, 0], 3)]
    batch = collate(examples)
    i = IGNORED
    assert batch.input_ids.tolist() == [[0, 11, 12, 13, 21, 22], [0, 14, 31, 0, 0, 0], [0, 15, 16, 41, 0, 0]]
    assert batch.targets.tolist() == [[i, i, i, 21, 22, 0], [i, 31, 0, i, i, i], [i, i, 41, 0, i, i]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="no examples"):
        collate([])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=6))
def test_what_is_counted_is_the_answer_and_its_end(lengths: list[tuple[int, int]]) -> None:
    examples = [
        Example([0, *range(100, 100 + prompt), *range(200, 200 + answer), 0], 1 + prompt) for prompt, answer in lengths
    ]
    batch = collate(examples)
    for row, (prompt, answer) in enumerate(lengths):
        counted = batch.targets[row][batch.targets[row] != IGNORED].tolist()
        assert counted == [*range(200, 200 + answer), 0]
        assert batch.input_ids[row][batch.targets[row] != IGNORED].tolist() == [99 + prompt, *range(200, 200 + answer)]
        assert int(batch.mask[row].sum()) == 1 + prompt + answer


def test_the_loss_is_that_of_the_answers_and_padding_changes_nothing(tokenizer: Tokenizer, model: Decoder) -> None:
    examples = encode(tokenizer, QUESTIONS[:5])
    by_hand, count = 0.0, 0
    for ids, start in examples:
        with torch.no_grad():
            scores = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        by_hand -= sum(float(scores[position - 1, ids[position]]) for position in range(start, len(ids)))
        count += len(ids) - start
    loss = answer_loss(model, collate(examples))
    assert loss.item() == pytest.approx(by_hand / count, rel=1e-5)
    noisy = collate(examples)
    noisy.input_ids[~noisy.mask] = 77
    assert answer_loss(model, noisy).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_mixture_keeps_its_balancing_loss(tokenizer: Tokenizer, generator: torch.Generator) -> None:
    moe = MoEConfig(24, 20, num_experts=4, num_experts_per_tok=2)
    sparse = Decoder(DecoderConfig(**SIZES, feed_forwards=("moe",), moe=moe, router_aux_loss_coef=0.5), generator)
    batch = collate(encode(tokenizer, QUESTIONS[:3]))
    output = sparse(batch.input_ids, batch.mask)
    plain = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    assert answer_loss(sparse, batch).item() > plain.item() + 0.4


def test_an_epoch_takes_each_example_once_and_batches_are_of_similar_length() -> None:
    examples = [Example([0] * (5 + 7 * number % 31), 2) for number in range(31)]
    numbers = {id(example): number for number, example in enumerate(examples)}
    drawn = [[numbers[id(each)] for each in batch] for batch in islice(batches(examples, 4, seed=1), 21)]
    for epoch in range(3):
        once = [number for batch in drawn[7 * epoch : 7 * epoch + 7] for number in batch]
        assert len(set(once)) == 28
    assert drawn[:7] != drawn[7:14]
    lengths = [[len(examples[number].ids) for number in batch] for batch in drawn]
    assert sum(max(each) - min(each) for each in lengths) < 21 * 8
    again = [[numbers[id(each)] for each in batch] for batch in islice(batches(examples, 4, seed=1), 21)]
    assert again == drawn
    assert [[numbers[id(each)] for each in batch] for batch in islice(batches(examples, 4, seed=2), 21)] != drawn
    with pytest.raises(ValueError, match="31 examples do not fill a batch of batch_size=32"):
        next(batches(examples, 32, seed=1))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_learns_to_answer(tokenizer: Tokenizer, model: Decoder, adapted: bool) -> None:
    examples = encode(tokenizer, QUESTIONS)
    base = {name: weight.clone() for name, weight in base_weights(model).items()}
    if adapted:
        every = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
        add_lora(model, LoRAConfig(8, 16, every), torch.Generator().manual_seed(0))
    config = TrainingConfig(steps=60, batch_size=5, length=80, learning_rate=1e-2, warmup_steps=5, weight_decay=0.0)
    before, lines = score(model, examples), []
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    log = tune(model, examples, config, report=lines.append)
    after = score(model, examples)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert after.loss < 0.6 * before.loss
    assert before.accuracy == 0
    assert after.accuracy > 0.3
    assert [entry["step"] for entry in log.steps] == list(range(1, 61))
    assert log.steps[-1]["learning_rate"] == pytest.approx(1e-3)
    assert 60 * 5 * 20 < log.tokens < 60 * 5 * 80
    assert len(lines) == 10
    moved = [name for name, weight in base_weights(model).items() if not torch.equal(weight, base[name])]
    assert (not moved) == adapted


def test_the_same_seed_gives_the_same_run(tokenizer: Tokenizer) -> None:
    examples, losses = encode(tokenizer, QUESTIONS), []
    for seed in (4, 4, 5):
        fresh = Decoder(DecoderConfig(**SIZES), torch.Generator().manual_seed(0))
        config = TrainingConfig(steps=4, batch_size=3, length=80, learning_rate=1e-2, seed=seed)
        losses.append(tune(fresh, examples, config).column("loss"))
    assert losses[0] == losses[1] != losses[2]


def test_exact_means_what_would_be_written(tokenizer: Tokenizer, model: Decoder) -> None:
    examples = encode(tokenizer, QUESTIONS)
    tune(model, examples, TrainingConfig(steps=25, batch_size=5, length=80, learning_rate=1e-2, weight_decay=0.0))
    found = score(model, examples, batch_size=3)
    written = write_answers(model, tokenizer, QUESTIONS, max_new_tokens=12)
    assert list(found.exact) == [text == each.answer for text, each in zip(written, QUESTIONS, strict=True)]
    assert 0 < found.accuracy < 1
    alone = [score(model, [example]) for example in examples]
    assert found.nats == pytest.approx([each.nats[0] for each in alone], rel=1e-4)
    assert found.tokens == tuple(len(example.ids) - example.answer_start for example in examples)
    assert found.loss == pytest.approx(sum(found.nats) / sum(found.tokens))
    share = found.accuracy
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 10))


def test_it_takes_a_model_of_transformers(tokenizer: Tokenizer, model: Decoder) -> None:
    from medarch.lm.study_step import transformers_twin

    twin = transformers_twin(model)
    batch = collate(encode(tokenizer, QUESTIONS[:4]))
    assert answer_loss(twin, batch).item() == pytest.approx(answer_loss(model, batch).item(), rel=1e-4)
    assert score(twin, encode(tokenizer, QUESTIONS)).loss == pytest.approx(
        score(model, encode(tokenizer, QUESTIONS)).loss, rel=1e-4
    )


def test_bad_input_is_refused(tokenizer: Tokenizer, model: Decoder) -> None:
    examples = encode(tokenizer, QUESTIONS)
    longest = max(len(each.ids) for each in examples) - 1
    assert len(no_longer_than(tokenizer, QUESTIONS, longest)) == len(QUESTIONS)
    shorter = no_longer_than(tokenizer, QUESTIONS, longest - 1)
    assert len(shorter) < len(QUESTIONS)
    assert set(shorter) < set(QUESTIONS)
    with pytest.raises(ValueError, match="none of 10 instructions has at most longest=3"):
        no_longer_than(tokenizer, QUESTIONS, 3)

    def config(**fields: Any) -> TrainingConfig:
        return TrainingConfig(**{"steps": 1, "batch_size": 2, "length": longest, **fields})

    with pytest.raises(ValueError, match=rf"{longest} tokens exceeds length={longest - 1}: use no_longer_than"):
        tune(model, examples, config(length=longest - 1))
    with pytest.raises(ValueError, match="accumulation=2"):
        tune(model, examples, config(accumulation=2))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        tune(model.requires_grad_(False), examples, config())
    model.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"loss nan.* at step 1: lower learning_rate"):
        tune(model, examples, config())


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Seizure", "seizure", 1.0),
        ("Long, long penis", "Long penis", 0.8),
        ("Small face", "Oval face", 0.5),
        ("", "Seizure", 0.0),
        ("Cough", "Seizure", 0.0),
        ("X-linked", "linked x", 1.0),
    ],
)
def test_overlap_by_hand(answer: str, truth: str, expected: float) -> None:
    assert overlap(answer, truth) == pytest.approx(expected)
    assert overlaps([answer], [Instruction("HP:1", "name", "", truth)]) == pytest.approx([expected])
