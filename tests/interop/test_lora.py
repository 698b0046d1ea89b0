"""LoRA against the reference: every option on every layer type, born alike, written alike, read by each other."""

from __future__ import annotations

from itertools import product

import pytest

from tests.interop import compare
from tests.reference.actions import Case, Config

TOLERANCE = 1e-6

LAYERS = [
    "Linear",
    "Linear_wide",
    "Conv1D",
    "Conv1D_wide",
    "Conv1d",
    "Conv1d_grouped",
    "Conv2d",
    "Conv2d_1x1",
    "Conv2d_strided",
    "Conv2d_grouped",
    "Conv2d_depthwise",
    "Conv2d_no_bias",
    "Conv3d",
    "Embedding",
    "Embedding_scaled",
    "MultiheadAttention",
    "MultiheadAttention_batch_first",
]

OPTIONS = {
    "default": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "init_false": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dropout": {"lora_dropout": 0.1},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}

SELECTIONS = {
    "default_targets": ("llama", {"task_type": "CAUSAL_LM"}),
    "default_targets_gpt2": ("gpt2", {"task_type": "CAUSAL_LM"}),
    "default_targets_t5": ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    "default_targets_bert": ("bert", {"task_type": "SEQ_CLS"}),
    "no_task": ("llama", {}),
    "token_cls": ("bert_tokens", {"task_type": "TOKEN_CLS"}),
    "question_ans": ("bert_qa", {"task_type": "QUESTION_ANS"}),
    "features": ("bert_features", {"task_type": "FEATURE_EXTRACTION"}),
    "llama_seq_cls": ("llama_seqcls", {"task_type": "SEQ_CLS"}),
    "all_linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "all_linear_gpt2": ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "all_linear_t5": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "all_linear_bert": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all_linear_mlp": ("mlp", {"target_modules": "all-linear"}),
    "list": ("mlp", {"target_modules": ["lin0", "lin1"]}),
    "set": ("mlp", {"target_modules": {"lin0"}}),
    "mixed_layers": ("convlin", {"target_modules": ["conv2d", "lin0"]}),
    "embedding_and_conv1d": ("embconv1d", {"target_modules": ["emb", "conv1d", "lin0"]}),
    "regex": ("llama", {"target_modules": r".*\.1\..*q_proj"}),
    "suffix_path": ("llama", {"target_modules": ["self_attn.o_proj", "layers.0.mlp.up_proj"]}),
    "exclude_list": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "exclude_regex": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1.*"}),
    "exclude_from_all_linear": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "layers_to_transform": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "one_layer_to_transform": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "layers_pattern": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    "layers_pattern_gpt2": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "rank_pattern": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}),
    "rank_pattern_path": ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "rank_pattern_anchor": ("mlp", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"^lin0": 2}}),
    "alpha_pattern": ("llama", {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r".*\.0\..*v_proj": 32}}),
    "both_patterns_rslora": (
        "mlp",
        {
            "target_modules": ["lin0", "lin1"],
            "rank_pattern": {"lin0": 2, "lin1": 5},
            "alpha_pattern": {"lin1": 7},
            "use_rslora": True,
        },
    ),
    "dora_mlp": ("mlp", {"target_modules": ["lin0", "lin1"], "use_dora": True, "rank_pattern": {"lin1": 1}}),
    "dora_gpt2": ("gpt2", {"use_dora": True, "task_type": "CAUSAL_LM"}),
    "bias_all_bert": ("bert", {"bias": "all", "task_type": "SEQ_CLS"}),
    "bias_lora_only_gpt2": ("gpt2", {"bias": "lora_only"}),
    "modules_to_save": ("mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "modules_to_save_norm": ("llama", {"modules_to_save": ["norm", "lm_head"], "task_type": "CAUSAL_LM"}),
    "modules_to_save_embedding": ("llama_tied", {"modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}),
    "modules_to_save_tied": (
        "llama_tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"},
    ),
    "token_indices": ("llama", {"trainable_token_indices": [1, 5, 9], "task_type": "CAUSAL_LM"}),
    "token_indices_by_name": ("llama", {"trainable_token_indices": {"embed_tokens": [2, 4]}, "task_type": "CAUSAL_LM"}),
    "token_indices_tied": ("llama_tied", {"trainable_token_indices": [1, 5, 9], "task_type": "CAUSAL_LM"}),
    "token_indices_ensured": (
        "llama_tied",
        {"trainable_token_indices": [1, 5], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"},
    ),
    "embedding_target_ensured": (
        "llama_tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"},
    ),
    "embedding_target": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}),
    "parameters": ("experts", {"target_parameters": ["experts.w1"]}),
    "parameters_two": ("experts", {"target_parameters": ["experts.w1", "experts.w2"]}),
    "parameters_and_modules": ("experts", {"target_parameters": ["experts.w1"], "target_modules": ["lin0"]}),
    "parameters_rank_pattern": (
        "experts",
        {"target_parameters": ["experts.w1", "experts.w2"], "rank_pattern": {"experts.w2": 2}},
    ),
    "parameters_2d": (
        "llama",
        {"target_modules": [], "target_parameters": ["q_proj.weight"], "task_type": "CAUSAL_LM"},
    ),
    "parameters_rslora": ("experts", {"target_parameters": ["experts.w2"], "use_rslora": True}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "mixtral_all_linear": ("mixtral", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "mixtral_router": ("mixtral", {"target_modules": ["gate"], "task_type": "CAUSAL_LM"}),
    "mixtral_experts": (
        "mixtral",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "task_type": "CAUSAL_LM"},
    ),
    "mixtral_experts_and_attention": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "task_type": "CAUSAL_LM"},
    ),
}

#: Cells that the reference refuses: nothing to compare with.
REFUSED = {
    *product(("dora", "dora_rslora", "orthogonal"), [x for x in LAYERS if "Attention" in x]),
    *product(["orthogonal"], [x for x in LAYERS if "Conv" in x and "Conv1D" not in x]),
    *product(["lora_bias"], [x for x in LAYERS if "Embedding" in x]),
}

#: The reference abbreviates the targets of models with fused experts, to names that depend on the order of a set.
SPELLED_FREELY = {"mixtral_all_linear": ["target_modules"]}


def _merges(option: str, layer: str) -> bool:
    """Whether the reference can merge the cell: not for groups, nor a bias of B without a bias to add it to."""
    grouped = "grouped" in layer or "depthwise" in layer
    return not grouped and not (option == "lora_bias" and layer in ("Linear_wide", "Conv2d_no_bias"))


def _cells() -> list[Case]:
    return [
        Case(
            f"{option}-{layer}",
            f"L.{layer}",
            Config("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["tgt"], **kwargs}),
            mergeable=_merges(option, layer),
        )
        for (option, kwargs), layer in product(OPTIONS.items(), LAYERS)
        if (option, layer) not in REFUSED
    ]


def _selections() -> list[Case]:
    return [
        Case(name, model, Config("LoraConfig", {"r": 4, "lora_alpha": 8, **kwargs}))
        for name, (model, kwargs) in SELECTIONS.items()
    ]


every_case = pytest.mark.parametrize("case", [*_cells(), *_selections()], ids=lambda case: case.name)


@every_case
def test_born_alike(pair, case):
    compare.check_birth(pair, case)


@every_case
def test_written_alike(pair, case):
    compare.check_files(pair, case, SPELLED_FREELY.get(case.name, ()))


@every_case
def test_reads_what_the_reference_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.reference, reader=pair.ours, tolerance=TOLERANCE)


@every_case
def test_the_reference_reads_what_we_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.ours, reader=pair.reference, tolerance=TOLERANCE)
