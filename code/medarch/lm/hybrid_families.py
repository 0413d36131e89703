"""Mamba and Jamba: what stands in their ``config.json``, and what our decoder makes of it.

Which family a decoder is follows from its layers: Mamba mixers alone and no feed-forwards make a Mamba, and Mamba
beside attention without positions a Jamba.
"""

from __future__ import annotations

from typing import Any

from medarch.lm.families import REQUIRED, Family, check_kinds, rope_theta
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.weight_files import CONFIG
from medarch.moe.config import MoEConfig
from medarch.ssm.config import MambaConfig

UNBOUNDED = 2**20
"""``max_position_embeddings`` of a Mamba whose ``config.json`` has none: a state has room for any length."""

_STEPS = {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4}
_STATE_SPACE: dict[str, Any] = {
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "initializer_range": 0.1,
    "residual_in_fp32": True,
    **_STEPS,
}
_DECODER: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_ACTIVATION = {"hidden_act": "silu", "quantization_config": None}
FAMILIES = {
    "mamba": Family(
        "MambaForCausalLM",
        {**_STATE_SPACE, "vocab_size": 50280, "time_step_rank": "auto", "tie_word_embeddings": True},
        _ACTIVATION,
    ),
    "jamba": Family(
        "JambaForCausalLM",
        {
            **_DECODER,
            "vocab_size": 65536,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "num_experts": 16,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "mamba_d_state": 16,
            "mamba_dt_rank": "auto",
        },
        # The second is a field of the first published checkpoint only.
        {**REQUIRED, "mamba_inner_layernorms": True},
    ),
}
"""The families by ``model_type``, with transformers' own defaults and what our decoder needs of a field."""


def family_of(config: HybridConfig) -> str:
    """The ``model_type`` of the family that has this pattern of layers.

    Raises:
        ValueError: If none has.
    """
    mixers, feed_forwards = set(config.mixers), set(config.feed_forwards)
    if mixers == {"mamba"} and feed_forwards == {"none"}:
        return "mamba"
    if "mamba" in mixers and "none" not in feed_forwards:
        return "jamba"
    raise ValueError(
        f"mixers={config.mixers} with feed_forwards={config.feed_forwards} is no Mamba (mamba alone, no feed-forwards) "
        "and no Jamba (mamba, and attention or not, each with a feed-forward): transformers has no such model; keep it "
        "in a folder of ours"
    )


def to_transformers_config(config: HybridConfig) -> dict[str, Any]:
    """The fields of ``config.json`` that describe this decoder to transformers 5.

    What decides the function is carried over, with the coefficients of the routers' losses and the range of the first
    step sizes. Two fields are our own, which transformers keeps and does not use: ``router_z_loss_coef``, and
    ``max_position_embeddings`` of a Mamba.

    Raises:
        ValueError: If transformers has no such model; the message names the field.
    """
    model_type = family_of(config)
    family = FAMILIES[model_type]
    write = {"mamba": _mamba_fields, "jamba": _jamba_fields}[model_type]
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "use_cache": True,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "initializer_range")
    fields |= {name: getattr(config, name) for name in (*shared, "max_position_embeddings")}
    fields |= {name: value for name, value in family.required.items() if value is not None} | write(config)
    if config.router_z_loss_coef:
        fields["router_z_loss_coef"] = config.router_z_loss_coef
    return fields


def _only(config: HybridConfig, family: str, **wanted: Any) -> None:
    """Refuses a decoder with a field that the family does not have."""
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r}, but {family} has {name}={value!r} only")


_UNSCALED = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}


def _mamba_fields(config: HybridConfig) -> dict[str, Any]:
    mamba = config.mamba
    assert mamba is not None
    _only(config, "Mamba", **_UNSCALED)
    if mamba.inner_norms:
        raise ValueError("mamba.inner_norms=True, but Mamba has no norms on the step sizes, B and C: only Jamba has")
    return {
        **{name: getattr(mamba, name) for name in ("state_size", "conv_kernel", "expand", "time_step_rank", *_STEPS)},
        **{name: getattr(mamba, name) for name in ("use_bias", "use_conv_bias")},
        "layer_norm_epsilon": config.rms_norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
    }


def _jamba_fields(config: HybridConfig) -> dict[str, Any]:
    mamba, moe = config.mamba, config.moe
    assert mamba is not None
    _only(config, "Jamba", **_UNSCALED, positions="none", attention_multiplier=None, shared_intermediate_size=None)
    _only(config, "Jamba", residual_in_fp32=False)
    if not mamba.inner_norms or mamba.rms_norm_eps != config.rms_norm_eps:
        raise ValueError(
            f"mamba.inner_norms={mamba.inner_norms} with mamba.rms_norm_eps={mamba.rms_norm_eps}, but Jamba normalises "
            f"the step sizes, B and C, with the model's own rms_norm_eps={config.rms_norm_eps}"
        )
    if "attention" not in config.mixers:
        raise ValueError(f"mixers={config.mixers}: transformers' Jamba cannot compute where it has no attention at all")
    attention = _every("mixers", [mixer == "attention" for mixer, _ in config.layer_kinds])
    experts = _every("feed_forwards", [feed_forward == "moe" for _, feed_forward in config.layer_kinds])
    width = config.intermediate_size
    if moe is not None:
        _check_experts(moe, "Jamba", normalised=False)
        if "dense" in config.feed_forwards and moe.intermediate_size != width:
            raise ValueError(
                f"moe.intermediate_size={moe.intermediate_size} differs from intermediate_size={width}: in Jamba an "
                "expert is as wide as a dense layer"
            )
        width = moe.intermediate_size
    return {
        "intermediate_size": width,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "num_experts": 1 if moe is None else moe.num_experts,
        "num_experts_per_tok": 1 if moe is None else moe.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": False,
        "mamba_d_state": mamba.state_size,
        "mamba_d_conv": mamba.conv_kernel,
        "mamba_expand": mamba.expand,
        "mamba_dt_rank": mamba.time_step_rank,
        "mamba_conv_bias": mamba.use_conv_bias,
        "mamba_proj_bias": mamba.use_bias,
    }


def _check_experts(moe: MoEConfig, family: str, *, normalised: bool) -> None:
    if moe.hidden_act != "silu" or moe.norm_topk_prob != normalised or moe.router_bias:
        raise ValueError(
            f"{family} has SwiGLU experts, norm_topk_prob={normalised} and no router bias, but moe has "
            f"hidden_act={moe.hidden_act!r}, norm_topk_prob={moe.norm_topk_prob}, router_bias={moe.router_bias}"
        )


def _every(name: str, marked: list[bool]) -> tuple[int, int]:
    """Period and offset of the marked layers, as Jamba writes a pattern down.

    Raises:
        ValueError: If they do not come at equal distances, up to the last layer.
    """
    count = len(marked)
    if not any(marked):
        return count + 1, count
    for period in range(1, count + 1):
        offset = marked.index(True) % period
        if all((layer % period == offset) == mark for layer, mark in enumerate(marked)):
            return period, offset
    raise ValueError(f"{name}: Jamba repeats attention and experts at equal distances, which this pattern does not")


def from_transformers_config(fields: dict[str, Any], source: str = CONFIG) -> HybridConfig:
    """The decoder that a ``config.json`` of one of these families describes.

    Code that a checkpoint names (``auto_map``) is neither run nor needed: its ``model_type`` is one that we have.

    Args:
        fields: Content of the file.
        source: What to call it in an error.

    Raises:
        ValueError: If a field asks for what the decoder does not do; the message names the field and its value.
    """
    model_type = str(fields.get("model_type"))
    if model_type not in FAMILIES:
        raise ValueError(f"{source}: model_type={model_type!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for name, wanted in family.required.items():
        if fields.get(name, wanted) != wanted:
            raise ValueError(
                f"{source}: {name}={fields[name]!r}, but the decoder has {name}={wanted!r} only: load it with "
                "library='transformers'"
            )
    known = family.defaults | {name: value for name, value in fields.items() if name in family.defaults}
    check_kinds(known, family.defaults, source)
    read = {"mamba": _read_mamba, "jamba": _read_jamba}[model_type]
    try:
        if (layers := known["num_hidden_layers"]) is not None:
            _whole("num_hidden_layers", layers)
        if "rope_theta" in known:
            known["rope_theta"] = rope_theta(fields, known["rope_theta"], source)
        if (head_dim := fields.get("head_dim")) is not None and "num_attention_heads" in known:
            _check_head_dim(head_dim, known)
        return read(known, fields)
    except ValueError as error:
        raise error if str(error).startswith(source) else ValueError(f"{source}: {error}") from error


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _check_head_dim(head_dim: Any, known: dict[str, Any]) -> None:
    heads, hidden = known["num_attention_heads"], known["hidden_size"]
    if not isinstance(head_dim, int) or head_dim * heads != hidden:
        raise ValueError(
            f"head_dim={head_dim} times num_attention_heads={heads} is not hidden_size={hidden}, as the decoder needs "
            "it: load it with library='transformers'"
        )


def _state_space_values(known: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "initializer_range")
    return {name: known[name] for name in (*names, "residual_in_fp32")} | {
        # A model without attention and feed-forwards has neither heads nor a width inside.
        "num_attention_heads": 1,
        "intermediate_size": 1,
        "rms_norm_eps": known["layer_norm_epsilon"],
        "max_position_embeddings": fields.get("max_position_embeddings", UNBOUNDED),
        "feed_forwards": ("none",),
    }


def _rank(value: Any) -> int | None:
    return None if value == "auto" else value


def _read_mamba(known: dict[str, Any], fields: dict[str, Any]) -> HybridConfig:
    sizes = ("hidden_size", "state_size", "conv_kernel", "expand", "use_bias", "use_conv_bias", *_STEPS)
    mamba = MambaConfig(**{name: known[name] for name in sizes}, time_step_rank=_rank(known["time_step_rank"]))
    return HybridConfig(**_state_space_values(known, fields), mixers=("mamba",), mamba=mamba)


def _decoder_values(known: dict[str, Any], fields: dict[str, Any], moe: MoEConfig | None) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    others = ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
    values = {name: known[name] for name in (*names, *others)} | {"moe": moe}
    if moe is not None:
        values["router_aux_loss_coef"] = known["router_aux_loss_coef"]
        values["router_z_loss_coef"] = fields.get("router_z_loss_coef", 0.0)
    return values


def _read_jamba(known: dict[str, Any], fields: dict[str, Any]) -> HybridConfig:
    def marked(kind: str) -> list[bool]:
        period = _whole(f"{kind}_layer_period", known[f"{kind}_layer_period"])
        offset = known[f"{kind}_layer_offset"]
        if not isinstance(offset, int) or not 0 <= offset < period:
            raise ValueError(f"{kind}_layer_offset={offset!r} must lie below {kind}_layer_period={period}")
        return [layer % period == offset for layer in range(known["num_hidden_layers"])]

    mixers = ["attention" if mark else "mamba" for mark in marked("attn")]
    several = _whole("num_experts", known["num_experts"]) > 1
    feed_forwards = ["moe" if mark and several else "dense" for mark in marked("expert")]
    moe = mamba = None
    if "moe" in feed_forwards:
        moe = MoEConfig(
            known["hidden_size"],
            known["intermediate_size"],
            known["num_experts"],
            known["num_experts_per_tok"],
            norm_topk_prob=False,
            initializer_range=known["initializer_range"],
        )
    if "mamba" in mixers:
        mamba = MambaConfig(
            known["hidden_size"],
            state_size=known["mamba_d_state"],
            conv_kernel=known["mamba_d_conv"],
            expand=known["mamba_expand"],
            time_step_rank=_rank(known["mamba_dt_rank"]),
            use_bias=known["mamba_proj_bias"],
            use_conv_bias=known["mamba_conv_bias"],
            inner_norms=True,
            rms_norm_eps=known["rms_norm_eps"],
        )
    return HybridConfig(
        **_decoder_values(known, fields, moe),
        intermediate_size=known["intermediate_size"],
        mixers=_shortest(mixers),
        feed_forwards=_shortest(feed_forwards),
        positions="none",
        mamba=mamba,
    )


def _shortest(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these layers when it is repeated."""
    for length in range(1, len(kinds) + 1):
        if len(kinds) % length == 0 and kinds[:length] * (len(kinds) // length) == kinds:
            return tuple(kinds[:length])
    return tuple(kinds)
