"""Adapters on disk: a few kilobytes that are worth nothing without the base that they were trained on, and know it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medarch.adaptation.lora import (
    LoRAConfig,
    adapters,
    add_lora,
    base_weights,
    lora_parameters,
    take_off_lora_,
)

_FORMAT = "medarch LoRA 1"


def base_digest(model: nn.Module) -> dict[str, str]:
    """A short SHA-256 of each parameter of the base: its type, its shape and its bytes."""
    return {name: _digest(weight) for name, weight in base_weights(model).items()}


def _digest(weight: Tensor) -> str:
    plain = weight.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def save_adapters(model: nn.Module, path: Path | str) -> Path:
    """Writes the corrections of a model, with their configuration and the digest of the base.

    Args:
        model: With LoRA.
        path: A file, ``.safetensors`` by custom; it appears whole or not at all.

    Raises:
        ValueError: If the model has no LoRA.
        OSError: If the file cannot be written; one that was there before is kept.
    """
    from safetensors.torch import save

    found = adapters(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA to save")
    config = next(iter(found.values())).config
    header = {"format": _FORMAT, "config": config.to_dict(), "base": base_digest(model)}
    tensors = {name: part.detach().cpu().contiguous() for name, part in lora_parameters(model).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(tensors, metadata={"lora": json.dumps(header)}))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def load_adapters(model: nn.Module, path: Path | str) -> LoRAConfig:
    """Puts saved corrections on the model that they were trained for.

    Args:
        model: The base, or the base with corrections of the same configuration, which are overwritten.
        path: What ``save_adapters`` wrote.

    Returns:
        The configuration that they were trained with.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another kind, the base is another one (the first parameter that
            differs is named), or the model's corrections have another rank, scale or place. Nothing is changed then.
    """
    path = Path(path)
    header, tensors = _read(path)
    try:
        config = LoRAConfig(**header["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its configuration: {error}; save them anew") from error
    _refuse_other_base(path, header["base"], base_digest(model))
    present = adapters(model)
    if present:
        own = next(iter(present.values())).config
        for field in ("rank", "alpha", "targets"):
            if getattr(own, field) != getattr(config, field):
                raise ValueError(
                    f"{path} has {field}={getattr(config, field)!r}, the model's LoRA has {getattr(own, field)!r}: "
                    "load it into the base without LoRA"
                )
    else:
        add_lora(model, config, torch.Generator())
    wanted = lora_parameters(model)
    if misfit := _misfit(tensors, wanted):
        if not present:
            take_off_lora_(model)
        raise ValueError(f"{path} is damaged: {misfit}")
    with torch.no_grad():
        for name, part in wanted.items():
            part.copy_(tensors[name])
    return config


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no adapters were saved there")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lora", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): save the adapters anew, or restore a copy") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no LoRA of this package: name a file that save_adapters wrote")
    for field in ("config", "base"):
        if not isinstance(header.get(field), dict):
            raise ValueError(f"{path} is damaged: its header has no {field!r}; save the adapters anew")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path} is damaged: {name} holds what is no finite number; save them anew")
    return header, tensors


def _refuse_other_base(path: Path, trained_on: dict[str, str], here: dict[str, str]) -> None:
    differing = [name for name in {**trained_on, **here} if trained_on.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        how = "is missing here" if name not in here else "was not there" if name not in trained_on else "differs"
        raise ValueError(
            f"{path} was trained on another base: {name} {how} ({len(differing)} of {len(trained_on)} parameters in "
            "all); load the checkpoint, and the type of numbers, that it was trained on"
        )


def _misfit(tensors: dict[str, Tensor], wanted: dict[str, nn.Parameter]) -> str | None:
    for name in sorted({*tensors, *wanted}):
        if name not in tensors:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} belongs to nothing"
        if tensors[name].shape != wanted[name].shape:
            return f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
    return None
