"""Loss-free balancing: transformers' router, the update by hand, and what the bias may and may not touch."""

import math

import pytest
import torch

from medarch.moe import NO_EXPERT, MoEConfig, MoELayer, TopKRouter
from medarch.moe.loss_free import LossFreeRouter


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", [1, 3])
def test_same_choice_and_weights_as_deepseek_v3_in_transformers(k):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=13,
            n_routed_experts=7,
            num_experts_per_tok=k,
            n_group=1,
            topk_group=1,
            norm_topk_prob=k > 1,
            routed_scaling_factor=1.0,
        )
    )
    ours = LossFreeRouter(MoEConfig(13, 5, 7, k, norm_topk_prob=k > 1, initializer_range=0.5), generator())
    bias = torch.randn(7, generator=generator(1)) * 0.3
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(bias)
        ours.e_score_correction_bias.copy_(bias)
        tokens = torch.randn(101, 13, generator=generator(2))
        logits, weights, indices = theirs(tokens)
        routing = ours(tokens)
        plain = TopKRouter.forward(ours, tokens)
    torch.testing.assert_close(routing.logits, logits)
    # Theirs does not sort the experts of a token.
    order, our_order = indices.argsort(-1), routing.indices.argsort(-1)
    assert torch.equal(indices.gather(-1, order), routing.indices.gather(-1, our_order))
    torch.testing.assert_close(weights.gather(-1, order), routing.weights.gather(-1, our_order))
    assert not torch.equal(plain.indices.sort(-1).values, routing.indices.sort(-1).values), "the bias did nothing"


def test_update_by_hand():
    router = LossFreeRouter(MoEConfig(3, 2, 4, 1, norm_topk_prob=False), update_rate=0.5)
    router.counts.copy_(torch.tensor([5.0, 2.0, 1.0, 0.0]))  # mean 2
    router.update_bias()
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.5, 0.5]
    assert router.counts.tolist() == [0, 0, 0, 0]
    router.update_bias()
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.5, 0.5], "no load, no change"


def test_counts_accumulate_in_training_alone_and_leave_padding_out():
    router = LossFreeRouter(MoEConfig(6, 4, 5, 2, initializer_range=1.0), generator())
    tokens = torch.randn(2, 7, 6, generator=generator(1))
    tokens[1, 3:] = math.nan
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    first = router(tokens, mask)
    second = router(tokens, mask)
    assert (first.indices[~mask] == NO_EXPERT).all()
    assert torch.equal(router.counts, (first.statistics.counts + second.statistics.counts).float())
    assert router.counts.sum() == 2 * 2 * 10
    router.eval()
    router(tokens, mask)
    assert router.counts.sum() == 2 * 2 * 10


def test_the_bias_chooses_but_does_not_weigh():
    router = LossFreeRouter(MoEConfig(6, 4, 5, 2, initializer_range=1.0), generator(), score="softmax")
    tokens = torch.randn(11, 6, generator=generator(1))
    torch.testing.assert_close(router(tokens), TopKRouter.forward(router, tokens))
    router.e_score_correction_bias[3] = 10.0
    routing = router(tokens)
    assert (routing.indices[:, 0] == 3).all()
    chosen = routing.probs.gather(-1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    assert not router.e_score_correction_bias.requires_grad
    assert "e_score_correction_bias" in router.state_dict()
    assert "counts" not in router.state_dict()


def test_updates_bring_a_skewed_router_into_balance():
    config = MoEConfig(6, 4, 5, 1, norm_topk_prob=False, router_bias=True, initializer_range=0.2)
    router = LossFreeRouter(config, generator(), update_rate=0.01)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]))
    tokens = torch.randn(503, 6, generator=generator(1))
    before = router(tokens).statistics.entropy
    for _ in range(200):
        router(tokens)
        router.update_bias()
    assert before < 0.5
    assert router(tokens).statistics.entropy > 0.98


def test_a_layer_takes_it_and_learns():
    config = MoEConfig(6, 4, 5, 2)
    layer = MoELayer(config, generator(), router=LossFreeRouter(config, generator()))
    output, routing = layer(torch.randn(3, 11, 6, generator=generator(1)))
    output.square().sum().backward()
    assert routing.indices.shape == (3, 11, 2)
    assert layer.router.weight.grad.abs().max() > 0


@pytest.mark.usefixtures("annotations_off")
def test_faults_are_refused_by_name():
    with pytest.raises(ValueError, match="update_rate must be positive"):
        LossFreeRouter(MoEConfig(6, 4), update_rate=0.0)
    with pytest.raises(ValueError, match="score must be one of"):
        LossFreeRouter(MoEConfig(6, 4), score="tanh")
    with pytest.raises(ValueError, match="softmax-then-topk"):
        LossFreeRouter(MoEConfig(6, 4, router_order="topk-then-softmax"))
