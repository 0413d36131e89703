"""The character model and its training under each remedy, on a text of a few hundred characters."""

from dataclasses import replace

import pytest
import torch

from medarch.moe import MoEConfig, TopKRouter
from medarch.moe.balance import evenness
from medarch.moe.characters import (
    CONTEXT,
    OTHER,
    CharacterModel,
    Characters,
    LimitedRouter,
    Remedy,
    contexts,
    default_config,
    evaluate,
    install,
    load_characters,
    sample,
    train_characters,
)
from medarch.moe.loss_free import LossFreeRouter
from medarch.moe.noisy import NoisyTopKRouter

SMALL = MoEConfig(11, 7, num_experts=5, num_experts_per_tok=1, norm_topk_prob=False)


@pytest.fixture(scope="module")
def text():
    characters = Characters("\0abcdefg", *(torch.empty(0, dtype=torch.long) for _ in range(3)))
    generator = torch.Generator().manual_seed(0)
    # Words in random order, so that within a word the next character is certain and between words it is not.
    words = ["abc", "defg", "gab", "fadec"]
    drawn = "".join(words[index] for index in torch.randint(4, (300,), generator=generator).tolist())
    encoded = characters.encode(drawn)
    return replace(characters, train=encoded[:700], test=encoded[700:])


def trained(text, remedy=None, **changes):
    settings = {"steps": 40, "batch_size": 53, "config": SMALL} | changes
    return train_characters(text, remedy, **settings)


def test_encode_knows_its_alphabet_and_calls_the_rest_other(text):
    assert text.encode("aGz").tolist() == [1, 7, 0]


def test_sample_and_contexts_agree():
    text = torch.arange(100, 123)
    everything = contexts(text)
    assert everything.shape == (23 - CONTEXT, CONTEXT)
    assert everything[0].tolist() == [100, 101, 102, 103, 104, 105]
    assert everything[-1].tolist() == [116, 117, 118, 119, 120, 121]
    context, target = sample(text, 200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(context[:, -1] + 1, target)
    assert set(target.tolist()) == set(range(106, 123)), "every place that has six characters before it is drawn"


def test_it_learns_and_repeats_itself(text):
    first, again = trained(text), trained(text)
    assert torch.equal(first.losses, again.losses)
    assert torch.equal(first.loads, again.loads)
    assert first.losses[-5:].mean() < 0.6 * first.losses[:5].mean()
    assert evaluate(first.model, text.test).bits < 2
    assert not torch.equal(first.losses, trained(text, seed=1).losses)


def test_loads_are_shares_and_evaluation_counts_every_character(text):
    run = trained(text)
    assert run.loads.shape == (40, 5)
    torch.testing.assert_close(run.loads.sum(-1), torch.ones(40))
    assert run.dropped.count_nonzero() == 0
    result = evaluate(run.model, text.test, most=101)
    assert result.counts.sum() == 101


def test_every_remedy_starts_from_the_same_weights_and_batches(text):
    remedies = [Remedy(), Remedy(auxiliary=0.1), Remedy(z=0.1), Remedy(bias_rate=0.1), Remedy(capacity_factor=1.5)]
    runs = [trained(text, remedy, steps=3) for remedy in remedies]
    for run in runs[:4]:  # a capacity changes the very first output
        assert run.losses[0] == runs[0].losses[0]
    for run in runs:
        assert torch.equal(run.loads[0], runs[0].loads[0])
    for run in runs[1:]:
        assert not torch.equal(run.model.mixture.experts.down_proj, runs[0].model.mixture.experts.down_proj), (
            "no effect"
        )


@pytest.mark.parametrize("remedy", [Remedy(auxiliary=0.3), Remedy(bias_rate=0.02)])
def test_a_skewed_router_is_brought_into_balance_by_the_remedy_alone(text, remedy, monkeypatch):
    def skewed(layer, chosen, seed):
        with torch.no_grad():
            layer.router.weight[2].copy_(0.2 * torch.randn(11, generator=torch.Generator().manual_seed(1)))
        install(layer, chosen, seed)

    monkeypatch.setattr("medarch.moe.characters.install", skewed)
    without, cured = (trained(text, chosen, steps=120) for chosen in (Remedy(), remedy))
    evenness_of = [evenness(evaluate(run.model, text.test).counts).entropy for run in (without, cured)]
    assert evenness_of[1] > 0.9
    assert evenness_of[1] > evenness_of[0] + 0.05


def test_install_keeps_the_weights_and_gives_the_asked_router(text):
    def layer_with(remedy):
        layer = CharacterModel(8, SMALL, torch.Generator().manual_seed(0)).mixture
        weight = layer.router.weight
        install(layer, remedy, 0)
        return layer.router, weight

    router, _ = layer_with(Remedy())
    assert type(router) is TopKRouter
    for remedy, kind in ((Remedy(bias_rate=0.1), LossFreeRouter), (Remedy(noisy=True), NoisyTopKRouter)):
        router, weight = layer_with(remedy)
        assert isinstance(router, kind)
        assert router.weight is weight
    router, weight = layer_with(Remedy(bias_rate=0.1, capacity_factor=1.0))
    assert isinstance(router, LimitedRouter)
    assert router.router.weight is weight


def test_a_capacity_drops_in_training_alone_and_the_load_is_what_was_asked_for(text):
    run = trained(text, Remedy(capacity_factor=1.0))
    assert run.dropped.max() > 0.1
    assert (run.loads.max(dim=-1).values > 0.3).any(), "the load of an expert beyond its room of a fifth shows"
    router = run.model.mixture.router
    tokens = torch.randn(101, 11, generator=torch.Generator().manual_seed(0))
    assert (router(tokens).indices >= 0).all()
    router.train()
    assert (router(tokens).indices < 0).any()


def test_the_bias_and_the_noise_exclude_each_other():
    with pytest.raises(ValueError, match="two different routers"):
        Remedy(bias_rate=0.1, noisy=True)


def test_default_config_is_top_1_with_a_gradient():
    config = default_config()
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (8, 1, False)


def test_the_corpus_by_character():
    characters = load_characters(size=30)
    assert len(characters.alphabet) == 30
    assert characters.alphabet[:2] == "\0 ", "the space is the most frequent character"
    assert len(characters.train) > 10 * len(characters.test) > 100_000
    for part in (characters.train, characters.validation, characters.test):
        assert 0 < (part == OTHER).double().mean() < 0.1
        assert part.max() == 29
    with pytest.raises(ValueError, match="size=1"):
        load_characters(size=1)
