"""The sizes and the layer pattern of a decoder whose mixers need not be attention."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from medarch.lm.config import DecoderConfig
from medarch.moe.config import MoEConfig
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba2_config import Mamba2Config

MIXERS = ("attention", "mamba", "mamba2")
FEED_FORWARDS = ("dense", "moe", "none")
POSITIONS = ("rotary", "none")


@dataclass(frozen=True)
class HybridConfig(DecoderConfig):
    """A decoder of attention and state space layers in any order; the fields of ``DecoderConfig`` and these.

    Without attention, ``num_attention_heads`` and ``rope_theta`` mean nothing, and without a dense feed-forward
    ``intermediate_size`` does not.

    Attributes:
        mixers: As in ``DecoderConfig``, with ``"mamba"`` and ``"mamba2"`` beside ``"attention"``.
        feed_forwards: ``"dense"``, ``"moe"`` or ``"none"``; Mamba's own models have none.
        mamba: Sizes of the Mamba mixers, where there are any.
        mamba2: Sizes of the Mamba-2 mixers, where there are any.
        positions: ``"rotary"``, or ``"none"`` where the state space layers alone tell the order, as in Jamba and
            Granite 4.
        shared_intermediate_size: Width of a dense feed-forward beside every mixture, which each token visits.
        embedding_multiplier: Embeddings are multiplied by it.
        residual_multiplier: What a mixer or feed-forward adds to the residual stream is multiplied by it.
        attention_multiplier: Scale of the attention scores; one over the root of the head's width where absent.
        logits_scaling: The logits are divided by it. These four are Granite's.
        residual_in_fp32: Whether the residual stream is kept in float32 in a model of half precision.

    Raises:
        ValueError: As ``DecoderConfig``, and if a mixer named in the pattern has no sizes or sizes of another width.
    """

    mamba: MambaConfig | None = None
    mamba2: Mamba2Config | None = None
    positions: str = "rotary"
    shared_intermediate_size: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    residual_in_fp32: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}")
        for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
            value = getattr(self, name)
            if value is None and name == "attention_multiplier":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive and finite number, got {value!r}")
        for name in ("tie_word_embeddings", "residual_in_fp32"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        shared = self.shared_intermediate_size
        if shared is not None:
            if not isinstance(shared, int) or isinstance(shared, bool) or shared < 1:
                raise ValueError(f"shared_intermediate_size must be a whole number of at least 1, got {shared!r}")
            if self.moe is None:
                raise ValueError(
                    f"shared_intermediate_size={shared} stands beside a mixture, but feed_forwards="
                    f"{self.feed_forwards} names no 'moe'"
                )
        for name in ("mamba", "mamba2"):
            self._check_mixer(name)

    def _check_mixer(self, name: str) -> None:
        sizes, wanted = getattr(self, name), name in self.mixers
        if wanted and sizes is None:
            raise ValueError(f"mixers names {name!r} but {name} is None: give its sizes, or choose another mixer")
        if sizes is not None and not wanted:
            raise ValueError(f"{name} is given but mixers={self.mixers} names no {name!r}: remove one")
        if sizes is not None and sizes.hidden_size != self.hidden_size:
            raise ValueError(f"{name}.hidden_size={sizes.hidden_size} differs from hidden_size={self.hidden_size}")

    def _check_heads(self) -> None:
        if "attention" not in self.mixers:
            return
        if self.positions == "rotary":
            super()._check_heads()
            return
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        assert shared is not None
        if self.hidden_size % heads or heads % shared:
            raise ValueError(
                f"num_attention_heads={heads} must divide hidden_size={self.hidden_size} and be a multiple of "
                f"num_key_value_heads={shared}"
            )

    def _check_pattern(self, name: str, known: tuple[str, ...]) -> None:
        # The parent knows attention alone.
        super()._check_pattern(name, MIXERS if name == "mixers" else FEED_FORWARDS)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: no bound is null, and Mamba-2 is left out where there is none."""
        fields = super().to_dict()
        if self.mamba2 is None:
            # So a run of a model without it goes on that was begun before there was Mamba-2.
            del fields["mamba2"]
            return fields
        for name in ("time_step_limit", "A_init_range"):
            bounds = getattr(self.mamba2, name)
            fields["mamba2"][name] = [bound if math.isfinite(bound) else None for bound in bounds]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> HybridConfig:
        """The configuration that ``to_dict`` wrote.

        Raises:
            ValueError: If a field is unknown or missing, or the values contradict one another.
        """
        kinds: dict[str, type] = {"moe": MoEConfig, "mamba": MambaConfig, "mamba2": Mamba2Config}
        try:
            if fields.get("mamba2") is not None:
                bounds = {
                    name: tuple(math.inf if bound is None else bound for bound in fields["mamba2"][name])
                    for name in ("time_step_limit", "A_init_range")
                    if name in fields["mamba2"]
                }
                fields = {**fields, "mamba2": fields["mamba2"] | bounds}
            made = {name: kind(**fields[name]) for name, kind in kinds.items() if fields.get(name) is not None}
            return cls(**{**fields, **made})
        except TypeError as error:
            raise ValueError(f"these fields do not describe a decoder: {error}") from error

    def change(self, **fields: Any) -> HybridConfig:
        """The configuration with some fields replaced."""
        return dataclasses.replace(self, **fields)
