"""What the layers of a hybrid attend to and hold of a text, and a picture of their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from medarch.lm.attention import CausalSelfAttention
from medarch.lm.hybrid import HybridDecoder, HybridLayer
from medarch.ssm.mamba import MambaMixer
from medarch.ssm.state_content import state_shares

COLOURS = {"attention": "#D55E00", "mamba": "#0072B2", "mamba2": "#009E73"}
NAMES = {"attention": "attention", "mamba": "Mamba", "mamba2": "Mamba-2"}
INK = "#1f2937"


class LayerView(NamedTuple):
    """What one layer makes of a text.

    Attributes:
        kind: ``"attention"`` or ``"mamba"``.
        shares: In the row of a position, how it is divided among the positions up to it: the attention weights, mean
            over the heads, or the parts of the state (``medarch.ssm.state_content.state_shares``).
    """

    kind: str
    shares: Float[Tensor, "time time"]


@torch.no_grad()
def layer_views(model: HybridDecoder, input_ids: Int[Tensor, "time"]) -> list[LayerView]:
    """Looks into every layer while the model reads one text.

    Args:
        model: A decoder of attention and Mamba layers.
        input_ids: The text.

    Raises:
        ValueError: If a layer mixes positions in another way.
    """
    views, hidden_states = [], model.embed_tokens(input_ids[None]) * model.config.embedding_multiplier
    for index, layer in enumerate(cast(Iterable[HybridLayer], model.layers)):
        normed = layer.mixer_norm(hidden_states)
        if isinstance(layer.mixer, CausalSelfAttention):
            views.append(LayerView("attention", layer.mixer.attention_weights(normed)[0].mean(0)))
        elif isinstance(layer.mixer, MambaMixer):
            views.append(LayerView("mamba", state_shares(layer.mixer.select(normed)[0])[0]))
        else:
            raise ValueError(f"layer {index} is a {type(layer.mixer).__name__}, neither attention nor Mamba")
        hidden_states, _ = layer(hidden_states)
    return views


def draw_patterns(axes: Axes, patterns: dict[str, Sequence[tuple[str, str]]]) -> None:
    """Layers as boxes, one row a model, the first layer on the left; a dot marks a mixture of experts.

    Args:
        axes: Where to draw; its frame is removed.
        patterns: For each model its layers, mixer and feed-forward, as ``DecoderConfig.layer_kinds`` gives them.
    """
    longest = max(len(layers) for layers in patterns.values())
    for row, (name, layers) in enumerate(patterns.items()):
        axes.text(0, -2.1 * row + 0.75, name, ha="left", va="bottom", color=INK)
        for place, (mixer, feed_forward) in enumerate(layers):
            box = Rectangle((place + 0.06, -2.1 * row - 0.5), 0.88, 1.1, facecolor=COLOURS[mixer], edgecolor="none")
            axes.add_patch(box)
            if feed_forward == "moe":
                axes.plot(place + 0.5, -2.1 * row + 0.05, "o", color="white", markersize=4.5)
    kinds = {mixer: None for layers in patterns.values() for mixer, _ in layers}
    handles = [Rectangle((0, 0), 1, 1, facecolor=COLOURS[kind], edgecolor="none") for kind in kinds]
    axes.legend(handles, [NAMES[kind] for kind in kinds], ncols=len(kinds), loc="upper left", bbox_to_anchor=(0, -0.02))
    axes.set(xlim=(-0.1, longest + 0.1), ylim=(-2.1 * (len(patterns) - 1) - 0.7, 1.5))
    axes.axis("off")
