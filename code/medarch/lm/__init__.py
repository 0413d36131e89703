"""Small language models assembled from the topics: data in, text out, and a bridge to transformers.

Names are resolved when they are first used, so that importing one module of the package does not import all.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "DecoderOutput": "decoder",
    "load": "loading",
}

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"medarch.lm.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
