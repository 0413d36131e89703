"""Published mixtures of experts, built on the meta device from their own configurations, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A published model.

    Attributes:
        name: As it is known.
        model_type: The class of transformers that builds it.
        config: The sizes of its ``config.json``; what has no bearing on a count is left out.
        source: Where that file was read.
        total: Parameters in billions as its authors print them, None where they print none.
        active: Parameters for one token in billions, likewise.
        cited: Entry of the bibliography that prints the two.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(repr=False)
    source: str = field(repr=False)
    total: str | None
    active: str | None
    cited: str


_DEEPSEEK_16B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
    "tie_word_embeddings": False,
}
_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_SWITCH: dict[str, Any] = {"d_kv": 64, "vocab_size": 32128, "is_gated_act": False, "feed_forward_proj": "relu"}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="Switch-Base-8",
            model_type="switch_transformers",
            config=_SWITCH
            | {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12}
            | {"num_experts": 8, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6},
            source="huggingface.co/google/switch-base-8, config.json",
            total=None,  # the paper has other numbers of experts; the checkpoint is a file of 1.24 GB in bfloat16
            active=None,
            cited="fedus2022switch",
        ),
        # The config.json of google/switch-c-2048 gives the decoder 12 layers and 15 sparse ones; the authors' own
        # configuration gives it 15, with which the count is the paper's.
        Family(
            name="Switch-C",
            model_type="switch_transformers",
            config=_SWITCH
            | {"d_model": 2080, "d_ff": 6144, "num_heads": 30, "num_layers": 15, "num_decoder_layers": 15}
            | {"num_experts": 2048, "num_sparse_encoder_layers": 15, "num_sparse_decoder_layers": 15},
            source="github.com/google/flaxformer, t5x/configs/moe/models/switch_c.gin",
            total="1571",
            active=None,
            cited="fedus2022switch",
        ),
        Family(
            name="Mixtral 8x7B",
            model_type="mixtral",
            config={
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "vocab_size": 32000,
                "tie_word_embeddings": False,
                "max_position_embeddings": 32768,
            },
            source="huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1, config.json",
            total="47",
            active="13",
            cited="jiang2024mixtral",
        ),
        # Its own code does not import with transformers 5. Glm4Moe has the same parts: plain multi-head attention, a
        # dense first layer, shared and routed experts. It differs in the router's function, not in a single shape.
        Family(
            name="DeepSeekMoE-16B",
            model_type="glm4_moe",
            config=_DEEPSEEK_16B
            | {"num_hidden_layers": 28, "head_dim": 128, "attention_bias": False, "use_qk_norm": False}
            | {"max_position_embeddings": 4096},
            source="huggingface.co/deepseek-ai/deepseek-moe-16b-chat, config.json",
            total="16.4",
            active="2.8",
            cited="dai2024deepseekmoe",
        ),
        Family(
            name="DeepSeek-V2-Lite",
            model_type="deepseek_v2",
            config=_DEEPSEEK_16B | _LATENT | {"num_hidden_layers": 27, "q_lora_rank": None},
            source="huggingface.co/deepseek-ai/DeepSeek-V2-Lite, config.json, as its quantised copies repeat it",
            total="15.7",
            active="2.4",
            cited="deepseek2024v2",
        ),
        Family(
            name="DeepSeek-V3",
            model_type="deepseek_v3",
            config=_LATENT
            | {"q_lora_rank": 1536, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048}
            | {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128}
            | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3}
            | {"n_group": 8, "topk_group": 4, "vocab_size": 129280, "tie_word_embeddings": False},
            source="huggingface.co/deepseek-ai/DeepSeek-V3-Base, inference/configs/config_671B.json",
            total="671",
            active="37",
            cited="deepseek2024v3",
        ),
        Family(
            name="Qwen1.5-MoE-A2.7B",
            model_type="qwen2_moe",
            config={
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "vocab_size": 151936,
                "tie_word_embeddings": False,
            },
            source="huggingface.co/Qwen/Qwen1.5-MoE-A2.7B, config.json",
            total="14.3",
            active="2.7",
            cited="qwen2024moe",
        ),
        Family(
            name="Qwen2-57B-A14B",
            model_type="qwen2_moe",
            config={
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "moe_intermediate_size": 2560,
                "shared_expert_intermediate_size": 20480,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "vocab_size": 151936,
                "tie_word_embeddings": False,
            },
            source="huggingface.co/Qwen/Qwen2-57B-A14B, config.json",
            total="57",
            active="14",
            cited="yang2024qwen2",
        ),
        Family(
            name="OLMoE-1B-7B",
            model_type="olmoe",
            config={
                "hidden_size": 2048,
                "intermediate_size": 1024,
                "num_hidden_layers": 16,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "vocab_size": 50304,
                "tie_word_embeddings": False,
            },
            source="huggingface.co/allenai/OLMoE-1B-7B-0924, config.json",
            total="6.9",
            active="1.3",
            cited="muennighoff2024olmoe",
        ),
        Family(
            name="Jamba-v0.1",
            model_type="jamba",
            config={
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_experts": 16,
                "num_experts_per_tok": 2,
                "vocab_size": 65536,
                "tie_word_embeddings": False,
                "attn_layer_period": 8,
                "attn_layer_offset": 4,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "mamba_d_state": 16,
                "mamba_d_conv": 4,
                "mamba_expand": 2,
                "mamba_dt_rank": 256,
                "mamba_conv_bias": True,
                "mamba_proj_bias": False,
            },
            source="huggingface.co/ai21labs/Jamba-v0.1, config.json",
            total="52",
            active="12",
            cited="lieber2024jamba",
        ),
    )
}


@dataclass(frozen=True)
class ModelCount:
    """Parameters of a whole model, in numbers.

    Attributes:
        total: All of them; this is what has to be in memory.
        routed: Those of the experts among which a router chooses.
        shared: Those of experts that serve every token, with their gates.
        router: Those of the routers.
        embedding: Those of the input embedding, of which a token reads one row; an untied output projection is not
            among them.
        active: What serves one token: all but the experts that were not chosen. The embedding counts in full, as
            publications mostly have it.
        experts: Routed experts of a layer, E.
        chosen: Routed experts that a token is sent to, k.
        flops: Forward operations for one token, two for each weight of a matrix that it meets. What attention does with
            the tokens before it comes on top and grows with their number.
    """

    total: int
    routed: int
    shared: int
    router: int
    embedding: int
    active: int
    experts: int
    chosen: int
    flops: int

    def bytes(self, bits: float) -> float:
        """Bytes of all weights at so many bits each."""
        return self.total * bits / 8


def configuration(family: Family, **changes: Any) -> PreTrainedConfig:
    """The family's configuration in transformers, with some sizes changed for a smaller copy."""
    from transformers import CONFIG_MAPPING

    config: PreTrainedConfig = CONFIG_MAPPING[family.model_type](**{**family.config, **changes})
    return config


def build(config: PreTrainedConfig, device: str = "meta") -> PreTrainedModel:
    """The model of a configuration; on the meta device it has shapes and takes no memory."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(device):
        model: PreTrainedModel = kind.from_config(config)
    return model


def count_family(family: Family) -> ModelCount:
    """Counts a published model.

    In transformers, Switch has a module for each expert, of which Switch-C would need sixty thousand. Its experts are
    counted in a copy with two in each layer, and multiplied.
    """
    if family.model_type != "switch_transformers":
        return count_model(build(configuration(family)))
    few, more = (count_model(build(configuration(family, num_experts=number))) for number in (2, 3))
    more_experts = int(family.config["num_experts"]) - few.experts
    routed = few.routed + more_experts * (more.routed - few.routed)
    router = few.router + more_experts * (more.router - few.router)
    return ModelCount(
        total=few.total - few.routed - few.router + routed + router,
        routed=routed,
        shared=few.shared,
        router=router,
        embedding=few.embedding,
        active=few.active - few.router + router,
        experts=few.experts + more_experts,
        chosen=few.chosen,
        flops=few.flops + 2 * (router - few.router),
    )


def count_model(model: nn.Module) -> ModelCount:
    """Counts any mixture of experts of transformers.

    An encoder-decoder is counted as a whole: one token that is read and one that is written.

    Args:
        model: On any device.

    Raises:
        ValueError: If the configuration does not say how many experts there are, or the model has none.
    """
    config: Any = model.config
    experts, chosen = experts_of(config)
    lookup = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    sums = dict.fromkeys(("total", "routed", "shared", "router", "embedding", "matrices"), 0)
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        sums["total"] += size
        if ".experts." in name:
            sums["routed"] += size
        elif "shared_expert" in name:
            sums["shared"] += size
        elif is_router(name):
            sums["router"] += size
        if id(parameter) in lookup:
            # Embeddings of relative positions are no embeddings of tokens.
            sums["embedding"] += size if lookup[id(parameter)].num_embeddings == config.vocab_size else 0
        elif ".experts." not in name and parameter.dim() >= 2 and not name.endswith("A_log"):
            sums["matrices"] += size
    if not sums["routed"]:
        raise ValueError(f"{type(model).__name__} has no parameter of routed experts")
    if id(head) in lookup:
        sums["matrices"] += head.numel()  # tied: looked up at the beginning, multiplied with at the end
    used = sums["routed"] * chosen // experts
    return ModelCount(
        total=sums["total"],
        routed=sums["routed"],
        shared=sums["shared"],
        router=sums["router"],
        embedding=sums["embedding"],
        active=sums["total"] - sums["routed"] + used,
        experts=experts,
        chosen=chosen,
        flops=2 * (sums["matrices"] + used),
    )


def is_router(name: str) -> bool:
    """Whether a parameter of that name is a router's; gates within an expert and of a shared one are not."""
    *_, module, kind = name.split(".")
    return (module in ("gate", "router") and kind == "weight") or ".router." in name


def experts_of(config: Any) -> tuple[int, int]:
    """Experts of a layer and how many a token is sent to, whatever the configuration calls them.

    Raises:
        ValueError: If no known name is there.
    """
    for name in ("num_local_experts", "n_routed_experts", "num_experts"):
        if (experts := getattr(config, name, None)) is not None:
            chosen = 1 if config.model_type == "switch_transformers" else config.num_experts_per_tok
            return int(experts), int(chosen)
    raise ValueError(f"the configuration of {config.model_type} names no number of experts")


def cache_per_token(config: Any) -> int:
    """Numbers that a decoder keeps of each token it has seen, for all layers together.

    Attention keeps a key and a value for each of its key-value heads. DeepSeek's latent attention keeps the compressed
    vector that they are computed from and the rotated part of the key (DeepSeek-AI 2024, arXiv:2405.04434, section
    2.1). A Mamba layer keeps nothing of a single token; see ``state_size``. Of Switch, what is counted is the
    decoder's attention to itself.

    Args:
        config: Of transformers.
    """
    if config.model_type == "switch_transformers":
        return int(2 * config.num_decoder_layers * config.num_heads * config.d_kv)
    layers = config.num_hidden_layers
    if config.model_type == "jamba":
        layers = sum(kind == "attention" for kind in config.layers_block_type)
    if getattr(config, "kv_lora_rank", None):
        return int(layers * (config.kv_lora_rank + config.qk_rope_head_dim))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * layers * config.num_key_value_heads * head_dim)


def state_size(config: Any) -> int:
    """Numbers that a decoder keeps of a sequence, however long it is: the states of Mamba layers."""
    if config.model_type != "jamba":
        return 0
    layers = sum(kind == "mamba" for kind in config.layers_block_type)
    inner = config.mamba_expand * config.hidden_size
    return int(layers * inner * (config.mamba_d_state + config.mamba_d_conv))
