"""The tokenizer: every text comes back, nothing injects the end of text, and transformers reads it alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medarch.lm.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [
    "Seizure: A seizure is an intermittent abnormality of nervous system physiology.",
    "Renal cyst: A fluid filled sac in the kidney.",
    "Kidney stones: Stones in the kidney or in the urinary tract.",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=331)


ODD = [
    "",
    " ",
    "  two  spaces \n\t and\r\nlines ",
    "naïve Sjögren’s 5 µm ≥ 38 °C",
    "🫀🧠👩🏽‍⚕️",
    "日本語 العربية",
    "\x00\x01\ufeff",
    END_OF_TEXT,
    f"a{END_OF_TEXT}b {END_OF_TEXT} ",
    "e\u0301 is not é",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert max(ids, default=0) < tokenizer.vocab_size


def test_frequent_text_is_short(tokenizer):
    """Byte for byte it would be as long as the text; what was learned must save at least half."""
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert tokenizer.pieces(tokenizer.encode("the kidney")) == ["t", "he", " kidney"]


def test_sizes(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer) == 331
    assert Tokenizer.train(["a"], vocab_size=300).vocab_size == 257
    assert tokenizer.encode_all(["kidney", "", "cyst"]) == [tokenizer.encode(text) for text in ("kidney", "", "cyst")]


def test_end_of_text_is_left_out_when_decoding_and_named_among_pieces(tokenizer):
    ids = [*tokenizer.encode("cyst"), tokenizer.end_of_text, *tokenizer.encode("stones")]
    assert tokenizer.end_of_text == 0
    assert tokenizer.decode(ids) == "cyststones"
    assert tokenizer.pieces([0]) == [END_OF_TEXT]


def test_training_is_deterministic(tokenizer, tmp_path):
    for name, trained in (("a", tokenizer), ("b", Tokenizer.train(iter(TEXTS), vocab_size=331))):
        trained.save(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    again = Tokenizer.load(tmp_path / "new" / "folder")
    assert again.vocab_size == tokenizer.vocab_size
    for text in [*TEXTS[:3], *ODD]:
        assert again.encode(text) == tokenizer.encode(text)


def test_transformers_reads_it_alike(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert len(theirs) == tokenizer.vocab_size
    for text in [*TEXTS[:3], *ODD]:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text


def test_bad_input_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=256"):
        Tokenizer.train(TEXTS, vocab_size=256)
    for empty in ([], ["", ""]):
        with pytest.raises(ValueError, match="no text"):
            Tokenizer.train(empty)
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("half a pair \ud83e")
    for wrong in (-1, 331):
        with pytest.raises(ValueError, match=f"{wrong} is not in this vocabulary of 331"):
            tokenizer.decode([1, wrong])
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not made by"):
        Tokenizer.load(tmp_path)
