"""One loader for names, folders and the hub; what cannot be used is refused by file, tensor and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medarch.lm.bridge import load_decoder, save_pretrained
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.loading import committed_checkpoints, find_checkpoint, load
from medarch.lm.tokenizer import Tokenizer
from medarch.moe.config import MoEConfig

CONFIG = DecoderConfig(263, 20, 12, 2, 5, feed_forwards=("moe",), moe=MoEConfig(20, 12, 3, 2))
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["fever and chills"], 263)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Tokenizer) -> Path:
    """A book with one checkpoint, called "small"; its root folder."""
    generator = torch.Generator().manual_seed(3)
    save_pretrained(Decoder(CONFIG, generator), words, tmp_path / "book" / "checkpoints" / "small")
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def folder(book: Path) -> Path:
    return book / "book" / "checkpoints" / "small"


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, **weights: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    changed = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in weights.items()}}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def test_name_and_folder_give_the_same_model(folder: Path) -> None:
    assert committed_checkpoints() == ["small"]
    by_name, words = load("small")
    by_folder, _ = load(folder)
    assert isinstance(by_name, Decoder)
    assert words.decode(words.encode("fever")) == "fever"
    for weight, other in zip(by_name.parameters(), by_folder.parameters(), strict=True):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, other)
    assert next(load(folder, dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16


def test_the_other_library_needs_nothing_but_its_name(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, words = load("small")
    theirs, their_words = load("small", library="transformers")
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert next(theirs.parameters()).dtype == torch.float32
    assert not theirs.training
    ids = words.encode("fever, chills and rigor")
    assert their_words("fever, chills and rigor")["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits)
    assert "Loading weights" not in capfd.readouterr().err


def test_unknown_name_says_what_there_is(book: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint 'smal'.*load\('small'\)"):
        load("smal")
    with pytest.raises(ValueError, match="no checkpoint"):
        load(book / "nowhere")
    with pytest.raises(ValueError, match="library must be"):
        load("small", library="jax")  # type: ignore[call-overload]


@pytest.mark.parametrize("library", ["medarch", "transformers"])
def test_no_hub_is_one_line_that_names_the_local_checkpoint(
    book: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], library: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="no hub at") as refused:
        load("no-such-owner/no-such-model", library=library)
    message = str(refused.value)
    assert "\n" not in message
    assert "no-such-owner/no-such-model" in message
    assert "load('small')" in message
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="offline mode"):
        load("no-such-owner/no-such-model", library=library)


def test_repository_in_the_cache_needs_no_hub(
    book: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert find_checkpoint("owner/name") == repository / "snapshots" / revision
    assert load("owner/name")[0].config == CONFIG


@pytest.mark.parametrize("library", ["medarch", "transformers"])
@pytest.mark.parametrize("keep", [0, 7, 300, -11])
def test_truncated_weights(folder: Path, library: Any, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated.*copy it anew"):
        load("small", library=library)


@pytest.mark.parametrize("library", ["medarch", "transformers"])
def test_missing_tensor(folder: Path, library: Any) -> None:
    edit_weights(folder, **{GATE.replace(".", "__"): None})
    # transformers holds the tensor under a name of its own, of which the message tells the part in common.
    with pytest.raises(ValueError, match=r"small.*model\.layers\.1\.\w+\.gate\.weight.*different models"):
        load("small", library=library)


def test_misshapen_tensor(folder: Path) -> None:
    edit_weights(folder, **{GATE.replace(".", "__"): torch.zeros(4, 20)})
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .*gate.*\(4, 20\).*\(3, 20\)"):
        load("small")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (
            "model.embed_tokens.weight",
            r"embed_tokens\.weight has shape \(1, 7\), but config.json calls for \(263, 20\)",
        ),
        (
            "model.layers.1.block_sparse_moe.experts.2.w1.weight",
            r"the tensor model\.layers\.1\.mlp\.experts\.gate_up_proj",
        ),
    ],
)
def test_misshapen_tensor_of_the_other_library_is_one_line(
    folder: Path, name: str, named: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_weights(folder, **{name.replace(".", "__"): torch.zeros(1, 7)})
    with pytest.raises(ValueError, match=named) as found:
        load("small", library="transformers")
    assert "\n" not in str(found.value)
    assert "LOAD REPORT" not in caplog.text + "".join(capfd.readouterr())


def test_missing_part_of_a_stack_of_experts(folder: Path) -> None:
    edit_weights(folder, model__layers__0__block_sparse_moe__experts__1__w3__weight=None)
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.0\..*experts\.1\.w3\.weight"):
        load("small")
    with pytest.raises(ValueError, match=r"cannot make the tensor model\.layers\.0\..*gate_up_proj.*missing"):
        load("small", library="transformers")


def test_unexpected_tensor(folder: Path) -> None:
    edit_weights(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(20))
    with pytest.raises(ValueError, match=r"model\.safetensors holds the tensor .*q_proj\.bias"):
        load("small")


def test_tensor_of_whole_numbers(folder: Path) -> None:
    edit_weights(folder, **{GATE.replace(".", "__"): torch.zeros(3, 20, dtype=torch.int8)})
    with pytest.raises(ValueError, match=rf"tensor {GATE} is stored as I8"):
        load("small")


def test_old_rotary_tables_and_a_written_tied_head_are_left(folder: Path) -> None:
    before = load_decoder(folder).state_dict()
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2), lm_head__weight=embedding)
    assert all(torch.equal(weight, before[name]) for name, weight in load_decoder(folder).state_dict().items())
    edit_weights(folder, lm_head__weight=embedding + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        load_decoder(folder)


def test_missing_shard(folder: Path, words: Tokenizer) -> None:
    save_pretrained(load_decoder(folder), words, folder, max_file_bytes=16_000)
    assert load("small")[0].config == CONFIG
    first = min(folder.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing, which model.safetensors.index.json names"):
        load("small")


@pytest.mark.parametrize("library", ["medarch", "transformers"])
@pytest.mark.parametrize("listed", [None, [1], {}, {"a": 3}, {"a": None}, {"a": "../model.safetensors"}])
def test_an_index_that_names_no_files_beside_it(folder: Path, library: Any, listed: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map"):
        load("small", library=library)


@pytest.mark.parametrize(
    ("fields", "ours", "theirs"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a number", "'rms_norm_eps'"),
        ({"router_aux_loss_coef": "few"}, "router_aux_loss_coef='few' must be a number", "'router_aux_loss_coef'"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object", "'rope_parameters'"),
        ({"rope_parameters": {"rope_theta": "far"}}, "rope_theta='far' must be a number", r"check config\.json"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false", "'tie_word_embeddings'"),
        ({"model_type": ["mixtral"]}, r"model_type=\['mixtral'\] is not one of", r"no model of type \['mixtral'\]"),
    ],
)
def test_a_field_of_another_kind_is_named(folder: Path, fields: dict[str, Any], ours: str, theirs: str) -> None:
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=rf"config\.json: {ours}"):
        load("small")
    with pytest.raises(ValueError, match=theirs):
        load("small", library="transformers")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_in_the_other_library(folder: Path, name: str) -> None:
    (folder / name).write_text("[]")
    with pytest.raises(ValueError, match=r"small: transformers cannot open its tokenizer"):
        load("small", library="transformers")


@pytest.mark.parametrize("library", ["medarch", "transformers"])
def test_a_device_and_a_type_that_there_are_not(folder: Path, library: Any) -> None:
    with pytest.raises(ValueError, match=r"device='abacus' cannot be used here.*device='cpu'"):
        load("small", "abacus", library=library)
    with pytest.raises(ValueError, match=r"dtype=torch\.int32 must be a floating-point type"):
        load("small", dtype=torch.int32, library=library)


@pytest.mark.parametrize("library", ["medarch", "transformers"])
def test_unknown_family(folder: Path, library: Any) -> None:
    edit_config(folder, model_type="oracle")
    with pytest.raises(ValueError, match=r"config\.json.*'oracle'"):
        load("small", library=library)


@pytest.mark.parametrize("library", ["medarch", "transformers"])
def test_pickles_are_not_opened(folder: Path, library: Any) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load("small", library=library)  # beside safetensors it is left alone
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle"):
        load("small", library=library)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights to load"):
        load("small", library=library)


@pytest.mark.parametrize("library", ["medarch", "transformers"])
def test_code_of_a_checkpoint_is_never_run(folder: Path, library: Any) -> None:
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, auto_map=code)
    if library == "medarch":
        with pytest.raises(ValueError, match=r"config\.json: auto_map="):
            load("small", library=library)
    else:  # it has a Mixtral of its own, so that the checkpoint's code is not needed and not read
        assert type(load("small", library=library)[0]).__name__ == "MixtralForCausalLM"
    edit_config(folder, model_type="evil")
    with pytest.raises(ValueError, match="model_type='evil'" if library == "medarch" else "auto_map=.*'evil'"):
        load("small", library=library)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_config_missing_or_damaged(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load(folder)


def test_a_folder_in_the_place_of_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load(folder)


def test_another_checkpoints_tokenizer(folder: Path, tmp_path: Path) -> None:
    import tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=262, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(["chronic fever", "chronic pain"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    edit_config(folder, eos_token_id=None)
    _, words = load("small")
    assert words.end_of_text == 2
    assert 2 not in words.encode("</s>")
    assert words.decode(words.encode("chronic fever </s>")) == "chronic fever </s>"
    words.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == 2
    edit_config(folder, eos_token_id=[1, 2])
    assert load("small")[1].end_of_text == 1
    edit_config(folder, eos_token_id=None)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="neither eos_token_id"):
        load("small")


def test_tokenizer_of_another_model(folder: Path) -> None:
    Tokenizer.train(["a", "longer text that repeats and repeats and repeats"], 280).save(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 2\d\d tokens, but vocab_size=263"):
        load("small")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load("small")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        load("small")


@pytest.mark.parametrize(("fields", "dtype"), [({"dtype": "float16"}, torch.float16), ({}, torch.float32)])
def test_elsewhere_than_on_a_cpu_the_stored_type_is_kept(fields: dict[str, str], dtype: torch.dtype) -> None:
    from medarch.lm.loading import _stored_dtype

    assert _stored_dtype(fields) == dtype
    assert _stored_dtype({"torch_dtype": "bfloat16"}) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='nonsense'"):
        _stored_dtype({"dtype": "nonsense"})
