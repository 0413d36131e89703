"""``pytest --nbval book`` collects the chapters themselves; see medarch.site.recorded."""

from __future__ import annotations

from typing import Any


def pytest_configure(config: Any) -> None:
    """Load the plugin only where it is asked for: what it imports would slow every other run."""
    if config.getoption("nbval", False) or config.getoption("nbval_lax", False):
        config.pluginmanager.import_plugin("medarch.site.recorded")
