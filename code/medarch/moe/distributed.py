"""Expert parallelism: each process holds some of the experts, and the tokens travel to them and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.moe.config import MoEConfig
from medarch.moe.dense import feed_forward
from medarch.moe.experts import Experts
from medarch.moe.layer import MoELayer, check_inputs
from medarch.moe.router import NO_EXPERT, Routing, TopKRouter


@dataclass(frozen=True)
class Itinerary:
    """Which slot goes where: worked out once from the routing, used on the way there and on the way back.

    A slot is one of a token's k places; it carries the token to one expert.

    Attributes:
        order: Own slots sorted by expert, so that those for one process lie together; idle slots are left out.
        sent: For each process the number of own slots that go to it.
        received: For each process the number of slots that come from it.
        arrivals: For each arriving slot the expert it wants, numbered within this process.
    """

    order: Int[Tensor, "slots"]
    sent: list[int]
    received: list[int]
    arrivals: Int[Tensor, "arriving"]


class _AllToAll(torch.autograd.Function):
    """Rows to other processes; on the way back their gradients, along the same paths the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arriving, rows.contiguous(), received, sent, group=group)
        return arriving

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        returning = gradient.new_empty(sum(ctx.sent), *gradient.shape[1:])
        dist.all_to_all_single(returning, gradient.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return returning, None, None, None


class ExpertParallelMoE(nn.Module):
    """A mixture of experts spread over the processes of a group (Lepikhin et al. 2020, arXiv:2006.16668, section 3).

    Process r of W holds experts ``r * E/W`` to ``(r + 1) * E/W - 1`` and a copy of the router. Each process calls the
    layer with tokens of its own, as many as it likes, and gets the answers to these. All have to call it, and to call
    backward, equally often, since they wait for one another.

    Gradients: an expert's are complete when backward ends, summed over the tokens of all processes, because the
    answers' gradients travel back the way the tokens came. The router's are those of the own tokens; ``sum_gradients``
    adds them up.

    Args:
        config: The layer's sizes and choices, for all processes together.
        generator: Source of randomness for the initial weights; all processes must draw the same.
        group: The processes; all by default.

    Raises:
        ValueError: If torch.distributed is not initialised, or the experts do not divide among the processes.
    """

    def __init__(
        self, config: MoEConfig, generator: torch.Generator | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not initialised: start with torchrun and call init_process_group")
        self.config, self.group = config, group or dist.group.WORLD
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if config.num_experts % self.world_size:
            raise ValueError(
                f"num_experts={config.num_experts} do not divide among {self.world_size} processes, "
                "each of which holds equally many"
            )
        self.local_experts = config.num_experts // self.world_size
        self.router = TopKRouter(config, generator)
        whole = Experts(config, generator)
        mine = slice(self.rank * self.local_experts, (self.rank + 1) * self.local_experts)
        # All draw the weights of all experts and keep their own, so that W processes hold what one would.
        self.up_proj = nn.Parameter(torch.stack([up for up, _ in whole.weights()[mine]]).detach())
        self.down_proj = nn.Parameter(whole.down_proj[mine].detach().clone())

    @classmethod
    def of_layer(cls, layer: MoELayer, group: dist.ProcessGroup | None = None) -> ExpertParallelMoE:
        """This process's share of a layer that every process holds whole."""
        parallel = cls(layer.config, group=group).to(layer.experts.down_proj)
        mine = slice(parallel.rank * parallel.local_experts, (parallel.rank + 1) * parallel.local_experts)
        with torch.no_grad():
            parallel.router.load_state_dict(layer.router.state_dict())
            for expert, (up, down) in enumerate(layer.experts.weights()[mine]):
                parallel.up_proj[expert].copy_(up)
                parallel.down_proj[expert].copy_(down)
        return parallel

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch hidden"], Routing]:
        """Routes the own tokens, sends them to their experts, and sums what comes back.

        Args:
            hidden_states: The own tokens.
            mask: True for a real token, False for padding, which does not travel.

        Returns:
            The output, and the routing of the own tokens.

        Raises:
            ValueError: If a shape or a type does not fit, or a real token holds NaN or infinity.
        """
        check_inputs(hidden_states, mask, self.config.hidden_size, self.down_proj.dtype)
        routing = self.router(hidden_states, mask)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        itinerary = self.plan(routing.indices)
        outward = self.dispatch(tokens, itinerary)
        arrived = self.travel(outward, itinerary.sent, itinerary.received)
        answers = self.compute(arrived, itinerary)
        returned = self.travel(answers, itinerary.received, itinerary.sent)
        output = self.combine(returned, routing.weights, itinerary)
        return output.to(tokens.dtype).view(hidden_states.shape), routing

    def plan(self, indices: Int[Tensor, "*batch k"]) -> Itinerary:
        """Sorts the own slots by expert, and learns from the other processes how many slots will arrive from each."""
        slots = indices.reshape(-1)
        experts, world = self.config.num_experts, self.world_size
        idle, *_ = counts = torch.bincount(slots - NO_EXPERT, minlength=experts + 1)
        outgoing = counts[1:].contiguous()
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        by_process = incoming.view(world, self.local_experts)
        numbers = torch.arange(self.local_experts, device=slots.device).repeat(world)
        return Itinerary(
            order=slots.argsort(stable=True)[int(idle) :],
            sent=outgoing.view(world, -1).sum(1).tolist(),
            received=by_process.sum(1).tolist(),
            arrivals=numbers.repeat_interleave(incoming),
        )

    def dispatch(self, tokens: Float[Tensor, "tokens hidden"], itinerary: Itinerary) -> Float[Tensor, "slots hidden"]:
        """A copy of a token for each of its slots, in the order of the experts."""
        return tokens.index_select(0, itinerary.order // self.config.num_experts_per_tok)

    def travel(
        self, rows: Float[Tensor, "out hidden"], sent: list[int], received: list[int]
    ) -> Float[Tensor, "back hidden"]:
        """The all-to-all: each process gives every other its rows, and gets those meant for itself."""
        return cast(Tensor, _AllToAll.apply(rows, sent, received, self.group))

    def compute(self, arrived: Float[Tensor, "rows hidden"], itinerary: Itinerary) -> Float[Tensor, "rows hidden"]:
        """Each own expert answers the rows that came for it, in the order of their arrival."""
        order = itinerary.arrivals.argsort(stable=True)
        counts = torch.bincount(itinerary.arrivals, minlength=self.local_experts).tolist()
        batches = arrived.index_select(0, order).split(counts)
        weights = list(zip(self.up_proj.unbind(), self.down_proj.unbind(), strict=True))
        # An expert without rows is called too: each parameter then has a gradient, zero if need be, on every process.
        answers = [
            feed_forward(batch, *pair, self.config.hidden_act) for batch, pair in zip(batches, weights, strict=True)
        ]
        return torch.empty_like(arrived).index_copy(0, order, torch.cat(answers))

    def combine(
        self, returned: Float[Tensor, "slots hidden"], weights: Float[Tensor, "*batch k"], itinerary: Itinerary
    ) -> Float[Tensor, "tokens hidden"]:
        """The answers back in their slots, weighted and summed for each token."""
        flat = weights.reshape(-1, 1)
        weighted = returned * flat.index_select(0, itinerary.order)
        by_slot = weighted.new_zeros(len(flat), returned.shape[1]).index_copy(0, itinerary.order, weighted)
        return by_slot.view(-1, weights.shape[-1], returned.shape[1]).sum(dim=1)

    def sum_gradients(self) -> None:
        """Adds up the router's gradients over all processes, so that its copies stay equal after an update."""
        for parameter in self.router.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.group)
