"""Weights of the Mamba-2 mixer to and from transformers 5, without importing transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medarch.ssm.mamba2 import Mamba2Mixer

NAMES = {
    "in_proj": "in_proj.weight",
    "in_bias": "in_proj.bias",
    "conv1d_weight": "conv1d.weight",
    "conv1d_bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "D": "D",
    "norm_weight": "norm.weight",
    "out_proj": "out_proj.weight",
    "out_bias": "out_proj.bias",
}
"""Our names and those of transformers' ``Mamba2Mixer``, ``BambaMixer`` and ``GraniteMoeHybridMambaLayer``."""


@torch.no_grad()
def load_mamba2_(mixer: Mamba2Mixer, block: nn.Module) -> None:
    """Copies the weights of transformers' mixer into ours, in place.

    Args:
        mixer: Where the weights go.
        block: Where they come from: a mixer of transformers' Mamba-2, Bamba or Granite hybrid.

    Raises:
        ValueError: If one has a weight that the other lacks, or they differ in a shape.
    """
    for ours, theirs in _pairs(mixer, block):
        ours.copy_(theirs)


@torch.no_grad()
def save_mamba2_(mixer: Mamba2Mixer, block: nn.Module) -> None:
    """Copies our weights into transformers' mixer, in place: ``load_mamba2_`` the other way round.

    Raises:
        ValueError: If one has a weight that the other lacks, or they differ in a shape.
    """
    for ours, theirs in _pairs(mixer, block):
        theirs.copy_(ours)


def _pairs(mixer: Mamba2Mixer, block: nn.Module) -> list[tuple[Tensor, Tensor]]:
    own, others = dict(mixer.named_parameters()), dict(block.named_parameters())
    if {NAMES[name] for name in own} != set(others):
        differ = sorted({NAMES[name] for name in own} ^ set(others))
        raise ValueError(
            f"only one of the mixer and the {type(block).__name__} has {', '.join(differ)}: do they agree in use_bias "
            "and use_conv_bias?"
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, ours in own.items():
        theirs: Tensor = others[NAMES[name]]
        if name == "conv1d_weight":
            # Theirs is the weight of a Conv1d, whose channels each see one input channel.
            theirs = theirs.squeeze(1)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name} is {tuple(ours.shape)} but {NAMES[name]} of the {type(block).__name__} is "
                f"{tuple(theirs.shape)}: the two configurations differ"
            )
        pairs.append((ours, theirs))
    return pairs
