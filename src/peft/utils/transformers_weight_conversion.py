"""The path under which transformers looks for its hook into adapter loading."""

from __future__ import annotations

from typing import Any

from peft.integrations.transformers import build_peft_weight_mapping as build_peft_weight_mapping


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: list[Any] | None) -> None:
    """Targets are matched against the model as it is, so there is nothing to convert."""


def get_model_conversion_mapping(model: Any) -> Any:
    """transformers' own table of renamed and fused weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping as get

    return get(model)
