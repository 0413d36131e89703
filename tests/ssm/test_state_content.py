"""The parts of a state add up to the state that the scan arrives at."""

from __future__ import annotations

import pytest
import torch

from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba import MambaMixer
from medarch.ssm.scan import selective_scan
from medarch.ssm.state_content import contributions, state_shares


@pytest.mark.parametrize("step", [0, 6, -1])
def test_contributions_add_up_to_the_state(step: int) -> None:
    generator = torch.Generator().manual_seed(2)
    mixer = MambaMixer(MambaConfig(7, state_size=3), generator).double()
    selection, _ = mixer.select(torch.randn(2, 11, 7, generator=generator, dtype=torch.float64))
    seen = step % 11 + 1
    u, delta, B, C = (
        each[:, :seen].transpose(1, 2) for each in (selection.u, selection.delta, selection.B, selection.C)
    )
    _, state = selective_scan(u, delta, selection.A, B, C, return_last_state=True)
    parts = contributions(selection, step)
    assert parts.shape == (2, seen, 14, 3)
    torch.testing.assert_close(parts.sum(1), state)
    shares = state_shares(selection)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 11, dtype=torch.float64))
    assert not shares.triu(1).any()
    sizes = parts.square().sum((-1, -2)).sqrt()
    torch.testing.assert_close(shares[:, step, :seen], sizes / sizes.sum(-1, keepdim=True))


def test_a_position_that_was_not_read_is_refused() -> None:
    mixer = MambaMixer(MambaConfig(5))
    selection, _ = mixer.select(torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(IndexError, match="step=4"):
        contributions(selection, 4)
