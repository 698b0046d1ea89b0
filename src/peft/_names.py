"""Where each public name lives. Methods are not listed: their names follow from their files."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

from peft import registry
from peft.errors import nearest

_HOMES: dict[str, str] = {
    "peft.errors": "PeftError PeftWarning NoMatchingPeftModuleError",
    "peft.config": "PeftConfig PeftType PromptLearningConfig TaskType get_peft_config",
    "peft.model": "PeftModel",
    "peft.tasks": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModelForCausalLM PeftModelForFeatureExtraction "
        "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
        "PeftModelForTokenClassification"
    ),
    "peft.mixed_model": "PeftMixedModel",
    "peft.mapping_func": "get_peft_model inject_adapter_in_model",
    "peft.mapping": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING",
    "peft.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
        "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"
    ),
    "peft.status": "get_layer_status get_model_status",
    "peft.checkpoint.state": "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict",
    "peft.integrations": "prepare_model_for_kbit_training",
    "peft.utils.other": "cast_mixed_precision_params shift_tokens_right",
    "peft.utils.base_model": "get_base_model_state_dict set_base_model_state_dict",
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "peft.methods.lora.config": (
        "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig "
        "MontecloraConfig VeloraConfig"
    ),
    "peft.prompts.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "peft.prompts.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "peft.prompts.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "peft.prompts.multitask_prompt_tuning": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "peft.prompts.cpt": "CPTConfig CPTEmbedding",
    "peft.prompts.cartridge": "CartridgeConfig CartridgeEncoder",
    "peft.prompts._tools": (
        "bloom_model_postprocess_past_key_value compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
        "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values"
    ),
    "peft.combine.convert": "convert_to_lora save_as_lora",
    "peft.combine.files": "combine_files",
    "peft.planning": "plan",
    "peft.training_state": "load_training_state save_training_state",
    "peft.verify": "verify_merge",
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names.split()}
_METHOD_NAME = re.compile(r"([A-Za-z0-9]+?)(Config|Model)")


def find(name: str) -> Any:
    """The public object of that name.

    Raises:
        AttributeError: there is none; says which is nearest.
    """
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    found = _METHOD_NAME.fullmatch(name)
    if found is not None:
        kind = _peft_type(found.group(1))
        if kind is not None:
            return _of_method(kind, name)
    module = submodule("peft", name)
    if module is not None:
        return module
    raise AttributeError(f"module 'peft' has no attribute {name!r}.{nearest(name, _WHERE)}")


def submodule(package: str, name: str) -> Any:
    """A module of a package as its attribute, imported when it is asked for; None if there is no such file."""
    if not name.islower() or name.startswith("__") or importlib.util.find_spec(f"{package}.{name}") is None:
        return None
    return importlib.import_module(f"{package}.{name}")


def _peft_type(stem: str) -> str | None:
    """The method whose file's name is `stem` without regard to case and underscores."""
    plain = {kind.replace("_", "").lower(): kind for kind in registry.names()}
    return plain.get(stem.lower())


def _of_method(kind: str, name: str) -> Any:
    config = registry.config_class(kind)
    if name == config.__name__:
        return config
    from peft.tuner import tuner_class

    cls = getattr(registry.method(kind), "tuner", None) or tuner_class(kind)
    if name == cls.__name__:
        return cls
    raise AttributeError(f"module 'peft' has no attribute {name!r}. Did you mean {config.__name__!r}?")


def names() -> list[str]:
    """All public names, methods included."""
    from peft.method import WeightMethod

    found = set(_WHERE)
    for kind, method in registry.all_methods().items():
        found.add(registry.config_class(kind).__name__)
        if isinstance(method, WeightMethod):
            found.add(f"{method.class_name}Model")
    return sorted(found)
