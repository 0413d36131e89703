"""The scan as a matrix: the same outputs, nothing from the future, and distances by hand."""

from __future__ import annotations

import pytest
import torch

from medarch.ssm.config import MambaConfig
from medarch.ssm.hidden_attention import elapsed_time, hidden_attention, mean_distance, retention
from medarch.ssm.mamba import MambaMixer, Selection
from medarch.ssm.scan import selective_scan


@pytest.fixture
def selection() -> Selection:
    mixer = MambaMixer(MambaConfig(11, state_size=5), torch.Generator().manual_seed(0)).double()
    hidden = torch.randn(2, 13, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return mixer.select(hidden)[0]


def test_the_matrix_is_the_scan(selection: Selection) -> None:
    u = selection.u.transpose(1, 2)
    wanted = selective_scan(
        u,
        selection.delta.transpose(1, 2),
        selection.A,
        selection.B.transpose(1, 2),
        selection.C.transpose(1, 2),
        method="loop",
    )
    matrix = hidden_attention(selection)
    assert matrix.shape == (2, 22, 13, 13)
    torch.testing.assert_close((matrix @ u[..., None])[..., 0], wanted)
    assert not matrix.triu(1).any()


def test_what_is_left_falls_from_one(selection: Selection) -> None:
    left = retention(selection)
    torch.testing.assert_close(left.diagonal(dim1=-2, dim2=-1), torch.ones(2, 22, 13, dtype=torch.float64))
    assert (left[..., 1:, :].tril() <= left[..., :-1, :].tril() + 1e-12)[..., :-1].all()
    time = elapsed_time(selection)
    torch.testing.assert_close(time[..., 1, 0], selection.delta[:, 1])


def test_distances_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    # Rows look 0, then half of one step, then 0 positions back.
    assert float(mean_distance(weights)) == pytest.approx(0.5 / 3)
