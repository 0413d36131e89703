"""``pytest --nbval book`` collects the chapters themselves; see medarch.site.recorded.

In the tests every call into the modules named here has the shapes and types of its annotations checked.
"""

from __future__ import annotations

from typing import Any

import jaxtyping

# Before any test module imports the package: what is imported already stays unchecked.
MODULES = (
    *("config", "dense", "experts", "layer", "mixtral", "reference", "router"),
    *("balance", "capacity", "expert_choice", "fixed", "loss_free", "noisy", "probes", "shared", "soft", "switch"),
)
jaxtyping.install_import_hook([f"medarch.moe.{name}" for name in MODULES], "beartype.beartype")
# The state space models likewise.
SSM = ("discretise", "hippo", "linear", "mamba2", "mamba2_weights", "s4d", "ssd", "ssd_chunks", "vandermonde")
jaxtyping.install_import_hook([f"medarch.ssm.{name}" for name in SSM], "beartype.beartype")


def pytest_configure(config: Any) -> None:
    """Load the plugin only where it is asked for: what it imports would slow every other run."""
    if config.getoption("nbval", False) or config.getoption("nbval_lax", False):
        config.pluginmanager.import_plugin("medarch.site.recorded")
