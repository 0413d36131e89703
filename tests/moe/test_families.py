"""The counts of published models: against what their authors print, torch's FLOP counter, and real caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medarch.bench.flops import count_flops
from medarch.moe.families import (
    FAMILIES,
    build,
    cache_per_token,
    configuration,
    count_family,
    count_model,
    experts_of,
    is_router,
    state_size,
)

# A small copy of each, of the same kind in every respect that a count could miss.
LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 10, "qk_rope_head_dim": 4, "v_head_dim": 7}
DEEPSEEK = {"hidden_size": 22, "intermediate_size": 26, "moe_intermediate_size": 13, "num_attention_heads": 2}
DEEPSEEK |= {"num_key_value_heads": 2, "n_routed_experts": 5, "n_shared_experts": 2, "num_experts_per_tok": 3}
DEEPSEEK |= {"first_k_dense_replace": 1, "vocab_size": 31, "num_hidden_layers": 3}
SWITCH = {"d_model": 20, "d_ff": 14, "d_kv": 6, "num_heads": 3, "vocab_size": 31, "num_experts": 3}
SWITCH |= {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
PLAIN = {"hidden_size": 24, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN |= {"num_key_value_heads": 2, "vocab_size": 31, "num_experts_per_tok": 2}
SMALL: dict[str, dict[str, Any]] = {
    "Switch-Base-8": SWITCH,
    "Mixtral 8x7B": PLAIN | {"num_local_experts": 5},
    "DeepSeekMoE-16B": DEEPSEEK | {"head_dim": 8},
    "DeepSeek-V2-Lite": DEEPSEEK | LATENT,
    "DeepSeek-V3": DEEPSEEK | LATENT | {"q_lora_rank": 9, "n_routed_experts": 6, "n_group": 2, "topk_group": 1},
    "Qwen1.5-MoE-A2.7B": PLAIN | {"num_experts": 5, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 17},
    "OLMoE-1B-7B": PLAIN | {"num_experts": 5},
    "Jamba-v0.1": PLAIN
    | {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 5}
    | {"mamba_d_state": 3, "mamba_d_conv": 4, "mamba_dt_rank": 5},
}


def small(name: str) -> Any:
    """A small copy on the CPU, whose experts run one by one and whose attention is plain matrix products."""
    config = configuration(FAMILIES[name], **SMALL[name])
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return build(config, "cpu").eval()


def run(model: Any, tokens: int = 1, **more: Any) -> Any:
    ids = torch.arange(1, tokens + 1)[None]
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(input_ids=ids, **more)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.total])
def test_the_total_is_what_the_authors_print(name: str) -> None:
    printed = FAMILIES[name].total
    assert printed is not None
    digits = len(printed.partition(".")[2])
    assert f"{count_family(FAMILIES[name]).total / 1e9:.{digits}f}" == printed


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.active])
def test_the_active_size_is_what_the_authors_print_with_or_without_the_embedding(name: str) -> None:
    printed, count = FAMILIES[name].active, count_family(FAMILIES[name])
    assert printed is not None
    digits = len(printed.partition(".")[2])
    # DeepSeek-V2-Lite's 2.451 billion without the embedding are printed as 2.4.
    half = 0.52 if name == "DeepSeek-V2-Lite" else 0.5
    either = (count.active / 1e9, (count.active - count.embedding) / 1e9)
    assert min(abs(value - float(printed)) for value in either) <= half * 10**-digits


def test_switch_base_fills_its_file() -> None:
    # google/switch-base-8, pytorch_model.bin in bfloat16: 1.24 GB.
    assert round(count_family(FAMILIES["Switch-Base-8"]).bytes(16) / 1e9, 2) == 1.24


def test_mixtral_by_hand() -> None:
    hidden, inner, layers, vocabulary = 4096, 14336, 32, 32000
    attention = 2 * hidden * hidden + 2 * hidden * 1024
    router, expert = 8 * hidden, 3 * hidden * inner
    norms = layers * 2 * hidden + hidden
    count = count_family(FAMILIES["Mixtral 8x7B"])
    assert count.total == layers * (attention + router + 8 * expert) + norms + 2 * vocabulary * hidden
    assert count.active == layers * (attention + router + 2 * expert) + norms + 2 * vocabulary * hidden
    assert count.flops == 2 * (layers * (attention + router + 2 * expert) + vocabulary * hidden)
    assert (count.routed, count.shared, count.router) == (layers * 8 * expert, 0, layers * router)
    assert cache_per_token(configuration(FAMILIES["Mixtral 8x7B"])) * 2 == 131072  # bytes in bfloat16


def test_deepseekmoe_by_hand() -> None:
    hidden, inner, layers, vocabulary = 2048, 1408, 28, 102400
    attention, expert = 4 * hidden * hidden, 3 * hidden * inner
    first = 3 * hidden * 10944
    norms = layers * 2 * hidden + hidden
    rest = layers * attention + first + norms + 2 * vocabulary * hidden + 27 * (64 * hidden + 2 * expert)
    count = count_family(FAMILIES["DeepSeekMoE-16B"])
    assert count.total == rest + 27 * 64 * expert == 16_375_728_128
    assert count.active == rest + 27 * 6 * expert == 2_828_650_496


@pytest.mark.parametrize("name", SMALL)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model = small(name)
    config: Any = model.config
    counted = count_flops(run, model)
    # Beyond the weights: each head's score and sum for a single token, and what Mamba does with its state.
    if hasattr(config, "qk_nope_head_dim"):
        head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        beyond = 2 * config.num_hidden_layers * config.num_attention_heads * head
    elif name == "Switch-Base-8":
        beyond = 3 * 2 * 2 * (2 * config.num_heads * config.d_kv)  # two layers of encoder, two of decoder twice
    elif name == "Jamba-v0.1":
        inner = config.mamba_expand * config.hidden_size
        beyond = 2 * 2 * config.hidden_size
        # Three Mamba layers, whose states are read by a matrix product, and whose convolution over four steps
        # computes seven positions for a single token, of which one is kept.
        beyond += 3 * (2 * inner * config.mamba_d_state + 6 * 2 * inner * config.mamba_d_conv)
    else:
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 4)
        beyond = config.num_hidden_layers * 2 * 2 * width
    assert counted == count_model(model).flops + beyond


@pytest.mark.parametrize("name", [name for name in SMALL if name != "Switch-Base-8"])
def test_the_cache_holds_what_is_said(name: str) -> None:
    model, tokens = small(name), 7
    cache = run(model, tokens, use_cache=True).past_key_values
    kept = sum(tensor.numel() for layer in cache.layers for tensor in _tensors(layer))
    assert kept == tokens * cache_per_token(model.config) + state_size(model.config)


def _tensors(layer: Any) -> list[torch.Tensor]:
    """Keys and values of an attention layer, the states of a Mamba layer."""
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [
        value for value in (getattr(layer, "keys", None), getattr(layer, "values", None), *states) if value is not None
    ]


def test_the_switch_decoder_caches_what_is_said() -> None:
    model = small("Switch-Base-8")
    cache = run(model, 5).past_key_values.self_attention_cache
    kept = sum(tensor.numel() for layer in cache.layers for tensor in _tensors(layer))
    assert kept == 5 * cache_per_token(model.config)


def test_many_switch_experts_are_counted_from_few() -> None:
    family = FAMILIES["Switch-Base-8"]
    assert count_family(family) == count_model(build(configuration(family)))


def test_the_meta_device_holds_nothing() -> None:
    model = build(configuration(FAMILIES["OLMoE-1B-7B"]))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.gate.weight", True),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", True),
        ("model.layers.1.feed_forward.router.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", False),
        ("model.layers.0.mlp.shared_expert_gate.weight", False),
    ],
)
def test_which_parameter_is_a_router(name: str, expected: bool) -> None:
    assert is_router(name) is expected


def test_a_model_without_experts_is_refused() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(ValueError, match="llama names no number of experts"):
        experts_of(config)
    config.num_experts, config.num_experts_per_tok = 4, 2
    with pytest.raises(ValueError, match="no parameter of routed experts"):
        count_model(build(config))
