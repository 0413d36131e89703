"""Our checkpoints open in transformers and theirs in our decoder, with equal logits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medarch.lm.bridge import (
    FAMILIES,
    from_pretrained,
    from_transformers_config,
    load_decoder,
    save_pretrained,
    to_transformers_config,
    weight_views,
)
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.tokenizer import Tokenizer
from medarch.lm.weight_files import write_checkpoint
from medarch.moe.config import MoEConfig
from medarch.moe.router import TopKRouter

TEXTS = ["Seizure: an intermittent abnormality of nervous system physiology.", "Fever, 39,5 °C <|endoftext|> ß"]

# Odd sizes: no two dimensions of one model are equal by chance, so that none can stand in for another. A mixture's
# are multiples of 4 at least, since transformers' grouped product wants rows of whole 16 bytes.
OURS = {
    "llama": DecoderConfig(307, 44, 31, 3, 11, 1, max_position_embeddings=29, rope_theta=523.0, rms_norm_eps=1e-3),
    "llama_untied": DecoderConfig(311, 36, 53, 1, 6, 3, tie_word_embeddings=False, rms_norm_eps=3e-6),
    "llama_one_head": DecoderConfig(293, 14, 23, 2, 1, rope_theta=7.0),
    "mixtral": DecoderConfig(
        307, 40, 28, 3, 10, 5, rope_theta=811.0, rms_norm_eps=2e-3, feed_forwards=("moe",),
        moe=MoEConfig(40, 28, 7, 3), router_aux_loss_coef=0.02, router_z_loss_coef=0.003,
    ),
    "mixtral_untied": DecoderConfig(
        313, 24, 20, 1, 4, 1, tie_word_embeddings=False, feed_forwards=("moe",), moe=MoEConfig(24, 20, 2, 2)
    ),
    "mixtral_one_expert": DecoderConfig(281, 12, 16, 2, 2, feed_forwards=("moe",), moe=MoEConfig(12, 16, 1, 1)),
}  # fmt: skip

READ_IN_A_FRESH_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not [name for name in sys.modules if name.startswith("medarch")]
answers = {}
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        logits = model.eval()(expected["input_ids"]).logits
    answers[folder] = {
        "model": type(model).__name__,
        "faults": [str(name) for names in report.values() for name in names],
        "difference": float((logits - expected["logits"]).abs().max()),
        "size": float(expected["logits"].abs().max()),
        "ids": tokenizer(json.loads(expected["texts"]))["input_ids"],
        "eos": [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id],
    }
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=277)


def random_decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A decoder of which no two weights are equal, norms included, and whose logits are far from zero."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3, generator=generator)
            if "norm" in name:
                weight.add_(1)
    return model.eval()


def test_saved_models_open_in_a_fresh_process_with_equal_logits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number, (name, config) in enumerate(OURS.items()):
        folder = tmp_path / name
        save_pretrained(random_decoder(config, number), tokenizer, folder)
        input_ids = torch.randint(config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():  # ours from the same bfloat16 file
            logits = load_decoder(folder)(input_ids).logits
        torch.save({"input_ids": input_ids, "logits": logits, "texts": json.dumps(TEXTS)}, folder / "expected.pt")
    folders = [str(tmp_path / name) for name in OURS]
    read = subprocess.run(
        [sys.executable, "-c", READ_IN_A_FRESH_PROCESS, *folders], capture_output=True, text=True, check=False
    )
    assert read.returncode == 0, read.stderr
    answers = json.loads(read.stdout.splitlines()[-1])
    assert len(answers) == 6
    for name, answer in zip(OURS, answers.values(), strict=True):
        assert answer["model"] == FAMILIES[name.split("_")[0]].architecture
        assert answer["faults"] == []
        assert answer["size"] > 0.5, "logits near zero would agree whatever the weights"
        assert answer["difference"] < 2e-5 * answer["size"], name
        assert answer["ids"] == [tokenizer.encode(text) for text in TEXTS]
        assert answer["eos"] == [0, 0, 0]


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa_untied": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54}),
    "llama_theta_eps": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 0.01,
            "rope_parameters": {"rope_type": "default", "rope_theta": 37.0},
        },
    ),
    "llama_one_layer": ("Llama", {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "mixtral_gqa": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "num_key_value_heads": 1}),
    "mixtral_tied": (
        "Mixtral",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 41.0}},
    ),
    "mixtral_all": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3, "rms_norm_eps": 0.02}),
}


def their_model(family: str, fields: dict[str, Any]) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 59, "hidden_size": 20, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 5, "num_key_value_heads": 5, "max_position_embeddings": 31,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes | fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3, generator=generator)
            if "norm" in name:
                weight.add_(1)
    return model


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_load_with_equal_logits(name: str, tmp_path: Path) -> None:
    theirs = their_model(*THEIRS[name])
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    input_ids = torch.randint(59, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, logits = theirs(input_ids).logits, ours(input_ids).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    # And back again: what we read is what we write.
    save_pretrained(ours, None, tmp_path / "again", dtype=torch.float32)
    again = load_decoder(tmp_path / "again")
    assert again.config == ours.config
    for (key, weight), other in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other), key


def test_experts_stored_in_one_stack_load_too(tmp_path: Path) -> None:
    theirs = their_model("Mixtral", {"num_local_experts": 4})
    theirs.save_pretrained(tmp_path / "apart")
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    apart, stacked = load_decoder(tmp_path / "apart"), load_decoder(tmp_path / "stacked")
    assert "model.layers.0.mlp.experts.gate_up_proj" in weight_views(stacked, fused=True)
    for (key, weight), other in zip(apart.state_dict().items(), stacked.state_dict().values(), strict=True):
        assert torch.equal(weight, other), key


@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_config_survives_the_way_there_and_back(config: DecoderConfig) -> None:
    fields = json.loads(json.dumps(to_transformers_config(config)))
    back = from_transformers_config(fields)
    # Llama and Mixtral have one width, which is the experts' where there are any.
    width = config.moe.intermediate_size if config.moe else config.intermediate_size
    assert back == dataclasses.replace(config, intermediate_size=width)


def test_what_a_config_leaves_out_is_what_transformers_puts_in() -> None:
    from transformers import LlamaConfig, MixtralConfig

    for theirs in (LlamaConfig(), MixtralConfig()):
        for name, value in FAMILIES[theirs.model_type].defaults.items():
            if name == "rope_theta":
                assert theirs.rope_parameters["rope_theta"] == value
            elif name == "num_key_value_heads" and value is None:
                assert theirs.num_key_value_heads == theirs.num_attention_heads
            else:
                assert getattr(theirs, name) == value, name
        for name, value in FAMILIES[theirs.model_type].required.items():
            assert getattr(theirs, name, None) == value, name


def test_rotary_base_where_earlier_versions_put_it() -> None:
    fields = to_transformers_config(OURS["llama"])
    del fields["rope_parameters"]
    assert from_transformers_config(fields).rope_theta == 10000.0
    assert from_transformers_config(fields | {"rope_theta": 97.0, "rope_scaling": None}).rope_theta == 97.0
    fields = to_transformers_config(OURS["mixtral"])
    del fields["rope_parameters"]
    assert from_transformers_config(fields).rope_theta == 1000000.0


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("llama", {"quantization_config": {"load_in_4bit": True}}, "quantization_config="),
    ("llama", {"head_dim": 6}, "head_dim=6"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters="),
    ("llama", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "rope_parameters="),
    ("llama", {"model_type": "olmoe"}, "model_type='olmoe'"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "model.Model"}}, "auto_map="),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
]


@pytest.mark.parametrize(("family", "fields", "named"), REFUSED, ids=[named for *_, named in REFUSED])
def test_what_the_decoder_cannot_be_is_refused_by_name(family: str, fields: dict[str, Any], named: str) -> None:
    described = to_transformers_config(OURS[family])
    from_transformers_config(described)
    with pytest.raises(ValueError, match=named) as refused:
        from_transformers_config(described | fields, "somewhere/config.json")
    assert "somewhere/config.json" in str(refused.value)


UNSAVED = [
    ({"feed_forwards": ("dense", "moe"), "num_hidden_layers": 2}, {}, "feed_forwards"),
    ({}, {"hidden_act": "gelu"}, "hidden_act"),
    ({}, {"norm_topk_prob": False}, "norm_topk_prob"),
    ({}, {"router_bias": True}, "router_bias"),
]


@pytest.mark.parametrize(("fields", "experts", "named"), UNSAVED, ids=[named for *_, named in UNSAVED])
def test_what_transformers_has_not_is_not_saved(
    fields: dict[str, Any], experts: dict[str, Any], named: str, tmp_path: Path
) -> None:
    moe = MoEConfig(12, 19, 3, 2, **experts)
    config = DecoderConfig(**{**dataclasses.asdict(OURS["mixtral_one_expert"]), "moe": moe, **fields})
    with pytest.raises(ValueError, match=named):
        save_pretrained(Decoder(config), None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_router_is_not_saved_as_mixtral(tmp_path: Path) -> None:
    class Other(TopKRouter):
        pass

    model = Decoder(OURS["mixtral"])
    model.layers[1].feed_forward.router = Other(OURS["mixtral"].moe)
    with pytest.raises(ValueError, match=r"layers\.1 is a Other"):
        save_pretrained(model, None, tmp_path)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(OURS["llama"], vocab_size=len(tokenizer) - 1)
    with pytest.raises(ValueError, match=f"vocab_size={len(tokenizer) - 1}"):
        save_pretrained(Decoder(config), tokenizer, tmp_path)


def test_rounding_to_the_stored_type_is_the_only_change(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = random_decoder(OURS["mixtral"])
    save_pretrained(model, tokenizer, tmp_path)
    found, words = from_pretrained(tmp_path)
    assert [words.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert not found.training
    assert found.config == OURS["mixtral"]
    for (key, weight), other in zip(model.state_dict().items(), found.state_dict().values(), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(weight.bfloat16().float(), other), key
    half, _ = from_pretrained(tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_no_file_exceeds_the_limit_and_stale_shards_go(tmp_path: Path) -> None:
    model = random_decoder(OURS["mixtral"])
    save_pretrained(model, None, tmp_path, dtype=torch.float32, max_file_bytes=130_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert max(path.stat().st_size for path in shards) <= 130_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    sharded = load_decoder(tmp_path).state_dict()
    assert all(torch.equal(weight, sharded[key]) for key, weight in model.state_dict().items())
    save_pretrained(model, None, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_file_counts_with_its_header(tmp_path: Path) -> None:
    # Four tensors of 1,024 bytes would fill the limit to the byte, if there were no header.
    weights = {f"tensor_{number}": torch.full((256,), float(number)) for number in range(10)}
    write_checkpoint(tmp_path, {}, weights, max_file_bytes=4096)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert 2 < len(shards) < 10
    assert max(path.stat().st_size for path in shards) <= 4096


def test_full_disk_leaves_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(random_decoder(OURS["llama"], 0), None, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write, written = Path.write_bytes, []

    def disk_that_fills(path: Path, content: bytes) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", disk_that_fills)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(random_decoder(OURS["llama"], 1), None, tmp_path, max_file_bytes=20_000)
    assert written
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
