"""Constants of HF PEFT that other libraries read: default targets by architecture, file names."""

from __future__ import annotations

from typing import Any

from peft import targets
from peft.config import CONFIG_NAME as CONFIG_NAME
from peft.model import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peft.model import WEIGHTS_NAME as WEIGHTS_NAME
from peft.prompts._tools import bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value

DUMMY_TARGET_MODULES = targets.DUMMY
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
INCLUDE_LINEAR_LAYERS_SHORTHAND = targets.ALL_LINEAR
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_SPELLED = {"LNTUNING": "LN_TUNING"}


def __getattr__(name: str) -> Any:
    """`TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`, for every method."""
    head, tail = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"
    if name == f"{head}IA3_FEEDFORWARD_MODULES_MAPPING":
        return targets.feedforward_table()
    if name == f"{head}PREFIX_TUNING_POSTPROCESS_MAPPING":
        return {"bloom": bloom_model_postprocess_past_key_value}
    if name.startswith(head) and name.endswith(tail):
        kind = name[len(head) : -len(tail)]
        return targets.default_table(_SPELLED.get(kind, kind))
    raise AttributeError(f"module 'peft.utils.constants' has no attribute {name!r}")
