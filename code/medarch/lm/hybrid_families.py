"""Mamba, Mamba-2, Jamba and GraniteMoeHybrid: what stands in their ``config.json``, and what our decoder makes of it.

Which family a decoder is follows from its layers: Mamba mixers alone and no feed-forwards make a Mamba, Mamba-2
mixers alone a Mamba-2, Mamba beside attention without positions a Jamba, and Mamba-2 beside attention a
GraniteMoeHybrid.
"""

from __future__ import annotations

import math
from typing import Any

from medarch.lm.families import REQUIRED, Family, check_kinds, rope_theta
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.weight_files import CONFIG
from medarch.moe.config import MoEConfig
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba2_config import Mamba2Config

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
    "mamba2": Family(
        "Mamba2ForCausalLM",
        {
            **_STATE_SPACE,
            "vocab_size": 32768,
            "hidden_size": 4096,
            "state_size": 128,
            "num_hidden_layers": 64,
            "num_heads": 128,
            "head_dim": 64,
            "n_groups": 8,
            "chunk_size": 256,
            "time_step_limit": (0.0, math.inf),
            "tie_word_embeddings": False,
        },
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
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {
            **_DECODER,
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "num_local_experts": 8,
            "shared_intermediate_size": 1024,
            "position_embedding_type": None,
            "layer_types": None,
            "mamba_n_heads": 128,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_head": "auto",
            "mamba_chunk_size": 256,
            "time_step_limit": (0.0, math.inf),
        },
        {**REQUIRED, "attention_bias": False},
    ),
}
"""The families by ``model_type``, with transformers' own defaults and what our decoder needs of a field."""

_LAYER_TYPES = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
}


def family_of(config: HybridConfig) -> str:
    """The ``model_type`` of the family that has this pattern of layers.

    Raises:
        ValueError: If none has.
    """
    mixers, feed_forwards = set(config.mixers), set(config.feed_forwards)
    if feed_forwards == {"none"} and len(mixers) == 1 and mixers <= {"mamba", "mamba2"}:
        return mixers.pop()
    if "none" not in feed_forwards and len(mixers & {"mamba", "mamba2"}) < 2:
        return "jamba" if "mamba" in mixers else "granitemoehybrid"
    raise ValueError(
        f"mixers={config.mixers} with feed_forwards={config.feed_forwards} is no Mamba or Mamba-2 (one kind of mixer, "
        "no feed-forwards), no Jamba (mamba and attention) and no GraniteMoeHybrid (mamba2 and attention): "
        "transformers has no such model; keep it in a folder of ours"
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
    write = {"mamba": _mamba_fields, "mamba2": _mamba2_fields, "jamba": _jamba_fields}.get(model_type, _granite_fields)
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


def _mamba2_fields(config: HybridConfig) -> dict[str, Any]:
    mamba2 = config.mamba2
    assert mamba2 is not None
    _only(config, "Mamba-2", **_UNSCALED)
    _same_epsilon(config, mamba2)
    sizes = ("state_size", "num_heads", "head_dim", "n_groups", "conv_kernel", "expand", "chunk_size")
    return {
        **{name: getattr(mamba2, name) for name in (*sizes, "use_bias", "use_conv_bias", *_STEPS)},
        "time_step_limit": _limit_fields(mamba2),
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


def _granite_fields(config: HybridConfig) -> dict[str, Any]:
    mamba2, moe = config.mamba2, config.moe
    _only(config, "GraniteMoeHybrid", residual_in_fp32=False)
    if len(set(config.feed_forwards)) > 1:
        raise ValueError(f"feed_forwards={config.feed_forwards}, but those of GraniteMoeHybrid are alike in all layers")
    width, shared = config.intermediate_size, config.shared_intermediate_size
    if moe is not None:
        _check_experts(moe, "GraniteMoeHybrid", normalised=True)
        if shared is None:
            raise ValueError(
                "shared_intermediate_size=None, but GraniteMoeHybrid has a shared expert beside the others"
            )
        width = moe.intermediate_size
    fields = {
        "intermediate_size": width,
        "shared_intermediate_size": config.intermediate_size if moe is None else shared,
        "num_local_experts": 0 if moe is None else moe.num_experts,
        "num_experts_per_tok": 0 if moe is None else moe.num_experts_per_tok,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "layer_types": ["attention" if mixer == "attention" else "mamba" for mixer, _ in config.layer_kinds],
        "position_embedding_type": "rope" if config.positions == "rotary" else "nope",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_multiplier": config.attention_multiplier or config.head_dim**-0.5,
        **{name: getattr(config, name) for name in _UNSCALED},
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": False,
    }
    if mamba2 is None:  # a Granite of attention alone, whose other sizes must agree all the same
        return fields | {"mamba_n_heads": 1, "mamba_d_head": 2 * config.hidden_size, "mamba_expand": 2}
    _same_epsilon(config, mamba2)
    return fields | {
        "mamba_n_heads": mamba2.num_heads,
        "mamba_d_head": mamba2.head_dim,
        "mamba_n_groups": mamba2.n_groups,
        "mamba_d_state": mamba2.state_size,
        "mamba_d_conv": mamba2.conv_kernel,
        "mamba_expand": mamba2.expand,
        "mamba_chunk_size": mamba2.chunk_size,
        "mamba_conv_bias": mamba2.use_conv_bias,
        "mamba_proj_bias": mamba2.use_bias,
        "time_step_limit": _limit_fields(mamba2),
    }


def _same_epsilon(config: HybridConfig, mamba2: Mamba2Config) -> None:
    if mamba2.layer_norm_epsilon != config.rms_norm_eps:
        raise ValueError(
            f"mamba2.layer_norm_epsilon={mamba2.layer_norm_epsilon} differs from rms_norm_eps={config.rms_norm_eps}: "
            "transformers has one for both"
        )


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


def _limit_fields(mamba2: Mamba2Config) -> list[Any]:
    # JSON has no infinity; this is how transformers writes it.
    return [{"__float__": "Infinity"} if math.isinf(bound) else bound for bound in mamba2.time_step_limit]


def _read_limit(value: Any) -> tuple[float, float]:
    bounds = value if isinstance(value, list | tuple) else ()
    read = [float(bound["__float__"]) if isinstance(bound, dict) else bound for bound in bounds]
    if len(read) != 2:
        raise ValueError(f"time_step_limit={value!r} must be two numbers, the smallest and the largest step")
    return read[0], read[1]


def from_transformers_config(fields: dict[str, Any], source: str = CONFIG) -> HybridConfig:
    """The decoder that a ``config.json`` of one of the four families describes.

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
    read = {"mamba": _read_mamba, "mamba2": _read_mamba2, "jamba": _read_jamba}.get(model_type, _read_granite)
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


def _read_mamba2(known: dict[str, Any], fields: dict[str, Any]) -> HybridConfig:
    sizes = ("hidden_size", "state_size", "num_heads", "head_dim", "expand", "n_groups", "conv_kernel", "chunk_size")
    mamba2 = Mamba2Config(
        **{name: known[name] for name in (*sizes, "use_bias", "use_conv_bias", *_STEPS)},
        time_step_limit=_read_limit(known["time_step_limit"]),
        layer_norm_epsilon=known["layer_norm_epsilon"],
    )
    return HybridConfig(**_state_space_values(known, fields), mixers=("mamba2",), mamba2=mamba2)


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


def _read_granite(known: dict[str, Any], fields: dict[str, Any]) -> HybridConfig:
    types = known["layer_types"] or ["mamba"] * known["num_hidden_layers"]
    if unknown := [each for each in types if each not in _LAYER_TYPES]:
        raise ValueError(f"layer_types names {unknown[0]!r}, known are {', '.join(_LAYER_TYPES)}")
    if len(types) != known["num_hidden_layers"]:
        raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers={known['num_hidden_layers']}")
    mixers = [_LAYER_TYPES[each] for each in types]
    moe = mamba2 = None
    if known["num_local_experts"]:
        moe = MoEConfig(
            known["hidden_size"],
            known["intermediate_size"],
            known["num_local_experts"],
            known["num_experts_per_tok"],
            router_order="topk-then-softmax",
            initializer_range=known["initializer_range"],
        )
    if "mamba2" in mixers:
        heads, channels = _whole("mamba_n_heads", known["mamba_n_heads"]), known["mamba_expand"] * known["hidden_size"]
        head_dim = channels // heads if known["mamba_d_head"] == "auto" else known["mamba_d_head"]
        mamba2 = Mamba2Config(
            hidden_size=known["hidden_size"],
            state_size=known["mamba_d_state"],
            num_heads=heads,
            head_dim=head_dim,
            expand=known["mamba_expand"],
            n_groups=known["mamba_n_groups"],
            conv_kernel=known["mamba_d_conv"],
            chunk_size=known["mamba_chunk_size"],
            use_bias=known["mamba_proj_bias"],
            use_conv_bias=known["mamba_conv_bias"],
            time_step_limit=_read_limit(known["time_step_limit"]),
            layer_norm_epsilon=known["rms_norm_eps"],
        )
    shared = known["shared_intermediate_size"]
    return HybridConfig(
        **_decoder_values(known, fields, moe),
        intermediate_size=shared if moe is None else known["intermediate_size"],
        shared_intermediate_size=None if moe is None else shared,
        rope_theta=known["rope_theta"],
        mixers=_shortest(mixers),
        feed_forwards=("dense",) if moe is None else ("moe",),
        positions="rotary" if known["position_embedding_type"] == "rope" else "none",
        attention_multiplier=known["attention_multiplier"],
        **{name: known[name] for name in _UNSCALED},
        mamba2=mamba2,
    )


def _shortest(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these layers when it is repeated."""
    for length in range(1, len(kinds) + 1):
        if len(kinds) % length == 0 and kinds[:length] * (len(kinds) // length) == kinds:
            return tuple(kinds[:length])
    return tuple(kinds)
