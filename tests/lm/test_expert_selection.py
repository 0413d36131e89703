"""Recorded decisions are what the experts computed; hooks never outlive the block; layers stay apart."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.expert_selection import count_experts, record_selections
from medarch.lm.study_routers import build_tiny, check_family, inputs_for
from medarch.moe.config import MoEConfig
from medarch.moe.router import NO_EXPERT

# Whether the k largest logits name the chosen experts, for every token.
FAMILIES = {
    "mixtral": True, "qwen2_moe": True, "qwen3_moe": True, "olmoe": True, "jamba": True, "granitemoe": True,
    "granitemoehybrid": True, "jetmoe": True, "dbrx": True, "phimoe": True, "gpt_oss": True, "qwen3_next": True,
    "gemma4": True, "deepseek_v2": False, "deepseek_v3": False, "glm4_moe": False, "switch_transformers": False,
    "longcat_flash": False, "deepseek_v4": False, "zaya": False,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_the_work_that_the_experts_did(family: str) -> None:
    """The oracle watches the matrix products and does not know of any router."""
    found = check_family(family)
    assert found.counts_equal_work is True
    assert found.logits_equal is True
    assert (found.top_k_of_logits == 1) is FAMILIES[family]


def test_nllb_decides_for_eight_experts_and_runs_two() -> None:
    """Transformers 5.23 reads the router's mask of zeros and ones as experts' numbers; the decision is recorded."""
    found = check_family("nllb_moe")
    assert found.logits_equal is True
    assert found.counts_equal_work is False


def test_llama4_decides_by_its_scores() -> None:
    model, inputs = build_tiny("llama4"), inputs_for(build_tiny("llama4"))
    with torch.no_grad(), record_selections(model) as recorder:
        model(**inputs)
    for layer in recorder.blocks:
        expected = recorder.logits(layer).topk(3).indices.sort(-1).values
        assert torch.equal(recorder.indices(layer).sort(-1).values, expected)


def test_deepseek_v3_against_its_rule_written_anew() -> None:
    """Sigmoid plus bias, groups by their two best, the best group only, the three best in it (arXiv:2412.19437)."""
    model = build_tiny("deepseek_v3")
    with torch.no_grad(), record_selections(model) as recorder:
        model(**inputs_for(model))
    for layer, block in recorder.blocks.items():
        bias = block.router.e_score_correction_bias
        for scores, chosen in zip(
            (recorder.logits(layer).sigmoid() + bias).flatten(0, 1).tolist(),
            recorder.indices(layer).flatten(0, 1).tolist(),
            strict=True,
        ):
            best = max(range(2), key=lambda group: sum(sorted(scores[4 * group : 4 * group + 4])[-2:]))
            inside = sorted(range(4 * best, 4 * best + 4), key=lambda expert: scores[expert])[-3:]
            assert sorted(chosen) == sorted(inside)


def test_switch_marks_the_tokens_it_dropped() -> None:
    model = build_tiny("switch_transformers")
    ids = torch.full((1, 11), 7)  # the same token throughout wants the same expert, which has room for four
    with torch.no_grad(), record_selections(model) as recorder:
        model(input_ids=ids, decoder_input_ids=ids[:, :3])
    layer = "encoder.block.1.layer.1.mlp"
    used = Counter(recorder.indices(layer).flatten().tolist())
    assert max(count for expert, count in used.items() if expert != NO_EXPERT) <= 4
    assert used[NO_EXPERT] >= 11 - 4 * (len(used) - 1)
    assert int(recorder.counts(within="encoder.")[layer].sum()) == 11 - used[NO_EXPERT]
    assert list(recorder.counts(within="decoder.")) == ["decoder.block.1.layer.2.mlp"]


def tiny() -> Decoder:
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        feed_forwards=("moe",),
        moe=MoEConfig(16, 12, num_experts=5, num_experts_per_tok=2, initializer_range=0.3),
    )
    return Decoder(config, torch.Generator().manual_seed(0)).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def test_our_decoder_against_its_own_routing_with_padding() -> None:
    model, ids = tiny(), tokens(2, 7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad(), record_selections(model) as recorder:
        routings = model(ids, mask).routings
    for name, routing in zip(recorder.blocks, routings, strict=True):
        assert torch.equal(recorder.indices(name), routing.indices)
        assert torch.equal(recorder.logits(name), routing.logits)
        assert torch.equal(recorder.counts()[name].sum(0), routing.statistics.counts)


def test_what_the_mask_leaves_out_is_not_counted() -> None:
    indices = torch.tensor([[[0, 1], [1, 2], [3, 0]], [[2, 1], [3, NO_EXPERT], [0, 1]]])
    mask = torch.tensor([[False, True, True], [False, True, False]])  # the first token, and padding at the end
    assert count_experts(indices, 5, mask).tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert count_experts(indices, 5).tolist() == [[2, 2, 1, 1, 0], [1, 2, 1, 1, 0]]


def test_the_mask_of_a_transformers_model_leaves_out_padding() -> None:
    """Mixtral routes its padding like text; only the mask keeps it out of the counts."""
    model, ids = build_tiny("mixtral"), tokens(2, 7)
    attention = torch.ones(2, 7, dtype=torch.long)
    attention[1, 4:] = 0
    counts = []
    for filler in (0, 9):
        with torch.no_grad(), record_selections(model) as recorder:
            model(input_ids=ids.masked_fill(attention == 0, filler), attention_mask=attention)
        counts.append(recorder.counts(attention.bool()))
        assert all(int(each[1].sum()) == 4 * 3 for each in counts[-1].values())
    assert all(torch.equal(counts[0][name], counts[1][name]) for name in counts[0])


def test_steps_of_generation_follow_one_another() -> None:
    model, ids = tiny(), tokens(2, 7)
    with torch.no_grad(), record_selections(model) as whole:
        model(ids)
    cache = model.new_cache(2, 7)
    with torch.no_grad(), record_selections(model) as stepwise:
        model(ids[:, :5], cache=cache)
        for step in (5, 6):
            model(ids[:, step : step + 1], cache=cache)
    for name in whole.blocks:
        assert torch.equal(stepwise.indices(name), whole.indices(name))


def test_batches_are_not_mixed() -> None:
    model = tiny()
    with torch.no_grad(), record_selections(model) as recorder:
        model(tokens(2, 7))
        with pytest.raises(ValueError, match=r"a batch of 3 after a batch of 2: call clear\(\)"):
            model(tokens(3, 5))
        recorder.clear()
        model(tokens(3, 5))
    assert recorder.indices("layers.0.feed_forward").shape == (3, 5, 2)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["ours", "mixtral", "jetmoe"])
def test_no_hook_outlives_the_block_even_when_it_fails(family: str) -> None:
    model = tiny() if family == "ours" else build_tiny(family)
    before = hooks_of(model)
    during = []

    def fail() -> None:
        with record_selections(model):
            during.append(hooks_of(model))
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert during[0] > before
    assert hooks_of(model) == before
    with torch.no_grad(), record_selections(model) as recorder:
        model(tokens(1, 3))
    assert hooks_of(model) == before
    with torch.no_grad():
        model(tokens(1, 5))
    assert recorder.indices(next(iter(recorder.blocks))).shape[1] == 3


def test_recording_changes_nothing() -> None:
    model, ids = tiny(), tokens(2, 7)
    with torch.no_grad():
        plain = model(ids).logits
        with record_selections(model):
            recorded = model(ids).logits
    assert torch.equal(plain, recorded)


def test_experts_that_are_not_told_their_tokens_are_an_error() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts, self.top_k = 2, 1
            self.gate, self.experts = nn.Linear(4, 2), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.gate(x)
            return self.experts(x)

    model = nn.Sequential(Block())
    with (
        record_selections(model),
        pytest.raises(ValueError, match=r"Sequential: the experts of 0 \(Identity\) are not told"),
    ):
        model(torch.ones(3, 4))


def test_bad_questions_are_answered() -> None:
    model = tiny()
    with torch.no_grad(), record_selections(model) as recorder:
        with pytest.raises(ValueError, match=r"nothing recorded for layers.1.feed_forward"):
            recorder.indices("layers.1.feed_forward")
        model(tokens(2, 7))
    with pytest.raises(ValueError, match=r"no mixture-of-experts layer 'layers.9'; there are layers.0"):
        recorder.indices("layers.9")
    with pytest.raises(ValueError, match=r"must be boolean of shape \(2, 7\)"):
        recorder.counts(torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"begins with 'encoder.'"):
        recorder.counts(within="encoder.")
