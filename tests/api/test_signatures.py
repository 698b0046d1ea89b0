"""Public functions, methods and configs take what the reference's take: names, order, kinds and defaults.

Ours may take more, as long as every call that is written for the reference means the same. The fields of configs are
keyword arguments in practice, so their order is free after the first few.
"""

from __future__ import annotations

import pytest

import peft

FUNCTIONS = [
    "peft.get_peft_model",
    "peft.get_peft_config",
    "peft.inject_adapter_in_model",
    "peft.get_peft_model_state_dict",
    "peft.set_peft_model_state_dict",
    "peft.load_peft_weights",
    "peft.prepare_model_for_kbit_training",
    "peft.cast_mixed_precision_params",
    "peft.get_layer_status",
    "peft.get_model_status",
    "peft.functional.delete_adapter",
    "peft.functional.set_adapter",
    "peft.functional.set_requires_grad",
    "peft.functional.cast_adapter_dtype",
    "peft.helpers.disable_input_dtype_casting",
    "peft.helpers.rescale_adapter_scale",
    "peft.helpers.check_if_peft_model",
    "peft.helpers.update_forward_signature",
    "peft.helpers.update_generate_signature",
    "peft.helpers.update_signature",
    "peft.tuners.tuners_utils.check_target_module_exists",
    "peft.tuners.tuners_utils.check_adapters_to_merge",
    "peft.tuners.tuners_utils.cast_adapter_dtype",
    "peft.tuners.tuners_utils.onload_layer",
    "peft.tuners.tuners_utils._maybe_include_all_linear_layers",
    "peft.utils.transpose",
    "peft.utils._get_submodules",
    "peft.utils.other.fsdp_auto_wrap_policy",
    "peft.utils.other.get_pattern_key",
    "peft.utils.integrations.dequantize_module_weight",
    "peft.utils.integrations.gather_params_ctx",
    "peft.utils.integrations.init_empty_weights",
    "peft.import_utils.is_bnb_available",
    "peft.import_utils.is_bnb_4bit_available",
]

_TASKS = [
    "CausalLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "FeatureExtraction",
]

METHODS = {
    "peft.PeftModel": [
        "__init__",
        "add_adapter",
        "create_or_update_model_card",
        "delete_adapter",
        "disable_adapter",
        "from_pretrained",
        "get_base_model",
        "get_layer_status",
        "get_model_status",
        "get_nb_trainable_parameters",
        "load_adapter",
        "print_trainable_parameters",
        "save_pretrained",
        "set_adapter",
        "set_requires_grad",
    ],
    "peft.PeftMixedModel": [
        "__init__",
        "add_adapter",
        "delete_adapter",
        "from_pretrained",
        "load_adapter",
        "set_adapter",
    ],
    **{f"peft.PeftModelFor{task}": ["forward"] for task in _TASKS},
    **{f"peft.AutoPeftModel{task}": ["from_pretrained"] for task in ["", *(f"For{task}" for task in _TASKS)]},
    "peft.LoraModel": [
        "__init__",
        "add_weighted_adapter",
        "delete_adapter",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "inject_adapter",
        "merge_adapter",
        "merge_and_unload",
        "set_adapter",
        "unload",
        "unmerge_adapter",
    ],
    "peft.tuners.lora.layer.Linear": [
        "delete_adapter",
        "enable_adapters",
        "get_base_layer",
        "get_delta_weight",
        "merge",
        "scale_layer",
        "set_adapter",
        "set_requires_grad",
        "set_scale",
        "unmerge",
        "unscale_layer",
    ],
    "peft.PeftConfig": ["from_json_file", "from_peft_type", "from_pretrained", "save_pretrained", "to_dict"],
}

PATHS = [*FUNCTIONS, *(f"{owner}.{method}" for owner, methods in METHODS.items() for method in methods)]
#: `ensure_weight_tying`: None keeps what the base model ties, and says so in the file; the reference's False parts it
#: silently. `layer_cls` is not needed here.
OWN_DEFAULTS = {"ensure_weight_tying", "layer_cls", "peft_version"}
CONFIGS = sorted(
    {c.__name__ for kind, c in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind in peft.PeftType.__members__}
)


def _accepts(ours: list, reference: list) -> None:
    """Every way to call a function of signature `reference` must be a way to call one of signature `ours`."""
    by_name = {name: (kind, default) for name, kind, default in ours}
    positional = [name for name, kind, _ in ours if kind == "POSITIONAL_OR_KEYWORD"]
    expected = [name for name, kind, _ in reference if kind == "POSITIONAL_OR_KEYWORD"]
    assert positional[: len(expected)] == expected
    for name, kind, default in reference:
        if not kind.startswith("VAR_"):  # those are handed on; ours may name what it takes
            assert name in by_name
            assert default in ("required", by_name[name][1]) or name in OWN_DEFAULTS, name
    extra = [
        n for n, k, d in ours if n not in {r[0] for r in reference} and d == "required" and not k.startswith("VAR_")
    ]
    assert not extra, f"required here, unknown there: {extra}"


@pytest.mark.parametrize("path", PATHS)
def test_takes_what_the_reference_takes(pair, path):
    _accepts(pair.ours.ask("signature", path), pair.reference.ask("signature", path))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_fields(pair, name):
    ours, reference = (side.ask("signature", f"peft.{name}") for side in (pair.ours, pair.reference))
    assert {p[:2] for p in reference} <= {p[:2] for p in ours}
    shared = [p[0] for p in reference][: [p[0] for p in reference].index("inference_mode")]
    assert [p[0] for p in ours][: len(shared)] == shared


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("AdaLoraConfig", "CPTConfig")])
def test_config_defaults(pair, name):
    expression = f"{{k: repr(getattr(v, 'value', v)) for k, v in peft.{name}(**options).to_dict().items()}}"
    options = {}
    ours, reference = (side.ask("call", expression, options=options) for side in (pair.ours, pair.reference))
    assert {k: ours[k] for k in reference if k not in OWN_DEFAULTS} == {
        k: v for k, v in reference.items() if k not in OWN_DEFAULTS
    }


@pytest.mark.parametrize("enum", ["PeftType", "TaskType"])
def test_enum_members(pair, enum):
    ours, reference = (set(side.ask("call", f"[m.value for m in peft.{enum}]")) for side in (pair.ours, pair.reference))
    assert reference <= ours


@pytest.mark.parametrize(
    "constant",
    [
        "peft.utils.CONFIG_NAME",
        "peft.utils.WEIGHTS_NAME",
        "peft.utils.SAFETENSORS_WEIGHTS_NAME",
        "peft.utils.constants.DUMMY_TARGET_MODULES",
        "peft.utils.constants.UPCAST_DTYPES",
        "peft.tuners.lora.layer.ALLOWED_COMPUTE_DTYPES",
        "peft.tuners.lora.LoraLayer.adapter_layer_names",
    ],
)
def test_constants(pair, constant):
    assert pair.ours.ask("call", constant) == pair.reference.ask("call", constant)
