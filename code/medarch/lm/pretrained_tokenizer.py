"""The tokenizer of somebody else's checkpoint, used as ours is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medarch.lm.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    import tokenizers

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


class PretrainedTokenizer(Tokenizer):
    """Another's ``tokenizer.json``, with the end of text that its checkpoint names.

    As with ours, ``encode`` adds no special token and reads the letters of one as plain text. Whether every text
    comes back unchanged from ``decode`` is up to that tokenizer.

    Args:
        backend: What ``tokenizers`` reads from the file.
        end_of_text: Number of the token that ends a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_of_text: int) -> None:
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.end_of_text = end_of_text

    def save(self, folder: Path | str) -> None:
        """Writes the tokenizer with the name of its own end of text."""
        super().save(folder)
        path = Path(folder) / _CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        config["eos_token"] = self._backend.id_to_token(self.end_of_text)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint, whoever made it.

    Args:
        folder: The checkpoint.
        config: Content of its ``config.json``.

    Raises:
        ValueError: If there is no ``tokenizer.json``, it cannot be read, it names no end of text, or it has
            tokens that the model lacks.
    """
    import tokenizers

    path = folder / _FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a checkpoint with another kind of tokenizer opens with library='transformers', and "
            "medarch.lm.bridge.load_decoder reads the model alone"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{path} is not a tokenizer ({error}): copy it anew") from error
    size, known = backend.get_vocab_size(), config.get("vocab_size")
    if isinstance(known, int) and size > known:
        raise ValueError(
            f"{path} has {size} tokens, but vocab_size={known} in config.json: tokenizer and weights are of different "
            "models"
        )
    if backend.token_to_id(END_OF_TEXT) == Tokenizer.end_of_text:
        return Tokenizer(backend)
    return PretrainedTokenizer(backend, _end_of_text(folder, config, backend))


def _end_of_text(folder: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> int:
    """From ``config.json``, which may list several, or else by name from ``tokenizer_config.json``."""
    number = config.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if not isinstance(number, int) and (folder / _CONFIG).is_file():
        token = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = backend.token_to_id(token) if isinstance(token, str) else None
    if not isinstance(number, int):
        raise ValueError(
            f"{folder}: neither eos_token_id in config.json nor eos_token in {_CONFIG} says what ends a text"
        )
    return number
