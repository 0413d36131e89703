"""A look into a hybrid's layers changes nothing and shows what each layer works with."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.hybrid_views import draw_patterns, layer_views
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba2_config import Mamba2Config


def hybrid(**changes: object) -> HybridDecoder:
    fields = {
        "mixers": ("mamba", "attention", "mamba"), "mamba": MambaConfig(12, state_size=3), "positions": "none",
        "embedding_multiplier": 2.0, "attention_multiplier": 0.7, "initializer_range": 0.4,
    }  # fmt: skip
    config = HybridConfig(53, 12, 10, 3, 3, **fields | changes)  # type: ignore[arg-type]
    return HybridDecoder(config, torch.Generator().manual_seed(4)).eval()


def test_rows_are_shares_and_the_second_layer_sees_what_the_first_made() -> None:
    model = hybrid()
    ids = torch.randint(53, (13,), generator=torch.Generator().manual_seed(5))
    views = layer_views(model, ids)
    assert [view.kind for view in views] == ["mamba", "attention", "mamba"]
    for view in views:
        torch.testing.assert_close(view.shares.sum(-1), torch.ones(13))
        assert not view.shares.triu(1).any()
    # The attention weights, computed once more from the layer's own queries and keys.
    read: list[torch.Tensor] = []
    hook = model.layers[1].mixer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(ids[None])
    hook.remove()
    mixer = model.layers[1].mixer
    queries, keys = (torch.nn.functional.linear(read[0], weight) for weight in (mixer.q_proj, mixer.k_proj))
    scores = 0.7 * torch.einsum("bthd,bshd->bhts", queries.view(1, 13, 3, 4), keys.view(1, 13, 3, 4))
    later = torch.ones(13, 13, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1).mean(1)[0]
    torch.testing.assert_close(views[1].shares, weights, rtol=1e-4, atol=1e-5)


def test_a_layer_of_another_kind_is_named() -> None:
    model = hybrid(mixers=("mamba2",), mamba=None, mamba2=Mamba2Config(12, head_dim=8, state_size=3))
    with pytest.raises(ValueError, match="layer 0 is a Mamba2Mixer"):
        layer_views(model, torch.arange(5))


def test_every_layer_is_a_box_and_every_mixture_a_dot() -> None:
    _, axes = plt.subplots()
    draw_patterns(axes, {"one": [("mamba", "dense"), ("attention", "moe")], "two": [("mamba2", "moe")]})
    assert len(axes.patches) == 3
    assert len(axes.lines) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Mamba", "attention", "Mamba-2"]
    plt.close()
