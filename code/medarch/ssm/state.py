"""What a recurrent mixer remembers of a sequence: a state of constant size, however long the sequence is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class RecurrentState:
    """The memory of one Mamba or Mamba-2 mixer, zero before the first token.

    Args:
        ssm: State of the scan: (batch, channels, states) for Mamba, (batch, heads, head, states) for Mamba-2.
        conv: The last ``kernel - 1`` inputs of the convolution before it: (batch, kernel - 1, channels).

    Attributes:
        ssm, conv: As given; a mixer exchanges them for new ones as it reads.
        length: Positions read so far.
        bytes_per_position: What one more position adds to the memory: nothing.
    """

    bytes_per_position = 0

    def __init__(self, ssm: Float[Tensor, "batch *state"], conv: Float[Tensor, "batch tail channels"]) -> None:
        self.ssm = ssm
        self.conv = conv
        self.length = 0

    def update(self, ssm: Float[Tensor, "batch *state"], conv: Float[Tensor, "batch tail channels"], new: int) -> None:
        """Takes the memory after ``new`` more positions; no gradient flows through it."""
        self.ssm, self.conv = _alone(ssm.detach()), _alone(conv.detach())
        self.length += new

    def check_batch(self, batch_size: int) -> None:
        """Refuses an input of another batch.

        Raises:
            ValueError: If the state was made for another number of sequences.
        """
        if self.ssm.shape[0] != batch_size:
            raise ValueError(
                f"the state holds a batch of {self.ssm.shape[0]}, the input is a batch of {batch_size}: ask new_cache "
                "for one of that size"
            )

    @property
    def used_bytes(self) -> int:
        """Memory that the state occupies, the same at every length."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.ssm, self.conv))

    @classmethod
    def zeros(
        cls,
        ssm: tuple[int, ...],
        conv: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RecurrentState:
        """An empty memory of these shapes; the state of the scan is kept in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        return cls(torch.zeros(ssm, dtype=wide, device=device), torch.zeros(conv, dtype=dtype, device=device))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without what it is a part of: a view of the last positions would keep all positions in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
