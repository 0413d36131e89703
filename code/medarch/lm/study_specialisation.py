"""Do a language model's experts divide their work by organ system? Layer by layer, on the committed checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.data.corpus import Document, load_corpus
from medarch.lm.decoder import Decoder
from medarch.lm.evaluation import evaluate
from medarch.lm.loading import load
from medarch.lm.tokenizer import Tokenizer
from medarch.moe.layer import MoELayer
from medarch.moe.specialisation import PermutationTest, Routed, predictability, specialisation_test

NAME = "lm/specialisation"


@dataclass(frozen=True)
class RoutedDocuments:
    """Every token of some documents with the experts that each layer sent it to.

    Attributes:
        tokens: the tokens, document after document.
        documents: for each token the number of its document.
        experts: for each layer with a router the k experts of each token, the strongest first.
        num_experts: experts of a layer.
        systems: for each document the number of its organ system.
        names: the systems' names, in alphabetical order.
    """

    tokens: Int[Tensor, "tokens"]
    documents: Int[Tensor, "tokens"]
    experts: list[Int[Tensor, "tokens k"]]
    num_experts: int
    systems: Int[Tensor, "documents"]
    names: list[str]

    def counts(self, layer: int) -> Int[Tensor, "documents experts"]:
        """How many of each document's slots went to each expert of a layer."""
        flat = self.documents[:, None] * self.num_experts + self.experts[layer]
        size = len(self.systems) * self.num_experts
        return flat.flatten().bincount(minlength=size).view(-1, self.num_experts)

    def routed(self, layer: int) -> Routed:
        """Each token with its first expert and its document's system."""
        return Routed(self.tokens, self.experts[layer][:, 0], self.systems[self.documents])


@torch.no_grad()
def route_documents(
    model: Decoder, tokenizer: Tokenizer, documents: Sequence[Document], names: Sequence[str], batch_size: int = 32
) -> RoutedDocuments:
    """Reads documents and notes where each token went.

    A document is read after an end of text, as in training, and what exceeds the context is left out; the end
    of text itself is not counted.

    Args:
        model: a decoder with at least one router.
        tokenizer: its tokenizer.
        documents: documents that lie under one organ system each.
        names: the systems' names, which number them.
        batch_size: documents that are read together.

    Raises:
        ValueError: there is no document, one has no system among the names, or no layer has a router.
    """
    unnamed = [document.id for document in documents if document.system not in names]
    if not documents or unnamed:
        raise ValueError(
            f"{len(documents)} documents, of which {unnamed[:1]} have no system among the {len(names)} named"
        )
    limit = model.config.max_position_embeddings - 1
    texts = [tokenizer.encode(document.text)[:limit] for document in documents]
    # Texts of like length are read together; the order of the documents is kept in what is returned.
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    chosen: dict[int, list[Tensor]] = {}
    for first in range(0, len(order), batch_size):
        group = order[first : first + batch_size]
        length = 1 + max(len(texts[number]) for number in group)
        inputs = torch.full((len(group), length), tokenizer.end_of_text)
        mask = torch.zeros(len(group), length, dtype=torch.bool)
        for row, number in enumerate(group):
            inputs[row, 1 : 1 + len(texts[number])] = torch.tensor(texts[number])
            mask[row, : 1 + len(texts[number])] = True
        routings = [routing for routing in model(inputs, mask, logits_to_keep=1).routings if routing is not None]
        if not routings:
            raise ValueError("the model has no router in any layer, so that there is nothing to be seen of experts")
        for row, number in enumerate(group):
            chosen[number] = [routing.indices[row, 1 : 1 + len(texts[number])] for routing in routings]
        num_experts = routings[0].probs.shape[-1]
    lengths = torch.tensor([len(text) for text in texts])
    return RoutedDocuments(
        tokens=torch.tensor([token for text in texts for token in text]),
        documents=torch.arange(len(texts)).repeat_interleave(lengths),
        experts=[torch.cat([chosen[number][layer] for number in range(len(texts))]) for layer in range(len(chosen[0]))],
        num_experts=num_experts,
        systems=torch.tensor([list(names).index(str(document.system)) for document in documents]),
        names=list(names),
    )


def surprise_by_document(
    known: RoutedDocuments, held_out: RoutedDocuments, layer: int
) -> Float[Tensor, "documents experts"]:
    """For each document and expert, slots received beyond what its tokens let one expect.

    Of each token it is expected that it goes where the same token went in the known documents, or, if it does not
    occur there, where tokens go on the whole. What is left cannot be explained by the words that a document uses.

    Args:
        known: documents to learn the expectation from.
        held_out: other documents.
        layer: which layer.
    """
    experts, k = known.num_experts, known.experts[layer].shape[1]
    size = int(max(known.tokens.max(), held_out.tokens.max())) + 1
    flat = (known.tokens[:, None] * experts + known.experts[layer]).flatten()
    table = flat.bincount(minlength=size * experts).view(size, experts).double()
    overall = table.sum(0)
    seen = table.sum(1, keepdim=True)
    expected = torch.where(seen > 0, table / seen.clamp(min=1), overall / overall.sum()) * k
    total = torch.zeros(len(held_out.systems), experts, dtype=torch.float64)
    total.index_add_(0, held_out.documents, expected[held_out.tokens])
    return held_out.counts(layer) - total


def beyond_the_words(
    known: RoutedDocuments, held_out: RoutedDocuments, layer: int, permutations: int = 500, seed: int = 0
) -> PermutationTest:
    """Does the organ system matter once the words are accounted for? ``surprise_by_document`` against a null.

    The statistic is the sum over systems of the squared length of the system's mean surprise, times its number of
    documents: 0 if no system's documents go astray together. Whole documents are shuffled, as in
    ``specialisation_test``, and the two arguments must not share one.
    """
    surprise = surprise_by_document(known, held_out, layer)
    lengths = held_out.documents.bincount(minlength=len(held_out.systems)).double()
    surprise = surprise / lengths.clamp(min=1)[:, None]
    generator = torch.Generator().manual_seed(seed)

    def statistic(systems: Tensor) -> float:
        documents = systems.bincount(minlength=len(held_out.names)).double()
        total = torch.zeros(len(held_out.names), surprise.shape[1], dtype=torch.float64)
        total.index_add_(0, systems, surprise)
        return float((total.square().sum(1) / documents.clamp(min=1)).sum())

    orders = (torch.randperm(len(held_out.systems), generator=generator) for _ in range(permutations))
    null = [statistic(held_out.systems[order]) for order in orders]
    return PermutationTest(statistic(held_out.systems), torch.tensor(null, dtype=torch.float64).sort().values)


@contextmanager
def silenced(model: Decoder, layer: int, expert: int) -> Iterator[None]:
    """One expert of one layer answers with zeros; the router goes on sending it tokens.

    Raises:
        ValueError: there is no such expert.
    """
    block = model.layers[layer].feed_forward
    if not isinstance(block, MoELayer) or not 0 <= expert < block.config.num_experts:
        raise ValueError(f"layer {layer} has no expert {expert}")
    weight = block.experts.down_proj.data[expert]
    kept = weight.clone()
    weight.zero_()
    try:
        yield
    finally:
        weight.copy_(kept)


def bits_by_system(
    model: Decoder, tokenizer: Tokenizer, documents: Sequence[Document], names: Sequence[str]
) -> Float[Tensor, "systems"]:
    """How well each system's definitions are predicted, in bits a byte.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        documents: documents with a system each.
        names: the systems; every one of them must occur.
    """
    found = evaluate(model, tokenizer, documents)
    systems = torch.tensor([list(names).index(str(document.system)) for document in documents])
    nats, size = (
        torch.zeros(len(names), dtype=torch.float64).index_add_(0, systems, torch.tensor(each, dtype=torch.float64))
        for each in (found.document_nats, found.document_bytes)
    )
    return nats / size / math.log(2)


def with_system(documents: Sequence[Document], names: Sequence[str] | None = None) -> list[Document]:
    """The documents under one organ system, or under one of those named."""
    return [item for item in documents if item.system is not None and (names is None or item.system in names)]


@benchmark(
    NAME,
    modules=["medarch.lm.study_specialisation"],
    data=["book/checkpoints/moe/model.safetensors", "book/checkpoints/moe/tokenizer.json"],
)
def specialisation(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Experts and organ systems in each layer of the committed mixture, trained and untrained.

    The untrained model has the same sizes, tokenizer and documents. The words' usual experts are learned from
    validation definitions, and everything is measured on test definitions. Systems with fewer than ten test
    definitions are left out where an expert is silenced, since their numbers would be noise.

    Args:
        device: Only ``"cpu"`` is measured.
        quick: Whether to read a few definitions only.

    Returns:
        For each layer, trained and untrained, the mutual information with its null, what the system tells beyond
        the words, and how well an expert is guessed; and by how many bits a byte each system's definitions are
        predicted worse when each expert is silenced.
    """
    corpus = load_corpus()
    permutations = 20 if quick else 1000
    model, tokenizer = load("moe")
    untrained = Decoder(model.config, torch.Generator().manual_seed(0)).eval()
    test, known = with_system(corpus.test), with_system(corpus.validation)
    if quick:
        test, known = test[:40], known[:40]
    names = sorted({str(document.system) for document in (*test, *known)})
    results: dict[str, Any] = {
        "documents": len(test),
        "systems": len(names),
        "permutations": permutations,
        "layers": {
            state: _layers(decoder, tokenizer, known, test, names, permutations)
            for state, decoder in (("trained", model), ("untrained", untrained))
        },
    }
    parts = Partials(find(NAME), device, quick)
    large = sorted(name for name in names if sum(item.system == name for item in test) >= (1 if quick else 10))
    asked = with_system(test, large)
    layers = range(1) if quick else range(model.config.num_hidden_layers)
    experts = range(results["layers"]["trained"][0]["experts"])
    bits = partial(_bits, model, tokenizer, asked, large)
    whole = parts.get("bits", bits)
    silent = [
        [parts.get(f"bits-{layer}-{expert}", partial(bits, (layer, expert))) for expert in experts] for layer in layers
    ]
    share = route_documents(model, tokenizer, asked, large)
    results["silenced"] = {
        "systems": large,
        "documents": [sum(item.system == name for item in asked) for name in large],
        "bits_per_byte": whole,
        "harm": [
            [[after - before for after, before in zip(each, whole, strict=True)] for each in layer] for layer in silent
        ],
        "share": [_share(share, layer) for layer in layers],
    }
    return results


def _bits(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    names: Sequence[str],
    silent: tuple[int, int] | None = None,
) -> list[float]:
    with nullcontext() if silent is None else silenced(model, *silent):
        bits: list[float] = bits_by_system(model, tokenizer, documents, names).tolist()
    return bits


def _share(routed: RoutedDocuments, layer: int) -> list[list[float]]:
    """For each expert the share of each system's slots that it receives."""
    table = torch.zeros(len(routed.names), routed.num_experts, dtype=torch.float64)
    table.index_add_(0, routed.systems, routed.counts(layer).double())
    share: list[list[float]] = (table / table.sum(1, keepdim=True)).T.tolist()
    return share


def _layers(
    model: Decoder,
    tokenizer: Tokenizer,
    known: list[Document],
    test: list[Document],
    names: list[str],
    permutations: int,
) -> list[dict[str, float]]:
    learned = route_documents(model, tokenizer, known, names)
    held_out = route_documents(model, tokenizer, test, names)
    found = []
    for layer in range(len(held_out.experts)):
        by_system = specialisation_test(held_out.counts(layer), held_out.systems, permutations=permutations)
        beyond = beyond_the_words(learned, held_out, layer, permutations)
        guess = predictability(learned.routed(layer), held_out.routed(layer))
        found.append(
            {
                "experts": held_out.num_experts,
                "nmi": by_system.observed,
                "null_mean": by_system.null_mean,
                "null_max": by_system.null_max,
                "p_value": by_system.p_value,
                "beyond_over_null_mean": beyond.observed / beyond.null_mean,
                "beyond_p_value": beyond.p_value,
                "guessed_from_nothing": guess.nothing,
                "guessed_from_system": guess.system,
                "guessed_from_token": guess.word,
            }
        )
    return found
