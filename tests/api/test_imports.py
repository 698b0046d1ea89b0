"""Every path that other libraries import from `peft` exists, and importing the package costs next to nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata

import pytest

import peft

# What transformers, TRL, diffusers, accelerate, axolotl, unsloth, ms-swift, verl, LLaMA-Factory and others import,
# as `module: names`; a module without names is imported as such.
IMPORTS = {
    "peft": """
        AdaLoraConfig AdaptionPromptConfig AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM BOFTConfig BOFTModel
        FourierFTConfig FourierFTModel IA3Config LoHaConfig LoKrConfig LoftQConfig LoraConfig LoraModel OFTConfig
        PeftConfig PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForSeq2SeqLM
        PeftModelForSequenceClassification PeftModelForTokenClassification PeftType PrefixTuningConfig
        PromptEncoderConfig PromptLearningConfig PromptTuningConfig TaskType VeraConfig VeraModel __version__
        get_model_status get_peft_config get_peft_model get_peft_model_state_dict inject_adapter_in_model
        load_peft_weights prepare_model_for_kbit_training set_peft_model_state_dict
    """,
    "peft.config": "PeftConfigMixin PeftConfig",
    "peft.functional": "delete_adapter",
    "peft.helpers": "disable_input_dtype_casting",
    "peft.import_utils": "is_bnb_4bit_available is_bnb_available is_torchao_available",
    "peft.mapping_func": "get_peft_model",
    "peft.optimizers": "create_loraplus_optimizer",
    "peft.peft_model": "PeftModel",
    "peft.tuners.adalora": "AdaLoraLayer AdaLoraModel RankAllocator",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.tuners.lora": "Conv2d Embedding Linear LoraLayer LoraModel",
    "peft.tuners.lora.corda": "",
    "peft.tuners.lora.dora": "",
    "peft.tuners.lora.eva": "",
    "peft.tuners.lora.layer": """
        ALLOWED_COMPUTE_DTYPES Conv1d Conv2d Conv3d Linear LoraLayer ParamWrapper VARIANT_KWARG_KEYS
        _LoraParameterProxy check_adapters_to_merge transpose
    """,
    "peft.tuners.lora.loraga": "",
    "peft.tuners.lora.model": "LoraModel",
    "peft.tuners.lora.bnb": "Linear4bit Linear8bitLt",
    "peft.tuners.lora.torchao": "",
    "peft.tuners.lora.tp_layer": "LoraParallelLinear",
    "peft.tuners.lora.variants": "MiCALinearVariant",
    "peft.tuners.tuners_utils": """
        BaseTuner BaseTunerLayer _ExcludedModule _maybe_include_all_linear_layers cast_adapter_dtype
        check_adapters_to_merge check_target_module_exists onload_layer
    """,
    "peft.utils": """
        CONFIG_NAME ModulesToSaveWrapper SAFETENSORS_WEIGHTS_NAME TaskType UPCAST_DTYPES WEIGHTS_NAME _get_submodules
        get_peft_model_state_dict get_quantization_config load_peft_weights transpose
    """,
    "peft.utils.constants": "DUMMY_TARGET_MODULES UPCAST_DTYPES",
    "peft.utils.hotswap": """
        check_hotswap_configs_compatible hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap
    """,
    "peft.utils.integrations": """
        dequantize_bnb_weight dequantize_module_weight gather_params_ctx get_bnb_param_type init_empty_weights
    """,
    "peft.utils.other": """
        AuxiliaryTrainingWrapper ModulesToSaveWrapper SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME _get_submodules
        fsdp_auto_wrap_policy get_pattern_key prepare_model_for_kbit_training
    """,
    "peft.utils.quantization_utils": "QuantizationBackend resolve_quantization_backend",
    "peft.utils.save_and_load": "get_peft_model_state_dict _maybe_shard_state_dict_for_tp",
    "peft.utils.transformers_weight_conversion": """
        build_peft_weight_mapping convert_peft_config_for_transformers get_model_conversion_mapping
    """,
}

#: Paths of what is not there yet. They fail here as soon as it is.
LATER = {
    "peft:AdaptionPromptConfig",
    "peft.tuners.lora.corda:",
    "peft.tuners.lora.dora:",
    "peft.tuners.lora.eva:",
    "peft.tuners.lora.layer:_LoraParameterProxy",
    "peft.tuners.lora.loraga:",
    "peft.tuners.lora.variants:MiCALinearVariant",
    "peft.utils.save_and_load:_maybe_shard_state_dict_for_tp",
}

PATHS = [
    pytest.param(path, marks=[pytest.mark.xfail(raises=(AttributeError, ImportError))] if path in LATER else [])
    for path in (f"{module}:{name}" for module, names in IMPORTS.items() for name in (names.split() or [""]))
]


@pytest.mark.parametrize("path", PATHS)
def test_import_path(path):
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    assert not name or getattr(found, name) is not None


def test_one_object_behind_every_path():
    from peft.mapping_func import get_peft_model
    from peft.peft_model import PeftModel
    from peft.tuners.lora import Linear, LoraLayer, LoraModel
    from peft.tuners.lora.layer import Linear as SameLinear
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    assert get_peft_model is peft.get_peft_model
    assert PeftModel is peft.PeftModel
    assert LoraModel is peft.LoraModel
    assert Linear is SameLinear
    assert issubclass(Linear, LoraLayer)
    assert issubclass(LoraLayer, BaseTunerLayer)
    assert issubclass(LoraModel, BaseTuner)


def test_public_names_exist():
    missing = [name for name in peft.__all__ if not hasattr(peft, name)]
    assert not missing
    assert set(peft.__all__) <= set(dir(peft))


def test_unknown_names_are_attribute_errors():
    assert not hasattr(peft, "LoraConfg")
    with pytest.raises(ImportError):
        from peft import LoraConfg  # noqa: F401


def test_version_agrees_with_the_distribution():
    assert peft.__version__ == metadata.version("peft")


def _loaded_after(code: str) -> set[str]:
    probe = f"import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split())


def test_import_is_lazy():
    assert not {"torch", "transformers", "accelerate"} & _loaded_after("import peft")


def test_config_needs_no_transformers():
    code = "import peft; peft.LoraConfig(r=4, task_type=peft.TaskType.CAUSAL_LM)"
    assert not {"transformers", "accelerate"} & _loaded_after(code)


ATTRIBUTES = [
    "peft.tuners.lora.LoraLayer",
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.config.LoraConfig",
    "peft.tuners.lora.model.LoraModel",
    "peft.tuners.LoraModel",
    "peft.tuners.ia3.layer.IA3Layer",
    "peft.tuners.tuners_utils.BaseTunerLayer",
    "peft.tuners.adamss.asa_callback",
    "peft.utils.constants.UPCAST_DTYPES",
    "peft.utils.other.transpose",
    "peft.utils.save_and_load.set_peft_model_state_dict",
    "peft.optimizers.create_loraplus_optimizer",
    "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING",
]


def test_modules_are_attributes_of_their_packages():
    code = "; ".join(["import peft", *ATTRIBUTES])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
