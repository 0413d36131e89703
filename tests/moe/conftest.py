"""Here every call into the layer has the shapes and types of its annotations checked at run time."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

# Before any test module imports the package: what is imported already stays unchecked.
MODULES = (
    *("config", "dense", "experts", "layer", "mixtral", "reference", "router"),
    *("balance", "capacity", "expert_choice", "fixed", "loss_free", "noisy", "probes", "shared", "soft", "switch"),
)
jaxtyping.install_import_hook([f"medarch.moe.{name}" for name in MODULES], "beartype.beartype")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def annotations_off() -> Iterator[None]:
    """Without run-time checks of annotations, as readers run the package: its own errors are on trial."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
