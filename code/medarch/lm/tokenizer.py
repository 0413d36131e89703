"""A byte-pair tokenizer (Sennrich et al. 2016) over bytes (Radford et al. 2019), trained by ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """Text to numbers and back.

    Every byte is in the vocabulary, so no text is unknown, and ``decode(encode(text)) == text`` for every
    text. Number 0 separates documents. It never comes out of ``encode``: a text that contains the marker's
    letters is encoded letter by letter, as any other text.

    Attributes:
        end_of_text: number of the token that separates documents, 0.
    """

    end_of_text = 0

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if backend.token_to_id(END_OF_TEXT) != self.end_of_text:
            raise ValueError(
                f"token {END_OF_TEXT!r} has number {backend.token_to_id(END_OF_TEXT)}, not {self.end_of_text}; "
                "this tokenizer was not made by Tokenizer.train"
            )
        backend.encode_special_tokens = True  # as plain text, that is
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
        """Learns which byte sequences occur often enough to have a number of their own.

        The result depends on nothing but the texts and the size.

        Args:
            texts: training texts alone, or the test would be seen beforehand.
            vocab_size: numbers at most, at least 257 (256 bytes and the end of text); few texts may give
                fewer.

        Raises:
            ValueError: ``vocab_size`` is too small, or there is no text.
        """
        import tokenizers

        if vocab_size < _BYTES + 1:
            raise ValueError(
                f"vocab_size={vocab_size}: at least {_BYTES + 1} are needed, all bytes and the end of text"
            )
        texts = list(texts)
        if not any(texts):
            raise ValueError("no text to train a tokenizer on")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Numbers in use."""
        return int(self._backend.get_vocab_size())

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, none of them ``end_of_text``.

        Raises:
            ValueError: the text holds half of a surrogate pair, which no encoding can write.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` for many texts at once, which is faster.

        Raises:
            ValueError: as for ``encode``.
        """
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text is not valid Unicode: {error}") from None
        return [found.ids for found in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token numbers; ends of text are left out, and a character cut in half becomes U+FFFD.

        Raises:
            ValueError: a number is not in the vocabulary.
        """
        return str(self._backend.decode(self._known(ids), skip_special_tokens=True))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each token by itself; the end of text is shown by its name.

        Raises:
            ValueError: a number is not in the vocabulary.
        """
        known = self._known(ids)
        return [END_OF_TEXT if token == self.end_of_text else self._backend.decode([token]) for token in known]

    def _known(self, ids: Iterable[int]) -> list[int]:
        known = [int(token) for token in ids]
        wrong = [token for token in known if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(f"token number {wrong[0]} is not in this vocabulary of {self.vocab_size}")
        return known

    def save(self, folder: Path | str) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which transformers' AutoTokenizer opens.

        Args:
            folder: where to; made if it is missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self._backend.save(str(folder / _FILE))

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Opens what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            ValueError: the file is no tokenizer, or not one of ours.
        """
        import tokenizers

        path = Path(folder) / _FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: no tokenizer was saved in this folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        return cls(backend)
