"""The state of a training run on disk: whole or not there, and without pickle.

One file holds everything: the tensors in the safetensors format, and beside them, in that format's own header, the
numbers and names as JSON. A single file can be exchanged for the next in one step, so that a kill or a full disk at
any moment leaves the checkpoint before it as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

FILE = "state.safetensors"
_FORMAT = "medarch training state 1"


@dataclass
class TrainingState:
    """Everything that a run needs to go on as if nothing had happened.

    Attributes:
        step: Optimiser steps taken.
        weights: The model's ``state_dict``.
        optimizer: For each parameter's name AdamW's tensors (``step``, ``exp_avg``, ``exp_avg_sq``).
        generators: States of the generators that the model's modules own, by ``module.attribute``.
        identity: What the run is: configurations and hash of the data. A resumed run must have the same.
        log: What was measured so far, as JSON holds it.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    generators: dict[str, Tensor]
    identity: dict[str, Any]
    log: dict[str, Any]


def data_hash(tokens: Int[Tensor, "tokens"]) -> str:
    """SHA-256 of a stream of tokens, which stands for the texts and for the tokenizer that cut them."""
    whole = tokens.detach().to("cpu", torch.int64).contiguous()
    return hashlib.sha256(whole.numpy().tobytes()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file in its place whole, or leaves what was there.

    Raises:
        OSError: It cannot be written (a full disk, no permission); the message is one line and says what was kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        kept = "the one before it is as it was" if path.exists() else "there was none before it"
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}); {kept}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The renaming itself has to reach the disk; systems that cannot open a folder do without.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_state(folder: Path, state: TrainingState) -> Path:
    """Writes ``state.safetensors``, and the log beside it as ``training-log.json`` for people.

    Raises:
        OSError: The file cannot be written; the checkpoint before it is kept.
    """
    from safetensors.torch import save

    # Tied weights appear under one name in a state_dict; clones keep views of one storage apart.
    tensors = {f"weights/{name}": tensor for name, tensor in state.weights.items()}
    for name, moments in state.optimizer.items():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in moments.items()}
    tensors |= {f"generators/{name}": tensor for name, tensor in state.generators.items()}
    header = {"format": _FORMAT, "step": state.step, "identity": state.identity, "log": state.log}
    packed = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    path = folder / FILE
    write_atomically(path, save(packed, metadata={"state": json.dumps(header)}))
    write_atomically(folder / "training-log.json", json.dumps(state.log, indent=1).encode())
    return path


def load_state(folder: Path, device: torch.device | str = "cpu") -> TrainingState | None:
    """Reads the last checkpoint of a run's folder; None where there is none yet.

    Raises:
        ValueError: The file is damaged or not a training state.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to begin anew, or restore a copy") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training state of this package: name the folder of a run")
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    generators: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "weights":
            weights[rest] = tensor
        elif kind == "optimizer":
            parameter, _, key = rest.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = tensor
        else:
            generators[rest] = tensor.cpu()
    return TrainingState(header["step"], weights, optimizer, generators, header["identity"], header["log"])


def refuse_other_run(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares what a checkpoint was made with to what the run that would resume it is made of.

    Raises:
        ValueError: They differ; the message names each field with both values.
    """
    before, now = _flatten(found), _flatten(wanted)
    differences = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds a run that cannot be resumed with these settings: {'; '.join(differences)}. "
            "Restore them, or train in another folder"
        )


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def module_generators(model: nn.Module) -> dict[str, torch.Generator]:
    """The generators that a model's modules own, by ``module.attribute``."""
    return {
        f"{name}.{attribute}" if name else attribute: value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Generator)
    }
