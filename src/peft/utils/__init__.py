"""Import paths of HF PEFT for helpers. No logic lives here."""

from importlib import import_module
from typing import Any

from peft._names import submodule

_HOMES = {
    "peft.config": "PeftType TaskType CONFIG_NAME",
    "peft.errors": "PeftError PeftWarning NoMatchingPeftModuleError",
    "peft.auxiliary": "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper",
    "peft.model": "WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME",
    "peft.checkpoint.state": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
    "peft.integrations": "prepare_model_for_kbit_training",
    "peft.utils.base_model": "get_base_model_state_dict set_base_model_state_dict",
    "peft.utils.constants": "TOKENIZER_CONFIG_NAME UPCAST_DTYPES INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "peft.utils.other": (
        "_freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules _is_valid_match _set_adapter "
        "cast_mixed_precision_params get_quantization_config id_tensor_storage infer_device shift_tokens_right "
        "transpose"
    ),
    "peft.prompts._tools": "bloom_model_postprocess_past_key_value",
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name.startswith("TRANSFORMERS_MODELS_TO_"):
        return getattr(import_module("peft.utils.constants"), name)
    module = submodule(__name__, name)
    if module is not None:
        return module
    raise AttributeError(f"module 'peft.utils' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_WHERE)
