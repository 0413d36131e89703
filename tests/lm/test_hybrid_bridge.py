"""Models with state space layers: ours open in transformers and theirs in our decoder, with equal logits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medarch.lm.bridge import (
    from_pretrained,
    from_transformers_config,
    load_decoder,
    save_pretrained,
    to_transformers_config,
    weight_views,
)
from medarch.lm.generation import generate
from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.hybrid_families import FAMILIES, UNBOUNDED
from medarch.lm.loading import load
from medarch.lm.tokenizer import Tokenizer
from medarch.moe.config import MoEConfig
from medarch.moe.router import TopKRouter

TEXTS = ["Apnea: lack of breathing with no movement of the respiratory muscles.", "<|endoftext|> 39,5 °C ß"]

# Odd sizes: no two dimensions of one model are equal by chance, so that none can stand in for another. A mixture's
# are multiples of 4 at least, since transformers' grouped product wants rows of whole 16 bytes.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba_prime": (
        "Mamba",
        {"hidden_size": 13, "state_size": 5, "num_hidden_layers": 3, "conv_kernel": 3, "time_step_rank": 7},
    ),
    "mamba_biases_untied": (
        "Mamba",
        {
            "hidden_size": 19, "state_size": 3, "num_hidden_layers": 2, "expand": 3, "use_bias": True,
            "use_conv_bias": False, "tie_word_embeddings": False, "layer_norm_epsilon": 0.01, "residual_in_fp32": False,
        },
    ),
    "mamba_narrow": (
        "Mamba", {"hidden_size": 34, "state_size": 1, "num_hidden_layers": 1, "conv_kernel": 2, "expand": 1}
    ),
    "jamba_moe": (
        "Jamba",
        {
            "hidden_size": 20, "intermediate_size": 12, "num_hidden_layers": 5, "num_attention_heads": 5,
            "num_key_value_heads": 1, "num_experts": 5, "num_experts_per_tok": 3, "attn_layer_period": 3,
            "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0, "mamba_d_state": 7,
            "mamba_d_conv": 3, "mamba_dt_rank": 3,
        },
    ),
    "jamba_dense_tied": (
        "Jamba",
        {
            "hidden_size": 21, "intermediate_size": 11, "num_hidden_layers": 4, "num_attention_heads": 7,
            "num_key_value_heads": 7, "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 4,
            "attn_layer_offset": 2, "tie_word_embeddings": True, "mamba_expand": 3, "mamba_proj_bias": True,
            "mamba_conv_bias": False, "rms_norm_eps": 0.02,
        },
    ),
    "jamba_one_expert_a_token": (
        "Jamba",
        {
            "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 3,
            "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_d_state": 5,
        },
    ),
    "mamba2_groups": (
        "Mamba2",
        {
            "hidden_size": 15, "state_size": 7, "num_heads": 6, "head_dim": 5, "n_groups": 3, "num_hidden_layers": 3,
            "conv_kernel": 3, "chunk_size": 4,
        },
    ),
    "mamba2_biases_tied": (
        "Mamba2",
        {
            "hidden_size": 22, "state_size": 5, "num_heads": 2, "head_dim": 11, "n_groups": 1, "num_hidden_layers": 2,
            "expand": 1, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "chunk_size": 16,
            "layer_norm_epsilon": 0.01, "residual_in_fp32": False,
        },
    ),
    "mamba2_limited": (
        "Mamba2",
        {
            "hidden_size": 14, "state_size": 3, "num_heads": 21, "head_dim": 2, "n_groups": 7, "num_hidden_layers": 2,
            "expand": 3, "chunk_size": 5, "time_step_limit": [0.3, 0.9],
        },
    ),
    "granite_moe": (
        "GraniteMoeHybrid",
        {
            "hidden_size": 20, "intermediate_size": 12, "shared_intermediate_size": 28, "num_hidden_layers": 5,
            "num_attention_heads": 5, "num_key_value_heads": 1, "num_local_experts": 7, "num_experts_per_tok": 3,
            "layer_types": ["mamba", "attention", "mamba", "mamba", "attention"], "mamba_n_heads": 8,
            "mamba_d_state": 7, "mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_chunk_size": 4,
            "position_embedding_type": "nope", "embedding_multiplier": 3.0, "logits_scaling": 1.7,
            "residual_multiplier": 0.6, "attention_multiplier": 0.3,
        },
    ),
    "granite_dense_rope": (
        "GraniteMoeHybrid",
        {
            "hidden_size": 18, "intermediate_size": 31, "shared_intermediate_size": 11, "num_hidden_layers": 3,
            "num_attention_heads": 3, "num_key_value_heads": 3, "num_local_experts": 0, "num_experts_per_tok": 0,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"], "mamba_n_heads": 6,
            "mamba_expand": 3, "mamba_d_state": 5, "mamba_proj_bias": True, "mamba_conv_bias": False,
            "position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 41.0},
            "tie_word_embeddings": True, "rms_norm_eps": 0.02, "attention_multiplier": 0.7,
        },
    ),
    "granite_attention_alone": (
        "GraniteMoeHybrid",
        {
            "hidden_size": 24, "intermediate_size": 16, "shared_intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2,
            "layer_types": ["attention", "attention"], "mamba_n_heads": 1, "position_embedding_type": "rope",
            "residual_multiplier": 0.5,
        },
    ),
}  # fmt: skip


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills a model with weights of which no two are equal, norms included, and whose logits are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3, generator=generator)
            if "norm" in name or name.endswith("D"):
                weight.add_(1)


def their_model(name: str, seed: int = 1, **changes: Any) -> Any:
    import transformers

    family, fields = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(vocab_size=59, eos_token_id=None, **fields | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomise(model, seed)
    return model


def tokens(vocab_size: int = 59, batch: int = 2, time: int = 17, seed: int = 2) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def keeps_to_its_limit(name: str) -> bool:
    """Not so where step sizes are limited: transformers 5.23 forgets the limit when it reads a single token."""
    return "time_step_limit" not in THEIRS[name][1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=277)


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_load_with_equal_logits_and_are_written_back(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_decoder(tmp_path / "theirs")
    assert isinstance(ours, HybridDecoder)
    ids = tokens()
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=3e-5 * float(expected.abs().max()))
    save_pretrained(ours, None, tmp_path / "again", dtype=torch.float32)
    again = load_decoder(tmp_path / "again")
    assert again.config == ours.config
    for (key, weight), other in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other), key
    # The same tensors under the same names, so that what reads theirs reads ours.
    written, stored = load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", THEIRS)
def test_a_memory_of_what_was_read_gives_the_full_forward_and_their_continuation(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    ids = tokens(time=11)
    with torch.no_grad():
        whole = ours(ids).logits
        cache = ours.new_cache(2, 11)
        # A prompt in pieces of several lengths, the last tokens one by one.
        pieces = [ours(piece, cache=cache).logits for piece in ids.split([4, 3, 1, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        assert cache.length == 11
        prompt = ids[:, :5]
        options = {"do_sample": False, "pad_token_id": 0, "use_cache": keeps_to_its_limit(name)}
        expected = theirs.generate(prompt, max_new_tokens=9, **options)
    continued = generate(ours, prompt, 9)
    assert torch.equal(continued, expected)
    assert torch.equal(generate(ours, prompt, 9, use_cache=False), expected)


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
        options = {"do_sample": False, "pad_token_id": 0, "use_cache": expected["use_cache"]}
        written = model.generate(expected["input_ids"][:, :5], max_new_tokens=6, **options)
    answers[folder] = {
        "model": type(model).__name__,
        "faults": [str(name) for names in report.values() for name in names],
        "difference": float((logits - expected["logits"]).abs().max()),
        "size": float(expected["logits"].abs().max()),
        "same text": torch.equal(written[:, : expected["written"].shape[1]], expected["written"]),
        "ids": tokenizer(json.loads(expected["texts"]))["input_ids"],
    }
print(json.dumps(answers))
"""


def from_theirs(name: str, vocab_size: int, **changes: Any) -> HybridConfig:
    """The configuration of ours that corresponds to one of theirs."""
    import transformers

    family, fields = THEIRS[name]
    theirs = getattr(transformers, f"{family}Config")(vocab_size=vocab_size, **fields)
    config = from_transformers_config(json.loads(theirs.to_json_string(use_diff=False)))
    assert isinstance(config, HybridConfig)
    return dataclasses.replace(config, **changes)


def test_saved_models_open_in_a_fresh_process_with_equal_logits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number, name in enumerate(THEIRS):
        model = HybridDecoder(from_theirs(name, 281 + 2 * number))
        randomise(model, number)
        save_pretrained(model, tokenizer, tmp_path / name)
        ids = tokens(model.config.vocab_size, 3, 13, number)
        stored, words = from_pretrained(tmp_path / name)
        assert words.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        with torch.no_grad():  # ours from the same bfloat16 file
            logits = stored(ids).logits
        written = generate(stored, ids[:, :5], 6, end_of_text=tokenizer.end_of_text)
        expected = {"input_ids": ids, "logits": logits, "written": written, "texts": json.dumps(TEXTS)}
        expected["use_cache"] = keeps_to_its_limit(name)
        torch.save(expected, tmp_path / name / "expected.pt")
    folders = [str(tmp_path / name) for name in THEIRS]
    read = subprocess.run(
        [sys.executable, "-c", READ_IN_A_FRESH_PROCESS, *folders], capture_output=True, text=True, check=False
    )
    assert read.returncode == 0, read.stderr
    answers = json.loads(read.stdout.splitlines()[-1])
    for name, answer in zip(THEIRS, answers.values(), strict=True):
        assert answer["model"] == FAMILIES[THEIRS[name][0].lower()].architecture
        assert answer["faults"] == []
        assert answer["size"] > 0.5, "logits near zero would agree whatever the weights"
        assert answer["difference"] < 5e-5 * answer["size"], name
        assert answer["same text"], name
        assert answer["ids"] == [tokenizer.encode(text) for text in TEXTS]


def test_one_loader_for_both_libraries(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = HybridDecoder(from_theirs("mamba_prime", 283))
    randomise(model, 3)
    save_pretrained(model, tokenizer, tmp_path, dtype=torch.float32)
    ours, words = load(tmp_path)
    theirs, their_words = load(tmp_path, library="transformers")
    assert isinstance(ours, HybridDecoder)
    assert type(theirs).__name__ == "MambaForCausalLM"
    ids = words.encode(TEXTS[0])
    assert their_words(TEXTS[0])["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits)
    half, _ = load(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["jamba_moe", "jamba_one_expert_a_token", "granite_moe", "granite_attention_alone"])
def test_experts_stored_in_one_stack_load_too(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "apart")
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert (
        load_file(tmp_path / "apart/model.safetensors").keys()
        != load_file(tmp_path / "stacked/model.safetensors").keys()
    )
    apart, stacked = load_decoder(tmp_path / "apart"), load_decoder(tmp_path / "stacked")
    for (key, weight), other in zip(apart.state_dict().items(), stacked.state_dict().values(), strict=True):
        assert torch.equal(weight, other), key


def test_each_inner_norm_goes_to_its_own_place(tmp_path: Path) -> None:
    # The output sees only the product of the norms' weights on B and C, so that equal logits would not tell.
    their_model("jamba_moe").save_pretrained(tmp_path)
    mixer, stored = load_decoder(tmp_path).layers[0].mixer, load_file(tmp_path / "model.safetensors")
    for name, own in (("dt", mixer.dt_norm), ("b", mixer.B_norm), ("c", mixer.C_norm)):
        assert torch.equal(own, stored[f"model.layers.0.mamba.{name}_layernorm.weight"]), name


def test_embedding_under_its_older_name_and_a_tied_head_written_out(tmp_path: Path) -> None:
    their_model("mamba_prime").save_pretrained(tmp_path)
    expected = load_decoder(tmp_path).state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    table = weights.pop("backbone.embeddings.weight")
    older = {**weights, "backbone.embedding.weight": table, "lm_head.weight": table.clone()}
    save_file(older, tmp_path / "model.safetensors")
    found = load_decoder(tmp_path).state_dict()
    assert all(torch.equal(weight, found[key]) for key, weight in expected.items())
    save_file({**older, "lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from backbone\.embedding\.weight"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("name", THEIRS)
def test_config_survives_the_way_there_and_back(name: str) -> None:
    config = from_theirs(name, 61)
    assert from_transformers_config(json.loads(json.dumps(to_transformers_config(config)))) == config


def test_what_a_config_leaves_out_is_what_transformers_puts_in() -> None:
    import transformers

    for family in FAMILIES.values():
        theirs = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))()
        for name, value in family.defaults.items():
            if value in (None, "auto"):
                continue  # asked below, where it has been computed
            found = theirs.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(theirs, name)
            assert found == value, (family.architecture, name)
        for name, value in family.required.items():
            assert getattr(theirs, name, value) == value, name
        config = from_transformers_config({"model_type": theirs.model_type})
        assert config == from_transformers_config(json.loads(theirs.to_json_string(use_diff=False)))


def test_a_state_has_room_for_any_length_unless_the_file_says_otherwise() -> None:
    fields = to_transformers_config(from_theirs("mamba_prime", 61))
    assert fields.pop("max_position_embeddings") == UNBOUNDED
    assert from_transformers_config(fields).max_position_embeddings == UNBOUNDED
    assert from_transformers_config(fields | {"max_position_embeddings": 77}).max_position_embeddings == 77


def test_code_of_a_checkpoint_is_neither_run_nor_needed() -> None:
    fields = to_transformers_config(from_theirs("jamba_moe", 61))
    named = fields | {"auto_map": {"AutoModelForCausalLM": "modeling_jamba.JambaForCausalLM"}}
    assert from_transformers_config(named) == from_transformers_config(fields)


REFUSED = [
    ("mamba_prime", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("mamba_prime", {"quantization_config": {"load_in_4bit": True}}, "quantization_config="),
    ("mamba_prime", {"state_size": 0}, "state_size"),
    ("mamba_prime", {"use_bias": "yes"}, "use_bias='yes'"),
    ("mamba_prime", {"layer_norm_epsilon": None}, "layer_norm_epsilon=None"),
    ("mamba_prime", {"num_hidden_layers": "3"}, "num_hidden_layers"),
    ("mamba_prime", {"time_step_rank": "low"}, "time_step_rank"),
    ("jamba_moe", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("jamba_moe", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms=False"),
    ("jamba_moe", {"attn_layer_offset": 3}, "attn_layer_offset=3"),
    ("jamba_moe", {"expert_layer_period": 0}, "expert_layer_period"),
    ("jamba_moe", {"num_experts_per_tok": 6}, "num_experts_per_tok=6"),
    ("jamba_moe", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ("jamba_moe", {"head_dim": 6}, "head_dim=6"),
    ("mamba2_groups", {"n_groups": 4}, "n_groups=4"),
    ("mamba2_groups", {"head_dim": 6}, "head_dim=6"),
    ("mamba2_groups", {"time_step_limit": [0.5]}, "time_step_limit"),
    ("mamba2_groups", {"time_step_limit": [0.5, 0.1]}, "time_step_limit"),
    ("granite_moe", {"attention_bias": True}, "attention_bias=True"),
    ("granite_moe", {"layer_types": ["mamba"] * 4}, "layer_types has 4"),
    ("granite_moe", {"layer_types": ["mamba"] * 4 + ["conv"]}, "layer_types names 'conv'"),
    ("granite_moe", {"mamba_d_head": 4}, "head_dim=4"),
    ("granite_moe", {"shared_intermediate_size": 0}, "shared_intermediate_size"),
    ("granite_moe", {"logits_scaling": "large"}, "logits_scaling='large'"),
    ("granite_dense_rope", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 41.0}}, "rope_parameters="),
]


@pytest.mark.parametrize(("name", "fields", "named"), REFUSED, ids=[named for *_, named in REFUSED])
def test_what_the_decoder_cannot_be_is_refused_by_name(name: str, fields: dict[str, Any], named: str) -> None:
    described = to_transformers_config(from_theirs(name, 61))
    with pytest.raises(ValueError, match=named) as refused:
        from_transformers_config(described | fields, "somewhere/config.json")
    assert str(refused.value).count("somewhere/config.json") == 1


UNSAVED = [
    ("jamba_moe", {"mamba_inner_norms": False}, "inner_norms=False"),
    ("mamba_prime", {"mamba_inner_norms": True}, "inner_norms=True"),
    ("mamba_prime", {"logits_scaling": 2.0}, "logits_scaling=2.0"),
    ("mamba_prime", {"feed_forwards": ("none", "none", "dense")}, "feed_forwards="),
    ("jamba_dense_tied", {"positions": "rotary", "num_attention_heads": 1, "num_key_value_heads": 1,
                          "hidden_size": 22}, "positions='rotary'"),
    ("jamba_dense_tied", {"attention_multiplier": 0.5}, "attention_multiplier=0.5"),
    ("jamba_dense_tied", {"residual_in_fp32": True}, "residual_in_fp32=True"),
    ("jamba_dense_tied", {"rms_norm_eps": 0.5}, "rms_norm_eps=0.5"),
    ("jamba_dense_tied", {"mixers": ("mamba", "attention", "attention", "mamba")}, "equal distances"),
    ("jamba_dense_tied", {"mixers": ("mamba",)}, "no attention"),
    ("jamba_moe", {"intermediate_size": 16}, "intermediate_size=16"),
    ("jamba_moe", {"moe": MoEConfig(20, 12, 5, 3)}, "norm_topk_prob=True"),
    ("jamba_moe", {"shared_intermediate_size": 8}, "shared_intermediate_size=8"),
    ("granite_moe", {"shared_intermediate_size": None}, "shared_intermediate_size=None"),
    ("granite_moe", {"rms_norm_eps": 0.5}, "layer_norm_epsilon="),
    ("granite_moe", {"residual_in_fp32": True}, "residual_in_fp32=True"),
    ("granite_moe", {"feed_forwards": ("moe", "moe", "moe", "moe", "dense")}, "feed_forwards="),
    ("mamba2_groups", {"embedding_multiplier": 2.0}, "embedding_multiplier=2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "named"), UNSAVED, ids=[named for *_, named in UNSAVED])
def test_what_transformers_has_not_is_not_saved(name: str, fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    config = from_theirs(name, 61)
    fields, mamba = dict(fields), config.mamba
    if mamba is not None:
        norms, hidden = fields.pop("mamba_inner_norms", mamba.inner_norms), fields.get("hidden_size", mamba.hidden_size)
        fields["mamba"] = dataclasses.replace(mamba, inner_norms=norms, hidden_size=hidden)
    model = HybridDecoder(dataclasses.replace(config, **fields))
    with pytest.raises(ValueError, match=named):
        save_pretrained(model, None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_router_is_not_saved(tmp_path: Path) -> None:
    class Other(TopKRouter):
        pass

    model = HybridDecoder(from_theirs("jamba_moe", 61))
    model.layers[2].feed_forward.router = Other(model.config.moe)
    with pytest.raises(ValueError, match=r"layers\.2 is a Other"):
        save_pretrained(model, None, tmp_path)


MISSED = {
    "mamba_prime": "backbone.layers.1.mixer.A_log",
    "mamba2_groups": "backbone.layers.1.mixer.in_proj.weight",
    "jamba_moe": "model.layers.2.mamba.A_log",
    "granite_moe": "model.layers.3.shared_mlp.output_linear.weight",
}


@pytest.mark.parametrize("name", MISSED)
def test_missing_misshapen_and_foreign_tensors_are_named(name: str, tmp_path: Path) -> None:
    their_model(name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    tensor = MISSED[name]
    wrong = weights[tensor].T.contiguous()
    for changed, named in (
        ({key: weight for key, weight in weights.items() if key != tensor}, f"lacks the tensor {tensor}"),
        (weights | {tensor: wrong}, f"{tensor} has shape {tuple(wrong.shape)}, but config.json calls for"),
        (weights | {"model.visual.weight": wrong}, "holds the tensor model.visual.weight"),
        (weights | {tensor: weights[tensor].long()}, f"{tensor} is stored as I64"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError) as refused:  # noqa: PT011  the text is compared below
            load_decoder(tmp_path)
        assert named in str(refused.value)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        load_decoder(tmp_path)


def test_weights_of_another_pattern_of_layers_are_refused(tmp_path: Path) -> None:
    their_model("jamba_moe").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"attn_layer_offset": 0}))
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.0\.self_attn"):
        load_decoder(tmp_path)


def test_views_share_the_memory_of_the_model() -> None:
    for name in ("jamba_moe", "granite_moe"):
        model = HybridDecoder(from_theirs(name, 61))
        views = weight_views(model)
        assert sum(view.numel() for view in views.values()) == sum(weight.numel() for weight in model.parameters())
        for view in views.values():
            view.fill_(0.25)
        assert all(bool((weight == 0.25).all()) for weight in model.parameters())
