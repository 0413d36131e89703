"""One feed-forward network: what an expert is, and the dense layer that a mixture is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medarch.moe.config import HiddenAct, MoEConfig


def feed_forward(
    hidden_states: Float[Tensor, "*batch hidden"],
    up_proj: Float[Tensor, "up hidden"],
    down_proj: Float[Tensor, "hidden intermediate"],
    hidden_act: HiddenAct,
) -> Float[Tensor, "*batch hidden"]:
    """The network itself, without biases: up, activation, down.

    With ``"silu"`` it is SwiGLU, ``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202): the
    first ``intermediate`` rows of ``up_proj`` are the gate and the others the up-projection, so that one
    matrix product serves both and ``up = 2 * intermediate``. With ``"gelu"`` it is ``down(gelu(up(x)))``
    and ``up = intermediate``.

    Args:
        hidden_states: Token vectors.
        up_proj: Weights into the intermediate space, gate and up stacked where there is a gate.
        down_proj: Weights back to the hidden space.
        hidden_act: Which of the two networks.

    Returns:
        As many token vectors.
    """
    inner = F.linear(hidden_states, up_proj)
    if hidden_act == "silu":
        gate, up = inner.chunk(2, dim=-1)
        inner = F.silu(gate) * up
    else:
        inner = F.gelu(inner)
    return F.linear(inner, down_proj)


class DenseMLP(nn.Module):
    """A dense feed-forward layer: every token meets every weight.

    Args:
        hidden_size: Width of a token's vector.
        intermediate_size: Width inside the layer.
        hidden_act: ``"silu"`` for SwiGLU, ``"gelu"`` for a plain two-layer network.
        initializer_range: Standard deviation of the initial weights.
        generator: Source of randomness for the initial weights; torch's default generator where it is absent.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: HiddenAct = "silu",
        initializer_range: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        # A dense layer is a mixture of one expert: the same validation, the same sizes.
        self.config = MoEConfig(hidden_size, intermediate_size, 1, 1, hidden_act, initializer_range=initializer_range)
        up_size = intermediate_size * (2 if self.config.gated else 1)
        self.up_proj = nn.Parameter(torch.empty(up_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(hidden_size, intermediate_size))
        for weight in self.parameters():
            nn.init.normal_(weight, std=initializer_range, generator=generator)

    @classmethod
    def of_active_size(cls, config: MoEConfig, generator: torch.Generator | None = None) -> DenseMLP:
        """The dense layer that costs what the mixture's k experts cost for one token."""
        width = config.intermediate_size * config.num_experts_per_tok
        return cls(config.hidden_size, width, config.hidden_act, config.initializer_range, generator)

    @classmethod
    def of_total_size(cls, config: MoEConfig, generator: torch.Generator | None = None) -> DenseMLP:
        """The dense layer that holds as many weights as all E experts of the mixture."""
        width = config.intermediate_size * config.num_experts
        return cls(config.hidden_size, width, config.hidden_act, config.initializer_range, generator)

    def forward(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Passes every token through the whole layer."""
        return feed_forward(hidden_states, self.up_proj, self.down_proj, self.config.hidden_act)
