"""The experts: E feed-forward networks in stacked weights, each fed with its own tokens in one batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medarch.moe.config import MoEConfig
from medarch.moe.dense import feed_forward
from medarch.moe.router import NO_EXPERT


class Experts(nn.Module):
    """All experts of a layer.

    The weights of all experts are stacked, in the names and shapes of transformers' ``MixtralExperts``:
    ``gate_up_proj`` of ``[E, 2 * intermediate, hidden]`` (``up_proj`` of ``[E, intermediate, hidden]`` for
    GELU) and ``down_proj`` of ``[E, hidden, intermediate]``.

    Args:
        config: Sizes and activation.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: MoEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        experts, hidden, intermediate = config.num_experts, config.hidden_size, config.intermediate_size
        if config.gated:
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        else:
            self.up_proj = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range, generator=generator)

    def weights(self) -> list[tuple[Float[Tensor, "up hidden"], Float[Tensor, "hidden intermediate"]]]:
        """Each expert's two matrices, as views.

        They are unbound in one step because the backward of ``stack[e]`` writes a gradient as large as the
        whole stack, zeros for all experts but one, for each time an expert is used.
        """
        up_proj = self.gate_up_proj if self.config.gated else self.up_proj
        return list(zip(up_proj.unbind(), self.down_proj.unbind(), strict=True))

    def forward(
        self,
        hidden_states: Float[Tensor, "*batch hidden"],
        indices: Int[Tensor, "*batch k"],
        weights: Float[Tensor, "*batch k"],
    ) -> Float[Tensor, "*batch hidden"]:
        """Sends each token to its experts and sums what they answer.

        A token has k slots, each naming one expert. The slots are sorted by expert, so that
        the tokens of an expert lie together and one matrix product serves them all; then the
        answers go back to their slots and each token's k slots are summed. The sum is
        deterministic, on a GPU too, where adding by index is not.

        Args:
            hidden_states: Token vectors.
            indices: Experts of each token, ``NO_EXPERT`` for a slot that does no work.
            weights: Weight of each slot.

        Returns:
            For each token the weighted sum, in the type of ``hidden_states``.

        Raises:
            ValueError: If an index names an expert that does not exist.
        """
        num_experts, hidden_act = self.config.num_experts, self.config.hidden_act
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        k = indices.shape[-1]
        slots = indices.reshape(-1)
        # Shifted by one, since counting starts at 0 and an idle slot holds NO_EXPERT = -1;
        # idle slots sort to the front.
        idle, *counts = torch.bincount(slots - NO_EXPERT, minlength=num_experts + 1).tolist()
        if len(counts) != num_experts:
            raise ValueError(
                f"indices name expert {len(counts) - 1}, but num_experts={num_experts} and they are numbered from 0"
            )
        order = slots.argsort(stable=True)[idle:]
        batches = tokens.index_select(0, order // k).split(counts)
        experts = self.weights()
        # An expert without tokens is not called. One always is, so that an empty batch too
        # has a gradient.
        called = [expert for expert, count in enumerate(counts) if count] or [0]
        answers = [feed_forward(batches[e], *experts[e], hidden_act) for e in called]
        weighted = torch.cat(answers) * weights.reshape(-1, 1).index_select(0, order)
        by_slot = weighted.new_zeros(slots.numel(), tokens.shape[-1])
        by_slot = by_slot.index_copy(0, order, weighted)
        summed = by_slot.view(-1, k, tokens.shape[-1]).sum(dim=1)
        return summed.to(tokens.dtype).view(hidden_states.shape)
