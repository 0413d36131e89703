"""What is common to the families of transformers' models that our decoders can be, however they are configured."""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """One of transformers' model families that the decoder can be.

    Attributes:
        architecture: The class that ``AutoModelForCausalLM`` chooses.
        defaults: What a field has where ``config.json`` leaves it out.
        required: What a field must have for the decoder to compute the same.
    """

    architecture: str
    defaults: dict[str, Any]
    required: dict[str, Any]


REQUIRED = {"hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None}
"""What every one of them must have."""


def rope_theta(fields: dict[str, Any], default: float, source: str) -> float:
    """The rotary base of a ``config.json``, from where transformers 5 puts it or from where earlier versions did.

    Raises:
        ValueError: If the rotary positions are scaled or shortened, which our attention does not do.
    """
    parameters = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    for name, rotary in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(rotary, dict):
            raise ValueError(f"{source}: {name}={rotary!r} must be an object of fields: copy the file anew")
        kind = rotary.get("rope_type", rotary.get("type", "default"))
        if kind != "default" or rotary.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"{source}: {name}={rotary} scales or shortens the rotary positions, which the decoder does not: "
                "load it with library='transformers'"
            )
    theta = parameters.get("rope_theta", fields.get("rope_theta", default))
    return float(theta) if isinstance(theta, int) and not isinstance(theta, bool) else theta


def check_kinds(known: dict[str, Any], defaults: dict[str, Any], source: str) -> None:
    """Refuses text or null where a field holds a number, and anything but true or false where it holds that.

    Whole numbers are left to ``DecoderConfig``, which checks them itself.
    """
    for name, default in defaults.items():
        value = known[name]
        is_truth = isinstance(value, bool)
        if isinstance(default, bool) and not is_truth:
            raise ValueError(f"{source}: {name}={value!r} must be true or false: copy the file anew")
        if isinstance(default, float) and (is_truth or not isinstance(value, int | float)):
            raise ValueError(f"{source}: {name}={value!r} must be a number: copy the file anew")
