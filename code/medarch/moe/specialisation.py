"""Do experts specialise? The mutual information of expert and organ system, against a null.

A table of experts by systems always shows some pattern, even for a router that never learned anything: chance
alone makes counts uneven. So the pattern is measured by one number and compared with the same number after
the systems were shuffled among the definitions. Whole definitions are shuffled, because the words of one
definition resemble one another and are not independent observations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medarch.moe.router import Routing


def experts_by_definition(routing: Routing, mask: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch experts"]:
    """How many of each definition's word slots went to each expert.

    Args:
        routing: of the words that the mask keeps, in their order; k slots per word.
        mask: True for a word.

    Raises:
        ValueError: the routing is not that of these words.
    """
    text = mask.nonzero()[:, 0]
    num_experts, k = routing.probs.shape[-1], routing.indices.shape[-1]
    if routing.indices.shape != (len(text), k):
        raise ValueError(f"routing of shape {tuple(routing.indices.shape)} is not that of the mask's {len(text)} words")
    flat = text[:, None] * num_experts + routing.indices
    return flat.flatten().bincount(minlength=len(mask) * num_experts).view(len(mask), num_experts)


def expert_by_system(
    counts: Int[Tensor, "batch experts"], labels: Int[Tensor, "batch"], num_systems: int
) -> Int[Tensor, "experts systems"]:
    """How many word slots of each system's definitions went to each expert."""
    table = counts.new_zeros(num_systems, counts.shape[-1]).index_add(0, labels, counts)
    return table.T


def normalised_mutual_information(table: Tensor) -> float:
    """Mutual information of a contingency table's rows and columns over the mean of their two entropies.

    It is 0 where rows and columns are independent and 1 where each determines the other. (The information is
    divided by the arithmetic mean of the entropies, as in scikit-learn.)

    Args:
        table: counts, not negative, of shape (rows, columns).

    Raises:
        ValueError: the table is empty.
    """
    total = table.sum().double()
    if not total:
        raise ValueError(f"a table of shape {tuple(table.shape)} without any count has no mutual information")
    joint = table.double() / total
    rows, columns = (torch.special.entr(joint.sum(axis)).sum() for axis in (1, 0))
    information = rows + columns - torch.special.entr(joint).sum()
    mean = (rows + columns) / 2
    return float(information / mean) if mean > 0 else 0.0


@dataclass(frozen=True)
class PermutationTest:
    """An observed statistic and its distribution when there is nothing to be found.

    Attributes:
        observed: the statistic.
        null: the statistic after each shuffle, ascending.
    """

    observed: float
    null: Float[Tensor, "permutations"]

    @property
    def null_mean(self) -> float:
        return float(self.null.mean())

    @property
    def null_max(self) -> float:
        return float(self.null[-1])

    def null_quantile(self, fraction: float) -> float:
        """The value below which this fraction of the shuffles lies."""
        return float(self.null.quantile(fraction))

    @property
    def p_value(self) -> float:
        """Share of the shuffles that reach the observed value, the observed arrangement counted as one."""
        return float(((self.null >= self.observed).sum() + 1) / (len(self.null) + 1))


def specialisation_test(
    counts: Int[Tensor, "batch experts"],
    labels: Int[Tensor, "batch"],
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> PermutationTest:
    """Normalised mutual information of expert and system, against systems shuffled among definitions.

    Args:
        counts: slots of each definition by expert, from ``experts_by_definition``.
        labels: the system of each definition.
        permutations: number of shuffles.
        seed: of the shuffles.

    Raises:
        ValueError: lengths differ, or ``permutations`` is less than 1.
    """
    if len(counts) != len(labels) or permutations < 1:
        raise ValueError(
            f"{len(counts)} definitions, {len(labels)} labels, permutations={permutations}: "
            "one label for each definition and at least one permutation are needed"
        )
    num_systems = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)

    def statistic(order: Tensor) -> float:
        return normalised_mutual_information(expert_by_system(counts, order, num_systems))

    null = [statistic(labels[torch.randperm(len(labels), generator=generator)]) for _ in range(permutations)]
    return PermutationTest(statistic(labels), torch.tensor(null, dtype=torch.float64).sort().values)


class Predictability(NamedTuple):
    """How often a held-out word's first expert is guessed right, by what one knows.

    Attributes:
        nothing: guessing the expert that is busiest overall.
        system: guessing the busiest expert for the definition's organ system.
        word: guessing the expert that this very word went to most often in training, or the busiest overall
            where the word did not occur there.
        words: held-out words that were guessed.
    """

    nothing: float
    system: float
    word: float
    words: int


class Routed(NamedTuple):
    """Words in a row: which word, which first expert, which system the definition belongs to."""

    word: Int[Tensor, "words"]
    expert: Int[Tensor, "words"]
    system: Int[Tensor, "words"]


def routed_words(
    routing: Routing,
    tokens: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    labels: Int[Tensor, "batch"],
) -> Routed:
    """Each word that the mask keeps with its first expert and its definition's system."""
    return Routed(tokens[mask], routing.indices[:, 0], labels[mask.nonzero()[:, 0]])


def predictability(train: Routed, held_out: Routed) -> Predictability:
    """How well the first expert of a held-out word is predicted by the system, and by the word itself.

    The guesses are learned from the routing of training definitions alone. Where the word predicts the
    expert far better than the system does, experts have divided the vocabulary, and a table of experts by
    systems shows which words the systems use.

    Raises:
        ValueError: there is no held-out word.
    """
    if not len(held_out.expert):
        raise ValueError("no held-out words to predict the expert of")
    overall = int(train.expert.bincount().argmax())

    def right(known: Tensor, asked: Tensor) -> float:
        size = int(torch.maximum(known.max(), asked.max())) + 1
        num_experts = int(train.expert.max()) + 1
        table = (known * num_experts + train.expert).bincount(minlength=size * num_experts)
        table = table.view(size, num_experts)
        guess = torch.where(table.sum(1) > 0, table.argmax(1), overall)
        return float((guess[asked] == held_out.expert).float().mean())

    return Predictability(
        nothing=float((held_out.expert == overall).float().mean()),
        system=right(train.system, held_out.system),
        word=right(train.word, held_out.word),
        words=len(held_out.expert),
    )
