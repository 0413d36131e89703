"""One loader for every checkpoint: those of the book by name, a local folder, or a repository of the Hugging Face hub.

A lab that works on the book's small checkpoint works on a published one when nothing but the name changes. Weights
come from safetensors alone, and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import Filter, LogRecord
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from medarch.bench.provenance import repository_root
from medarch.lm.weight_files import CONFIG, read_json, stored_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medarch.lm.decoder import Decoder
    from medarch.lm.tokenizer import Tokenizer

HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]
"""What is fetched from the hub; pickled weights and code are not."""

_PROBE_SECONDS = 5.0


def checkpoints_folder() -> Path:
    """Where the book keeps its own checkpoints.

    Raises:
        FileNotFoundError: If no copy of the book is found.
    """
    return repository_root() / "book" / "checkpoints"


def committed_checkpoints() -> list[str]:
    """The names of the book's own checkpoints; none outside a copy of the book."""
    try:
        folder = checkpoints_folder()
    except FileNotFoundError:
        return []
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))


def find_checkpoint(name: str | Path) -> Path:
    """The local folder of a checkpoint, fetched from the hub where the name is one of its repositories.

    Args:
        name: A checkpoint of the book (``"moe"``), a folder, or ``"owner/repository"`` of the hub. A folder that
            exists goes before the hub.

    Raises:
        ValueError: If there is no such checkpoint, or the hub cannot be reached; one line that says what to use.
    """
    text = str(name).strip()
    names = committed_checkpoints()
    if text in names:
        return checkpoints_folder() / text
    folder = Path(text)
    if text and folder.is_dir():
        return folder
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/"):
        return _from_hub(text)
    raise ValueError(
        f"no checkpoint {text!r}: it is no folder and none of the book's own ({_listed(names)}); a repository of the "
        "hub is written owner/name"
    )


def _from_hub(repository: str) -> Path:
    """The folder of a repository, from the local cache if it is there and from the hub if not."""
    from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The cache first, and only if it holds the configuration and the weights: the same call made half-way
        # through an earlier download would give a folder without them.
        folder = Path(snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=True))
        stored_names(folder)
        return folder
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no folder and no name of a hub repository: {_line(error)}") from error
    except (LocalEntryNotFoundError, ValueError):
        pass
    instead = f"use one of the book's own checkpoints instead: {_listed(committed_checkpoints())}"
    if constants.is_offline_mode():
        raise ValueError(f"no hub (offline mode), and {repository} is no folder and not in the local cache; {instead}")
    try:
        # The library's own calls repeat for half a minute and print a line each time.
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception as error:
        raise ValueError(
            f"no hub at {constants.ENDPOINT} ({_line(error)}), and {repository} is no folder and not in the local "
            f"cache; {instead}"
        ) from error
    try:
        # Before gigabytes are fetched, a few lines say whether they can be used.
        config = Path(hf_hub_download(repository, CONFIG))
        _refuse_code(read_json(config), repository)
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"the hub does not give {repository}: {_line(error)}; {instead}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(f"load({name!r})" for name in names) or "there are none here"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_code(fields: dict[str, Any], source: str) -> None:
    """Refuses a checkpoint that could only be opened by running code that it brings along.

    Where transformers has a model of this type itself, the checkpoint's own code is left unread.
    """
    if "auto_map" not in fields:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{source}: auto_map={fields['auto_map']} asks for code from the checkpoint, which is never run, and "
            f"transformers has no model of type {model_type!r} itself: use a checkpoint of a type that it has"
        )


@overload
def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    library: Literal["medarch"] = "medarch",
) -> tuple[Decoder, Tokenizer]: ...


@overload
def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    library: Literal["transformers"],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]: ...


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    library: Literal["medarch", "transformers"] = "medarch",
) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, by name.

    Args:
        name: A checkpoint of the book (``"dense"``, ``"mamba"``), a local folder, or ``"owner/repository"`` of the
            hub.
        device: Where to put the model; the CPU where it is absent.
        dtype: Type of the weights. Where it is absent, float32 on a CPU, which computes slowly in bfloat16, and
            the type of the stored weights elsewhere.
        library: Whose model: ``"medarch"`` for our decoder, which can be a Llama, a Mixtral, a Mamba, a Mamba-2, a
            Jamba or a GraniteMoeHybrid, or ``"transformers"`` for any family that transformers has.

    Returns:
        Model and tokenizer, both of the library that was asked for.

    Raises:
        ValueError: If there is no such checkpoint, no hub, no such device, or a file, a field or a tensor that
            cannot be used; the message names it and what to do.
    """
    if library not in ("medarch", "transformers"):
        raise ValueError(f"library must be 'medarch' or 'transformers', got {library!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r} must be a floating-point type of torch, such as torch.bfloat16")
    device = _usable(device or "cpu")
    folder = find_checkpoint(name)
    fields = read_json(folder / CONFIG)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else _stored_dtype(fields)
    if library == "transformers":
        return _load_transformers(folder, fields, device, dtype)
    from medarch.lm.bridge import from_pretrained

    model, tokenizer = from_pretrained(folder, dtype)
    return model.to(device), tokenizer


def _usable(device: str | torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises where it was built without the device
        raise ValueError(f"device={str(device)!r} cannot be used here ({_line(error)}): use device='cpu'") from error
    return torch.device(device)


def _stored_dtype(fields: dict[str, Any]) -> torch.dtype:
    name = fields.get("dtype", fields.get("torch_dtype")) or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{CONFIG}: dtype={name!r} is no type of torch: give dtype= to load")
    return dtype


class _Tables(Filter):
    """Takes the tables of tensors that do not fit out of a log, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []

    def filter(self, record: LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        self.taken.append(message)
        return False

    def first(self) -> str | None:
        """The tensor in the first row of a table; None where there is no table."""
        for line in "\n".join(self.taken).splitlines():
            # Terminals get colours, which begin with an escape and end with an m.
            cells = [re.sub(r"\x1b\[[0-9;]*m", "", cell).strip() for cell in line.split("|")]
            if len(cells) >= 3 and cells[1].isupper():
                return cells[0]
        return None


def _key(key: str | tuple[str, Any, Any]) -> str:
    """A line of transformers' report: a name, or a name with the shape stored and that of the model."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} has shape {tuple(stored)}, but {CONFIG} calls for {tuple(wanted)}"


@contextmanager
def _quiet() -> Iterator[_Tables]:
    """Keeps transformers from writing its progress into a page, and its tables where one line says the same."""
    from transformers.utils import logging

    tables = _Tables()
    shown, logger = logging.is_progress_bar_enabled(), logging.get_logger("transformers.modeling_utils")
    logging.disable_progress_bar()
    logger.addFilter(tables)
    try:
        yield tables
    finally:
        logger.removeFilter(tables)
        if shown:
            logging.enable_progress_bar()


def _load_transformers(
    folder: Path, fields: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    _refuse_code(fields, str(folder / CONFIG))
    stored_names(folder)  # refuses pickles and damaged files with a message that names them
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if str(fields.get("model_type")) not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{folder / CONFIG}: transformers has no model of type {fields.get('model_type')!r}: it is of an unknown "
            "family, or of a later version of transformers"
        )
    only_local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    _stored_dtype(fields)
    with _quiet() as tables:
        try:
            # A mismatched size is not ignored below, where the report tells which.
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **only_local,
            )
        except Exception as error:  # transformers and its models raise errors of every kind
            if (tensor := tables.first()) is None:
                raise ValueError(f"{folder}: transformers cannot open it ({_line(error)}): check {CONFIG}") from error
            raise ValueError(
                f"{folder}: transformers cannot make the tensor {tensor} of what is stored: a part of it is missing or "
                "misshapen, or config and weights are of different models"
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **only_local)
        except Exception as error:
            raise ValueError(
                f"{folder}: transformers cannot open its tokenizer ({_line(error)}): copy its tokenizer files anew"
            ) from error
    model, report = opened
    # transformers itself fills what is missing with random numbers and warns.
    for complaint, names in report.items():
        if names:
            raise ValueError(
                f"{folder}: {complaint.replace('_', ' ')}: {min(map(_key, names))}, {len(names)} in all: config and "
                "weights are of different models"
            )
    return model.to(device).eval(), tokenizer
