"""Packing and sampling: where documents end, what follows what, and which windows can be drawn."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from medarch.lm.batches import pack, sample_batch
from medarch.lm.tokenizer import Tokenizer


@dataclass
class Text:
    text: str


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["kidney cyst and kidney stone"] * 3, vocab_size=270)


def test_documents_are_separated_and_come_back(tokenizer):
    texts = ["kidney", "a <|endoftext|> b", "cyst"]
    row = pack(tokenizer, [Text(text) for text in texts])
    assert row.dtype == torch.int64
    ends = (row == tokenizer.end_of_text).nonzero().flatten().tolist()
    assert (ends[0], ends[-1], len(ends)) == (0, len(row) - 1, 4)
    found = [tokenizer.decode(row[start + 1 : end]) for start, end in itertools.pairwise(ends)]
    assert found == texts


def test_targets_follow_inputs():
    tokens = torch.arange(100, 117)
    inputs, targets = sample_batch(tokens, 53, 5, torch.Generator().manual_seed(2))
    assert inputs.shape == targets.shape == (53, 5)
    assert torch.equal(targets, inputs + 1)
    # 17 tokens have 12 windows of 5 with a successor: all are drawn, the first and the last among them.
    assert set(inputs[:, 0].tolist()) == set(range(100, 112))


def test_the_generator_decides():
    tokens = torch.arange(997)

    def draw(seed):
        return sample_batch(tokens, 3, 7, torch.Generator().manual_seed(seed))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_as_few_tokens_as_possible():
    inputs, targets = sample_batch(torch.tensor([5, 6, 7]), 2, 2, torch.Generator())
    assert inputs.tolist() == [[5, 6]] * 2
    assert targets.tolist() == [[6, 7]] * 2


def test_bad_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty corpus"):
        pack(tokenizer, [])
    with pytest.raises(ValueError, match=r"3 tokens are too few for windows of length=3, which need 4"):
        sample_batch(torch.tensor([5, 6, 7]), 1, 3, torch.Generator())
    for size, length in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=f"batch_size={size} and length={length}"):
            sample_batch(torch.arange(9), size, length, torch.Generator())
