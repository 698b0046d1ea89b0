"""LoRA against the reference: every option on every layer type, born alike, written alike, read by each other."""

from __future__ import annotations

from itertools import product

import pytest

import peft
from tests import models
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
    "modules_to_save_embedding": ("llama", {"modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}),
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
    "mixtral_router": ("mixtral", {"target_parameters": ["gate.weight"], "task_type": "CAUSAL_LM"}),
    "mixtral_experts": (
        "mixtral",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "task_type": "CAUSAL_LM"},
    ),
    "mixtral_experts_and_attention": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "task_type": "CAUSAL_LM"},
    ),
}

#: Cells that the reference refuses, or that mean nothing: nothing to compare with.
REFUSED = {
    *product(("dora", "dora_rslora", "orthogonal"), [x for x in LAYERS if "Attention" in x]),
    *product(["orthogonal"], [x for x in LAYERS if "Conv" in x and "Conv1D" not in x]),
    *product(["lora_bias"], [x for x in LAYERS if "Embedding" in x]),
    *product(["fan_in_fan_out"], [x for x in LAYERS if "Attention" in x]),
}

#: The same choice in other words: an empty list for None, an abbreviated list for a full one, an entry twice.
SPELLED_FREELY = {
    **{name: ["target_modules"] for name in SELECTIONS if "all_linear" in name},
    "mixtral": ["target_parameters"],
    "mixtral_experts": ["target_modules"],
    "mixtral_router": ["target_modules"],
    "modules_to_save_tied": ["modules_to_save"],
}

#: With bias="all" the reference writes the biases of modules_to_save three times, under three names. And with its
#: embedding layers targeted it writes their untrained weights, which we do when asked (`save_embedding_layers=True`).
_HEAD = "base_model.model.classifier"
_EMBEDDINGS = ("base_model.model.model.embed_tokens.base_layer.weight", "base_model.model.lm_head.base_layer.weight")
WRITTEN_TWICE = {
    "bias_all_bert": (f"{_HEAD}.modules_to_save.bias", f"{_HEAD}.original_module.bias"),
    "embedding_target": _EMBEDDINGS,
}

#: The reference's attention counts the output projection's adapter twice, and its DoRA on grouped convolutions takes
#: another norm than that of W + sBA. Ours equal the plain layer with the merged weights (`test_attention_…` below).
WRONG_THERE = {
    *(f"{option}-{layer}" for option, layer in product(OPTIONS, LAYERS) if "Attention" in layer),
    *(f"{option}-{layer}" for option, layer in product(OPTIONS, LAYERS) if "dora" in option and "grouped" in layer),
    *(f"{option}-Conv2d_depthwise" for option in OPTIONS if "dora" in option),
}


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


CASES = [*_cells(), *_selections()]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_comparable_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in WRONG_THERE], ids=lambda case: case.name
)


@every_case
def test_born_alike(pair, case):
    compare.check_birth(pair, case, twice=WRITTEN_TWICE.get(case.name, ()))


@every_case
def test_written_alike(pair, case):
    ignore, twice = SPELLED_FREELY.get(case.name, ()), WRITTEN_TWICE.get(case.name, ())
    compare.check_files(pair, case, ignore, twice)


@every_comparable_case
def test_reads_what_the_reference_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.reference, reader=pair.ours, tolerance=TOLERANCE)


@every_comparable_case
def test_the_reference_reads_what_we_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.ours, reader=pair.reference, tolerance=TOLERANCE)


@pytest.mark.parametrize("batch_first", ["", "_batch_first"])
def test_attention_differs_by_the_output_projection_counted_twice(pair, batch_first):
    case = next(case for case in CASES if case.name == f"default-MultiheadAttention{batch_first}")
    place, expected = pair.written(pair.reference, case)
    model = peft.PeftModel.from_pretrained(models.build(case.model), place).eval()
    model.base_model.model.tgt.get_base_layer().out_proj.scaling["default"] *= 2
    compare.assert_close({"output": case.run(model)}, {"output": expected["output"]}, TOLERANCE)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_targets_go_both_ways(pair, target):
    """What both compute is the same. Their merging is not compared: the reference's is wrong there."""
    options = {"r": 4, "target_modules": [target], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    case = Case(f"tied_{target}", "llama_tied", Config("LoraConfig", options))
    for writer, reader in ((pair.reference, pair.ours), (pair.ours, pair.reference)):
        compare.check_transfer(pair, case, writer, reader, TOLERANCE, outputs=("output",))


def test_all_linear_of_fused_experts(pair):
    config = Config("LoraConfig", {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"})
    case = Case("mixtral_all_linear", "mixtral", config)
    for writer, reader in ((pair.reference, pair.ours), (pair.ours, pair.reference)):
        compare.check_transfer(pair, case, writer, reader, TOLERANCE)


@pytest.mark.parametrize("asked", [True, False])
def test_embeddings_are_saved_when_asked_for(pair, asked):
    expression = (
        "{k: tuple(v.shape) for k, v in peft.get_peft_model_state_dict(peft.get_peft_model(models.build('llama'),"
        " peft.LoraConfig(target_modules=['embed_tokens', 'lm_head', 'q_proj'])), save_embedding_layers=asked).items()}"
    )
    ours, reference = (side.ask("call", expression, asked=asked) for side in (pair.ours, pair.reference))
    assert ours == reference


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False}],
    ids=["kept", "parted"],
)
def test_tied_embeddings(pair, options):
    # Where nothing is said we keep the tie, and write so; the reference parts the two.
    config = Config("LoraConfig", {"r": 4, "task_type": "CAUSAL_LM", **options})
    case = Case(f"tied-{len(options)}", "llama_tied", config)
    for writer, reader in ((pair.reference, pair.ours), (pair.ours, pair.reference)):
        compare.check_transfer(pair, case, writer, reader, TOLERANCE)
