"""Between our decoder and transformers: one checkpoint on disk that both of them open.

A decoder whose feed-forwards are all dense is a Llama, and one whose feed-forwards are all mixtures is a Mixtral.
Their checkpoints are written and read here without transformers, in the names that published checkpoints of the
two families bear; importing transformers alone takes longer than loading one of our models. The families with state
space layers are in ``medarch.lm.hybrid_families`` and ``medarch.lm.hybrid_bridge``, and the functions here call those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from medarch.lm import hybrid_bridge, hybrid_families
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder, DecoderLayer
from medarch.lm.families import REQUIRED, Family, check_kinds, rope_theta
from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.weight_files import CONFIG, fill_weights, read_json, read_tensor, stored_names, write_checkpoint
from medarch.moe.config import MoEConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer
from medarch.moe.router import TopKRouter

if TYPE_CHECKING:
    from medarch.lm.tokenizer import Tokenizer

MAX_FILE_BYTES = 8_000_000

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
        },
        {**REQUIRED, "attention_bias": False, "mlp_bias": False},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        {**REQUIRED, "sliding_window": None, "router_jitter_noise": 0.0},
    ),
}
"""The families without state spaces by ``model_type``, with transformers' own defaults."""

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)


def to_transformers_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of ``config.json`` that describe this decoder to transformers 5.

    What decides the function is carried over, and the coefficients of the routers' losses; ``router_z_loss_coef``
    is a field of our own, which transformers keeps and does not use.

    Raises:
        ValueError: If transformers has no such decoder; the message names the field.
    """
    if isinstance(config, HybridConfig):
        return hybrid_families.to_transformers_config(config)
    kinds = set(config.feed_forwards)
    if set(config.mixers) != {"attention"} or len(kinds) > 1:
        raise ValueError(
            f"mixers={config.mixers} with feed_forwards={config.feed_forwards} is neither Llama (attention, all "
            "dense) nor Mixtral (attention, all moe): transformers has no such model; keep it in a folder of ours"
        )
    model_type = "llama" if kinds == {"dense"} else "mixtral"
    fields: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    fields |= FAMILIES[model_type].required | {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "head_dim": config.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "use_cache": True,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    del fields["quantization_config"]
    if config.moe is not None:
        fields |= _expert_fields(config, config.moe)
    return fields


def _expert_fields(config: DecoderConfig, moe: MoEConfig) -> dict[str, Any]:
    if moe.hidden_act != "silu" or not moe.norm_topk_prob or moe.router_bias:
        raise ValueError(
            "Mixtral has SwiGLU experts, renormalised weights and no router bias, but moe has hidden_act="
            f"{moe.hidden_act!r}, norm_topk_prob={moe.norm_topk_prob}, router_bias={moe.router_bias}"
        )
    fields: dict[str, Any] = {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": False,
    }
    if config.router_z_loss_coef:
        fields["router_z_loss_coef"] = config.router_z_loss_coef
    return fields


def from_transformers_config(fields: dict[str, Any], source: str = CONFIG) -> DecoderConfig:
    """The decoder that a ``config.json`` of transformers describes.

    The rotary base is read from ``rope_parameters``, where transformers 5 puts it, or from ``rope_theta``, where
    earlier versions did. In a Mixtral the experts' width stands as ``intermediate_size`` of the decoder too.

    Args:
        fields: Content of the file.
        source: What to call it in an error.

    Raises:
        ValueError: If the family is unknown or a field asks for what the decoder does not do; the message
            names the field and its value.
    """
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in hybrid_families.FAMILIES:
        return hybrid_families.from_transformers_config(fields, source)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        families = ", ".join((*FAMILIES, *hybrid_families.FAMILIES))
        raise ValueError(
            f"{source}: model_type={model_type!r} is not one of {families}, which the decoder can be: load it with "
            "library='transformers'"
        )
    if "auto_map" in fields:
        raise ValueError(f"{source}: auto_map={fields['auto_map']} asks for code from the checkpoint, which is not run")
    family = FAMILIES[model_type]
    for name, wanted in family.required.items():
        if fields.get(name, wanted) != wanted:
            raise ValueError(
                f"{source}: {name}={fields[name]!r}, but the decoder has {name}={wanted!r} only: load it with "
                "library='transformers'"
            )
    known = family.defaults | {name: value for name, value in fields.items() if name in family.defaults}
    known["rope_theta"] = rope_theta(fields, known["rope_theta"], source)
    check_kinds(known, family.defaults, source)
    heads = known["num_attention_heads"]
    head_dim = fields.get("head_dim")
    if head_dim is not None and head_dim * heads != known["hidden_size"]:
        raise ValueError(
            f"{source}: head_dim={head_dim} times num_attention_heads={heads} is not hidden_size="
            f"{known['hidden_size']}, as the decoder needs it: load it with library='transformers'"
        )
    try:
        return _decoder_config(model_type, known, fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _decoder_config(model_type: str, known: dict[str, Any], fields: dict[str, Any]) -> DecoderConfig:
    values = {name: known[name] for name in (*_SHARED, "rope_theta")}
    if model_type == "llama":
        return DecoderConfig(**values)
    moe = MoEConfig(
        known["hidden_size"],
        known["intermediate_size"],
        known["num_local_experts"],
        known["num_experts_per_tok"],
        initializer_range=known["initializer_range"],
    )
    return DecoderConfig(
        **values,
        feed_forwards=("moe",),
        moe=moe,
        router_aux_loss_coef=known["router_aux_loss_coef"],
        router_z_loss_coef=fields.get("router_z_loss_coef", 0.0),
    )


def weight_views(model: Decoder, fused: bool = False) -> dict[str, Tensor]:
    """Our weights under the names that they bear in a checkpoint, as views: read them to save, fill them to load.

    Where we keep gate and up-projection in one matrix, or all experts in one stack, each stored tensor is a part
    of ours.

    Args:
        model: A decoder of a family that transformers has.
        fused: Whether the experts are stored stacked, as transformers 5 holds them in memory, and not one by
            one, as published checkpoints have them and ``save_pretrained`` of transformers writes them.

    Raises:
        ValueError: If a router is not the plain one.
    """
    if isinstance(model, HybridDecoder):
        return hybrid_bridge.weight_views(model, fused)
    views = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    if not model.config.tie_word_embeddings:
        views["lm_head.weight"] = model.lm_head
    for index, layer in enumerate(cast(Iterable[DecoderLayer], model.layers)):
        stored = f"model.layers.{index}"
        views[f"{stored}.input_layernorm.weight"] = layer.mixer_norm.weight
        views[f"{stored}.post_attention_layernorm.weight"] = layer.feed_forward_norm.weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            views[f"{stored}.self_attn.{name}.weight"] = getattr(layer.mixer, name)
        if isinstance(layer.feed_forward, DenseMLP):
            gate, up = layer.feed_forward.up_proj.detach().chunk(2)
            views[f"{stored}.mlp.gate_proj.weight"] = gate
            views[f"{stored}.mlp.up_proj.weight"] = up
            views[f"{stored}.mlp.down_proj.weight"] = layer.feed_forward.down_proj
        else:
            views |= _expert_views(layer.feed_forward, stored, fused)
    return {name: tensor.detach() for name, tensor in views.items()}


def _expert_views(layer: MoELayer, stored: str, fused: bool) -> dict[str, Tensor]:
    # A router of another kind, even a subclass, would decide otherwise than Mixtral's.
    if type(layer.router) is not TopKRouter:
        raise ValueError(f"the router of {stored} is a {type(layer.router).__name__}, and Mixtral's is a TopKRouter")
    experts = layer.experts
    if fused:
        return {
            f"{stored}.mlp.gate.weight": layer.router.weight,
            f"{stored}.mlp.experts.gate_up_proj": experts.gate_up_proj,
            f"{stored}.mlp.experts.down_proj": experts.down_proj,
        }
    views: dict[str, Tensor] = {f"{stored}.block_sparse_moe.gate.weight": layer.router.weight}
    for number, (gate_up, down) in enumerate(zip(experts.gate_up_proj.detach(), experts.down_proj, strict=True)):
        expert = f"{stored}.block_sparse_moe.experts.{number}"
        views[f"{expert}.w1.weight"], views[f"{expert}.w3.weight"] = gate_up.chunk(2)
        views[f"{expert}.w2.weight"] = down
    return views


def save_pretrained(
    model: Decoder,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a checkpoint that ``AutoModelForCausalLM`` and ``AutoTokenizer`` of transformers open.

    Args:
        model: A decoder of a family that transformers has.
        tokenizer: Its tokenizer, saved beside it; without one there is nothing for ``AutoTokenizer``.
        folder: Where; files of an earlier checkpoint in it are replaced.
        dtype: Type of the stored weights; rounding to it is the only change they undergo.
        max_file_bytes: Where the weights exceed it, they are written in several files with an index.

    Raises:
        ValueError: If transformers has no such model, or the tokenizer knows more tokens than the model.
    """
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has vocab_size={model.config.vocab_size}: they "
            "do not belong together"
        )
    fields = to_transformers_config(model.config) | {
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": None if tokenizer is None else tokenizer.end_of_text,
    }
    weights = {name: view.to(dtype) for name, view in weight_views(model).items()}
    write_checkpoint(Path(folder), fields, weights, max_file_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)


def from_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Tokenizer]:
    """The decoder and the tokenizer of a folder that holds a model of a known family, ours or another's.

    For a checkpoint by its name, see ``medarch.lm.loading.load``.

    Raises:
        ValueError: If a file is missing or damaged, a tensor does not fit, or the model is of another kind.
    """
    from medarch.lm.pretrained_tokenizer import load_tokenizer

    folder = Path(folder)
    tokenizer = load_tokenizer(folder, read_json(folder / CONFIG))
    return load_decoder(folder, dtype), tokenizer


def load_decoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of ``from_pretrained`` alone, for a folder that may have no tokenizer."""
    folder = Path(folder)
    config = from_transformers_config(read_json(folder / CONFIG), str(folder / CONFIG))
    # On the meta device nothing is allocated and no random number drawn for weights that are replaced at once.
    with torch.device("meta"):
        model = HybridDecoder(config) if isinstance(config, HybridConfig) else Decoder(config)
    model = model.to(dtype).to_empty(device="cpu")
    stored = stored_names(folder)
    views = weight_views(model, any(name.endswith(".experts.gate_up_proj") for name in stored))
    embedding = next(name for name, view in views.items() if view.data_ptr() == model.embed_tokens.weight.data_ptr())
    if (older := embedding.replace("embeddings", "embedding")) in stored and embedding not in stored:
        views[older] = views.pop(embedding)  # as the first conversions of Mamba have it
        embedding = older
    fill_weights(folder, views, _may_be_left(folder, model, embedding))
    return model.eval()


def _may_be_left(folder: Path, model: Decoder, embedding: str) -> Callable[[str], bool]:
    """Two tensors that checkpoints hold beside the weights: old rotary tables, and a tied head written out."""

    def left(name: str) -> bool:
        if name.endswith(".rotary_emb.inv_freq"):
            return True
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            return False
        head, table = read_tensor(folder, name), read_tensor(folder, embedding)
        if head is None or table is None or not torch.equal(head, table):
            raise ValueError(
                f"{folder}: lm_head.weight differs from {embedding}, but {CONFIG} has tie_word_embeddings=true: set it "
                "to false"
            )
        return True

    return left
