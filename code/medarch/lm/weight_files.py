"""Reading and writing the files of a checkpoint: config.json and safetensors, whole or in shards, and nothing else.

Weights come from safetensors alone. The older ``.bin`` and ``.pt`` files are pickles, which run code when they
are opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: If the file is missing, cannot be read, is no JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        raise ValueError(f"{path} is missing: a checkpoint needs it; copy the whole folder anew") from missing
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): a checkpoint needs it as a file") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of fields: copy it anew")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of which exist.

    Raises:
        ValueError: If there are none, only pickled ones, a shard that the index names is missing, or the index
            names none.
    """
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        names = list(listed.values()) if isinstance(listed, dict) else []
        # A shard lies beside its index; a path could lead anywhere.
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files beside it: copy it anew")
        files = [folder / name for name in sorted(set(names))]
        if missing := [path for path in files if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing, which {INDEX} names: copy the whole folder anew")
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickled:
        raise ValueError(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when it is opened: "
            "use a checkpoint with safetensors files, or convert it on a machine where you trust it"
        )
    raise ValueError(f"{folder} holds no {WEIGHTS} and no {INDEX}: it has no weights to load; copy it anew")


def _file_of_each_tensor(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Each stored tensor's file, shape and type, read from the headers alone."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                    stored = file.get_slice(name)
                    found[name] = (path, tuple(stored.get_shape()), stored.get_dtype())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or no safetensors file ({error}; it has {path.stat().st_size} bytes): "
                "copy it anew, or fetch it with git lfs if it is a pointer"
            ) from error
    return found


def fill_weights(folder: Path, targets: Mapping[str, Tensor], ignored: Callable[[str], bool] | None = None) -> None:
    """Copies a checkpoint's tensors into tensors that stand ready, once all names and shapes are known to fit.

    Args:
        folder: The checkpoint.
        targets: For each stored name the tensor, or the view of one, that receives it.
        ignored: Whether a stored tensor that is not among the targets may be left where it is.

    Raises:
        ValueError: Naming file and tensor, if one is missing, misshapen, unexpected or not floating-point,
            or a file is damaged.
    """
    from safetensors import safe_open

    found = _file_of_each_tensor(folder)
    if missing := sorted(set(targets) - set(found)):
        raise ValueError(
            f"{folder} lacks the tensor {missing[0]}{_and_others(missing)}, which its {CONFIG} calls for: "
            "config and weights are of different models, or a shard was not copied"
        )
    for name, (path, shape, dtype) in found.items():
        if name not in targets:
            if ignored is not None and ignored(name):
                continue
            raise ValueError(
                f"{path} holds the tensor {name}, for which the model of {CONFIG} has no place: config and weights "
                "are of different models, or this kind of model is not supported"
            )
        if shape != tuple(targets[name].shape):
            raise ValueError(
                f"{path}: tensor {name} has shape {shape}, but {CONFIG} calls for {tuple(targets[name].shape)}: "
                "config and weights are of different models"
            )
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{path}: tensor {name} is stored as {dtype}: only floating-point weights can be loaded")
    with torch.no_grad():
        for path in sorted({path for path, *_ in found.values()}):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in targets:
                        targets[name].copy_(file.get_tensor(name))


def read_tensor(folder: Path, name: str) -> Tensor | None:
    """One stored tensor, or None where the checkpoint has none of this name."""
    from safetensors import safe_open

    found = _file_of_each_tensor(folder).get(name)
    if found is None:
        return None
    with safe_open(found[0], framework="pt") as file:
        return file.get_tensor(name)


def stored_names(folder: Path) -> set[str]:
    """The names of all tensors of a checkpoint.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    return set(_file_of_each_tensor(folder))


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], max_file_bytes: int
) -> None:
    """Writes ``config.json`` and the weights, in shards with an index where one file would be too large.

    Each file is written beside its place and then moved into it, so that a full disk leaves what was there.

    Args:
        folder: Where; it is created.
        config: Content of ``config.json``.
        weights: Tensors by their stored names.
        max_file_bytes: Largest file; a single tensor that is larger gets a file of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # A file's header lists its tensors, at most about 200 bytes for each.
    room = max(max_file_bytes - 200 * len(own), 1)
    split = split_torch_state_dict_into_shards(own, max_shard_size=room)
    written = {}
    try:
        for name, tensors in split.filename_to_tensors.items():
            written[name] = folder / f".{name}.part"
            content = save({tensor: own[tensor] for tensor in tensors}, metadata={"format": "pt"})
            written[name].write_bytes(content)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            written[INDEX] = folder / f".{INDEX}.part"
            written[INDEX].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written[CONFIG] = folder / f".{CONFIG}.part"
        written[CONFIG].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, part in written.items():
            os.replace(part, folder / name)
    finally:
        for part in written.values():
            with suppress(FileNotFoundError):
                part.unlink()
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX):
        if stale.name not in written:
            stale.unlink(missing_ok=True)
