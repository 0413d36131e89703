"""Router access tried on every mixture-of-experts family of transformers that can be built small."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.lm.expert_selection import record_selections
from medarch.lm.router_access import find_moe_blocks, router_weights
from medarch.moe.router import NO_EXPERT

NAME = "lm/router-access"
BATCH, TIME, DECODER_TIME = 2, 11, 7

# Whatever of these a family's configuration knows is set; the rest keeps its default.
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 12, "ffn_hidden_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "n_heads": 4,
    "n_layers": 3, "num_heads": 4, "d_model": 32, "d_ff": 24, "d_kv": 8, "kv_channels": 8, "num_layers": 3,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 3,
    "num_experts_per_token": 3, "top_k_experts": 3, "moe_top_k": 3, "moe_topk": 3, "moe_k": 3, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "decoder_sparse_step": 1,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12,
    "share_expert_dim": 12, "shared_experts_intermediate_size": 12, "expert_ffn_hidden_size": 12, "moe_hidden_size": 32,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "expert_capacity": 4, "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_sparse_step": 2, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4,
    "n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4,
    "router_hidden_size": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61,
}  # fmt: skip

_LATENT = {"num_key_value_heads": 4}  # latent attention has as many key as query heads
_SPARSE = ["dense", "sparse", "sparse"]
_LINEAR = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
# fmt: off
_PLAIN = [
    "afmoe", "aria", "cohere2_moe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling",
    "inkling2", "jetmoe", "kolibri1", "laguna", "llama4", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl", "mixtral", "nemotron_h", "nllb_moe", "olmoe", "qwen2_moe", "qwen3_moe", "solar_open",
    "switch_transformers",
]
# fmt: on
FAMILIES: dict[str, dict[str, Any]] = {family: {} for family in _PLAIN} | {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT | _LINEAR,
    "beam": {"mlp_layer_types": _SPARSE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 8, "moe_top_k": 3, "ffn_hidden_size": 24, "hidden_size": 32},
        "max_seq_len": 64,
    },
    "deepseek_ocr2": {"mlp_layer_types": _SPARSE},
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy", "topk_group": 1, "n_group": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "diffusion_gemma": {},
    "dots3_note": _LATENT | {"layer_types": ["indexed_attention"] * 3, "mlp_layer_types": _SPARSE},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [12, 12], "head_dim": 128},
    "gemma4": {"enable_moe_block": True},
    "glm4_moe_lite": _LATENT,
    "glm4v_moe": {"head_dim": 128},
    "glm5_next": _LATENT
    | {"index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0, "mlp_layer_types": _SPARSE}
    | _LINEAR,
    "glm_moe_dsa": _LATENT,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": _LATENT | _LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": _LATENT | {"zero_expert_num": 3},
    "mistral4": _LATENT,
    "mistral_large4": _LATENT,
    "muse_spark": {},
    "openai_privacy_filter": {},
    "phimoe": {"num_experts_per_tok": 2},  # its router takes two, whatever the configuration says
    "qwen3_5_moe": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen3_omni_moe": {},
    "qwen3_vl_moe": {},
    "qwen4_exp": _LINEAR
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"mlp_layer_types": _SPARSE, "sliding_window": 8},
    "unlimited_ocr": {},
    "zaya": {"num_experts_per_tok": 1},
}
"""What each family needs beyond ``SIZES``."""

OUTSIDE = {
    "doge": "its router scores halves of an expert's number (product keys) and is no matrix with a row an expert",
    "gemma4_unified": "it names router logits in its interface, but holds no experts of its own",
    "granite_docling": "its router chooses how densely a page is read, not an expert",
    "vitpose_backbone": "an image's data set is told to the model and chooses the expert; there is no router",
}
"""Families whose code speaks of experts or router logits and that are not understood, or need not be."""

_CLASSES = ("ForCausalLM", "ThinkerTextModel", "TextModel", "ForConditionalGeneration", "Model")


def model_class(family: str) -> type[Any]:
    """The class of transformers that reads text with this family's mixture of experts."""
    from transformers import PreTrainedModel

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, PreTrainedModel) and each.__module__ == module.__name__
    ]
    for ending in _CLASSES:
        for each in classes:
            if each.__name__.endswith(ending) and not each.__name__.endswith("PreTrainedModel"):
                return each
    raise ValueError(f"{module.__name__} defines no model that reads text")


def build_tiny(family: str, seed: int = 0) -> nn.Module:
    """A random model of a family, of a few thousand to a few million weights.

    Weights and the biases of selection are drawn wide, so that routers disagree and a bias changes decisions.

    Args:
        family: A name in ``FAMILIES``.
        seed: Of the weights.
    """
    cls = model_class(family)
    known = set(inspect.signature(cls.config_class.__init__).parameters) | set(cls.config_class.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = cls.config_class(**(sizes | FAMILIES[family]))
    config._experts_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > 5_000_000:
        raise ValueError(
            f"{cls.__name__} comes to {size:,} weights: it is not small, so its configuration lacks something"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_matrix = tensor.is_floating_point() and tensor.dim() > 1
        if is_matrix or name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.data.normal_(std=0.3, generator=generator)
        elif name.endswith("tid2eid"):
            tensor.data.copy_(torch.rand(len(tensor), 8, generator=generator).argsort(-1)[:, : tensor.shape[1]])
    return model


def inputs_for(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Random tokens that the model can be called with."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 61, (BATCH, TIME), generator=generator)}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = torch.randint(3, 61, (BATCH, DECODER_TIME), generator=generator)
    return inputs


class WorkCounter(TorchFunctionMode):
    """Counts the tokens that each expert multiplies its first matrix with, whoever told it to.

    This is what the recorder is held to. It watches the matrix products themselves, and knows an expert by the
    memory that its weights lie in.

    Attributes:
        rows: For each layer the tokens of each expert.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: dict[str, list[int]] = {}
        self._stacks: dict[int, tuple[str, int]] = {}
        self._singles: dict[int, tuple[str, int]] = {}
        for name, block in find_moe_blocks(model).items():
            self.rows[name] = [0] * block.num_experts
            holder = block.experts
            if holder is None or not any(True for _ in holder.parameters()):
                holder = model.get_submodule(name)
            stacked = next((p for p in holder.parameters() if p.dim() == 3), None)
            if stacked is not None:
                self._stacks[stacked.untyped_storage().data_ptr()] = (name, stacked.stride(0))
                continue
            if len(list(holder.children())) == 1:  # DBRX lays the experts below one another in one matrix
                tall = next(holder.parameters())
                self._stacks[tall.untyped_storage().data_ptr()] = (name, tall.numel() // block.num_experts)
                continue
            for expert, module in enumerate(holder.children()):
                first = next((p for p in module.parameters() if p.dim() == 2), None)
                if first is not None:
                    self._singles[first.data_ptr()] = (name, expert)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"linear", "matmul", "__matmul__", "mm", "bmm"} and len(args) > 1 and torch.is_tensor(args[1]):
            tokens, weight = args[0], args[1]
            key = weight.untyped_storage().data_ptr()
            if weight.dim() == 2 and key in self._stacks:
                layer, stride = self._stacks[key]
                self.rows[layer][weight.storage_offset() // stride] += tokens.shape[0]
            elif weight.data_ptr() in self._singles:
                layer, expert = self._singles[weight.data_ptr()]
                self.rows[layer][expert] += tokens.numel() // tokens.shape[-1]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class FamilyCheck:
    """What was found about one family.

    Attributes:
        model: The class that was built.
        layers: Mixture-of-experts layers found, and of how many.
        num_experts: Experts that a router chooses from.
        num_experts_per_tok: Experts a token.
        router: Shape of a router's matrix, or None where it is no single matrix.
        logits_equal: Whether the recorded logits are the ``router_logits`` that the model itself returns, or
            None where it returns none.
        counts_equal_work: Whether each expert multiplied as many tokens as were counted for it, or None where
            the experts' work does not tell them apart.
        top_k_of_logits: Share of tokens for which the k largest logits would have named the same experts.
    """

    model: str
    layers: int
    num_experts: int
    num_experts_per_tok: int
    router: list[int] | None
    logits_equal: bool | None
    counts_equal_work: bool | None
    top_k_of_logits: float


def check_family(family: str) -> FamilyCheck:
    """Finds a small model's routers, records their decisions, and holds both to what the model did.

    Raises:
        ValueError: If the family's routers are not found or its decisions cannot be recorded.
    """
    model = build_tiny(family)
    inputs = inputs_for(model)
    work = WorkCounter(model)
    with torch.no_grad(), record_selections(model) as recorder, work:
        output = model(**inputs, **_wants_logits(model))
    try:
        shape: list[int] | None = list(next(iter(router_weights(model).values())).weight.shape)
    except ValueError:
        shape = None
    first = next(iter(recorder.blocks.values()))
    counts = {name: each.sum(0).tolist() for name, each in recorder.counts().items()}
    for name, block in recorder.called.items():  # LongCat's last experts hand the token back and multiply nothing
        for expert in range(getattr(block.experts, "num_routed_experts", block.num_experts), block.num_experts):
            work.rows[name][expert] = counts[name][expert]
    # Llama 4 sends every token through every expert in one product, most of them as zeros.
    seen = any(sum(rows) for rows in work.rows.values())
    return FamilyCheck(
        model=type(model).__name__,
        layers=len(recorder.blocks),
        num_experts=first.num_experts,
        num_experts_per_tok=first.num_experts_per_tok,
        router=shape,
        logits_equal=_logits_equal(recorder, output),
        counts_equal_work=counts == {name: work.rows[name] for name in counts} if seen else None,
        top_k_of_logits=_share_by_top_k(recorder),
    )


def _wants_logits(model: nn.Module) -> dict[str, bool]:
    known = getattr(model, "_can_record_outputs", None) or {}
    inner = [getattr(each, "_can_record_outputs", None) or {} for each in model.modules()]
    return {"output_router_logits": True} if any("router_logits" in each for each in (known, *inner)) else {}


def _logits_equal(recorder: Any, output: Any) -> bool | None:
    theirs = [
        each
        for name in ("encoder_router_logits", "decoder_router_logits", "router_logits")
        for each in (output.get(name) or ())
    ]
    if not theirs:
        return None
    ours = [recorder.logits(name) for name in recorder.called]
    # A model may list a layer more than once (JetMoE) or leave out routers without learned scores (DeepSeek-V4).
    flat = [each.reshape(-1, each.shape[-1]) for each in ours]
    return all(
        any(
            mine.shape == (each := other.reshape(-1, other.shape[-1])).shape and torch.equal(mine, each)
            for mine in flat
        )
        for other in theirs
    )


def _share_by_top_k(recorder: Any) -> float:
    same = []
    for name, block in recorder.called.items():
        indices, logits = recorder.indices(name).flatten(0, 1), recorder.logits(name).flatten(0, 1)
        largest = logits.topk(block.num_experts_per_tok, dim=-1).indices
        kept = indices.sort(-1).values
        if kept.shape == largest.shape:
            same.append((kept == largest.sort(-1).values).all(-1) & (kept != NO_EXPERT).all(-1))
    return float(torch.cat(same).double().mean()) if same else 0.0


def families_in_transformers() -> list[str]:
    """The families of the installed transformers whose code holds experts or returns router logits, by reading it."""
    import transformers.models

    found = []
    for info in pkgutil.iter_modules(transformers.models.__path__):
        package = next(iter(transformers.models.__path__))
        try:
            with open(f"{package}/{info.name}/modeling_{info.name}.py", encoding="utf8") as handle:
                source = handle.read()
        except FileNotFoundError:
            continue
        if "self.experts = " in source or "router_logits" in source:
            found.append(info.name)
    return sorted(found)


@benchmark(NAME, modules=["medarch.lm.router_access", "medarch.lm.expert_selection", "medarch.lm.study_routers"])
def router_access(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Routers found and decisions recorded in a small random model of each mixture-of-experts family of transformers.

    Args:
        device: Not used; the models are tiny.
        quick: Whether to try four families only.

    Returns:
        For each family what ``check_family`` found, or why it could not be done.
    """
    from transformers import __version__
    from transformers.utils import logging

    logging.set_verbosity_error()
    listed = families_in_transformers()
    parts = Partials(find(NAME), device, quick)
    checked: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for family in ["mixtral", "deepseek_v3", "switch_transformers", "jamba"] if quick else listed:
        result = parts.get(family, partial(_try, family))
        if "refused" in result:
            refused[family] = result["refused"]
        else:
            checked[family] = result
    return {"transformers": __version__, "families": checked, "refused": refused, "listed": len(listed)}


def _try(family: str) -> dict[str, Any]:
    if family not in FAMILIES:
        return {"refused": OUTSIDE.get(family, "no small configuration has been written for it")}
    try:
        return asdict(check_family(family))
    except Exception as error:  # whatever stops a family is what the record is to say of it
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
