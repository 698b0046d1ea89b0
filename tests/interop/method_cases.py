"""Adapters of every method other than LoRA that the reference can make, save and load: what to compare with.

`METHODS` gives, for each type, its config class, the options that suit tiny models, and the models it works on there;
`VARIATIONS` are further options of single methods. Models stand in `tests/models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.models import BATCH, TOKENS, example
from tests.reference.actions import Case, Config

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "llama_seqcls": "SEQ_CLS"}
TRANSFORMERS = ("llama", "llama:all-linear", "t5", "bert")
LINEAR = ("mlp", "L.Linear", *TRANSFORMERS)
LINEAR_AND_CONV1D = (*LINEAR, "gpt2", "L.Conv1D", "embconv1d:conv1d")
CONV2D = ("convlin", "L.Conv2d", "L.Conv2d_1x1")
EVERY_LAYER = (*LINEAR_AND_CONV1D, *CONV2D, "embconv1d", "L.Conv1d", "L.Conv3d", "L.Embedding")
PROMPTED = ("llama", "gpt2", "t5", "bert")

TARGETS = {
    "mlp": ["lin0", "lin1"],
    "mlp_no_bias": ["lin0", "lin1"],
    "convlin": ["conv2d", "lin0"],
    "embconv1d": ["emb", "conv1d", "lin0"],
}


@dataclass(frozen=True)
class Method:
    """How to make one method's adapters: config class, options for tiny models, models (`model[:targets]`)."""

    config: str
    models: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    targets: bool = True
    mergeable: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


TASK_IDS = {"task_ids": torch.tensor([0, 2])}
#: The reference's multitask prompts on encoder-decoders want the decoder's input as labels.
AS_LABELS = {"decoder_input_ids": None, "labels": example("t5")["decoder_input_ids"]}

METHODS = {
    "ADALORA": Method("AdaLoraConfig", (*LINEAR_AND_CONV1D, *CONV2D), {"init_r": 4, "target_r": 2, "total_step": 10}),
    "ADAMSS": Method("AdamssConfig", LINEAR, {"r": 4, "num_subspaces": 2, "subspace_rank": 1}),
    "BOFT": Method("BOFTConfig", (*LINEAR, "L.Conv2d", "L.Conv2d_1x1"), {"boft_block_size": 2}),
    "ADAPTION_PROMPT": Method(
        "AdaptionPromptConfig",
        ("llama", "gpt2"),
        {"adapter_len": 4, "adapter_layers": 1},
        targets=False,
        mergeable=False,
    ),
    "IA3": Method("IA3Config", (*LINEAR_AND_CONV1D, *CONV2D, "L.Conv3d")),
    "BEFT": Method("BeftConfig", ("mlp", "L.Linear", "bert")),
    "LILY": Method("LilyConfig", LINEAR, {"r": 4, "stride_A": 1, "num_B": 2}, mergeable=False),
    "LOHA": Method("LoHaConfig", (*LINEAR, *CONV2D, "L.Conv1d"), {"r": 4, "alpha": 8}),
    "LOKR": Method("LoKrConfig", (*LINEAR, *CONV2D, "L.Conv1d"), {"r": 2, "alpha": 4}),
    "OFT": Method("OFTConfig", (*LINEAR, *CONV2D, "L.Embedding"), {"oft_block_size": 2}),
    "POLY": Method("PolyConfig", TRANSFORMERS, {"r": 4, "n_tasks": 3, "n_skills": 2}, mergeable=False, extra=TASK_IDS),
    "LN_TUNING": Method(
        "LNTuningConfig", ("llama", "gpt2", "t5", "L.Linear", "L.LayerNorm", "L.BatchNorm1d"), targets=True
    ),
    "VERA": Method("VeraConfig", LINEAR_AND_CONV1D, {"r": 4}),
    "FROD": Method("FrodConfig", LINEAR_AND_CONV1D, {"progressbar": False, "sparse_rate": 0.1}),
    "PVERA": Method("PveraConfig", LINEAR_AND_CONV1D, {"r": 4}),
    "FOURIERFT": Method("FourierFTConfig", LINEAR_AND_CONV1D, {"n_frequency": 5}),
    "GLORA": Method("GloraConfig", LINEAR, {"r": 4}),
    "HRA": Method("HRAConfig", (*LINEAR, *CONV2D), {"r": 2}),
    "VBLORA": Method("VBLoRAConfig", LINEAR_AND_CONV1D, {"r": 4, "num_vectors": 8, "vector_length": 1}),
    "UNILORA": Method("UniLoraConfig", LINEAR_AND_CONV1D, {"r": 4, "theta_d_length": 16}),
    "MISS": Method("MissConfig", LINEAR, {"r": 2}),
    "RANDLORA": Method("RandLoraConfig", LINEAR_AND_CONV1D, {"r": 4, "randlora_alpha": 8}),
    "ROAD": Method("RoadConfig", LINEAR, {"group_size": 2}),
    "TRAINABLE_TOKENS": Method(
        "TrainableTokensConfig",
        ("llama", "gpt2", "t5", "bert", "L.Embedding", "embconv1d:emb"),
        {"token_indices": list(range(1, 31))},
    ),
    "HIRA": Method("HiraConfig", EVERY_LAYER, {"r": 4}),
    "SHIRA": Method("ShiraConfig", LINEAR, {"r": 1, "random_seed": 42}),
    "C3A": Method("C3AConfig", LINEAR, {"block_size": 1}),
    "WAVEFT": Method("WaveFTConfig", (*LINEAR, "gpt2", "L.Conv1D"), {"n_frequency": 8}),
    "OSF": Method("OSFConfig", ("mlp", "L.Linear", *TRANSFORMERS), {"effective_rank": 1}),
    "DELORA": Method("DeloraConfig", LINEAR, {"r": 4}),
    "GRALORA": Method("GraloraConfig", (*LINEAR, "gpt2", "L.Conv1D"), {"r": 4, "gralora_k": 2, "alpha": 8}),
    "TINYLORA": Method("TinyLoraConfig", (*LINEAR_AND_CONV1D, "L.Embedding", "embconv1d"), {"r": 2, "u": 4}),
    "PSOFT": Method("PsoftConfig", LINEAR, {"r": 2, "psoft_alpha": 2}),
    "PEANUT": Method("PeanutConfig", LINEAR, {"r": 4}),
    "SHADOW": Method("ShadowConfig", ("llama", "gpt2"), {"r": 4}, targets=False, mergeable=False),
    "SUPERTUNING": Method("SupertuningConfig", LINEAR, {"sparsity": 0.9}),
    "DEFT": Method("DeftConfig", LINEAR_AND_CONV1D, {"r": 2}),
    "PROMPT_TUNING": Method(
        "PromptTuningConfig", (*PROMPTED, "llama_seqcls"), {"num_virtual_tokens": 4}, targets=False, mergeable=False
    ),
    "MULTITASK_PROMPT_TUNING": Method(
        "MultitaskPromptTuningConfig",
        PROMPTED,
        {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2},
        targets=False,
        mergeable=False,
        extra=TASK_IDS,
    ),
    "P_TUNING": Method(
        "PromptEncoderConfig",
        PROMPTED,
        {"num_virtual_tokens": 4, "encoder_hidden_size": 32},
        targets=False,
        mergeable=False,
    ),
    "PREFIX_TUNING": Method("PrefixTuningConfig", PROMPTED, {"num_virtual_tokens": 4}, targets=False, mergeable=False),
    "CARTRIDGE": Method("CartridgeConfig", PROMPTED, {"num_virtual_tokens": 4}, targets=False, mergeable=False),
    "CPT": Method(
        "CPTConfig",
        ("llama", "gpt2"),
        {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
        targets=False,
        mergeable=False,
        extra={"input_type_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)},
    ),
}

#: Among them seeds other than the default ones, with files that leave out what the seed says.
VARIATIONS = {
    "ADALORA": [("L.Linear", {"lora_alpha": 3})],
    "ADAMSS": [("L.Linear", {"use_dynamic_rank": True}), ("L.Linear", {"use_asa": True}), ("mlp", {"random_seed": 3})],
    "BOFT": [
        ("mlp", {"boft_block_num": 2, "boft_block_size": 0}),
        ("L.Linear", {"boft_n_butterfly_factor": 2}),
        ("L.Linear", {"bias": "boft_only"}),
    ],
    "IA3": [("mlp", {"feedforward_modules": ["lin0"]})],
    "LILY": [("llama", {"stride_A": 2})],
    "LOHA": [("L.Conv2d", {"use_effective_conv2d": True}), ("L.Conv1d", {"use_effective_conv2d": True})],
    "LOKR": [
        ("L.Linear", {"decompose_both": True, "r": 1}),
        ("L.Conv2d", {"use_effective_conv2d": True, "r": 1}),
        ("llama", {"r": 1}),
        ("llama", {"decompose_factor": 4}),
        ("llama", {"init_weights": "lycoris"}),
    ],
    "OFT": [
        ("mlp", {"block_share": True}),
        ("mlp", {"coft": True}),
        ("mlp", {"use_cayley_neumann": False}),
        ("mlp", {"oft_block_size": 0, "r": 2}),
        ("L.Linear", {"oft_block_size": 4}),
    ],
    "POLY": [("llama", {"n_splits": 2})],
    "VERA": [
        ("llama", {"save_projection": False}),
        ("mlp", {"save_projection": False, "projection_prng_key": 7, "d_initial": 0.3}),
    ],
    "FROD": [
        ("llama", {"save_projection": False}),
        ("mlp", {"save_projection": False, "projection_prng_key": 7, "regularization_alpha": 0.1}),
    ],
    "PVERA": [("llama", {"save_projection": False}), ("mlp", {"save_projection": False, "projection_prng_key": 7})],
    "FOURIERFT": [
        ("mlp", {"init_weights": True}),
        ("L.Linear", {"n_frequency": 20, "scaling": 10.0}),
        ("mlp", {"random_loc_seed": 5, "n_frequency": 9}),
    ],
    "GLORA": [
        ("mlp", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
        ("mlp", {"config_A_B": "constant"}),
        ("mlp_no_bias", {}),
    ],
    "HRA": [("L.Linear", {"apply_GS": True}), ("L.Linear", {"r": 3})],
    "VBLORA": [("mlp", {"save_only_topk_weights": True})],
    "UNILORA": [("mlp", {"save_indices": True}), ("mlp", {"proj_seed": 7, "theta_d_length": 11})],
    "MISS": [("L.Linear", {"init_weights": "bat"}), ("mlp", {"init_weights": "mini"}), ("mlp", {"r": 3})],
    "RANDLORA": [
        ("llama", {"save_projection": False}),
        ("mlp", {"sparse": True}),
        ("mlp", {"very_sparse": True}),
        ("mlp", {"save_projection": False, "projection_prng_key": 7, "very_sparse": True}),
    ],
    "ROAD": [("mlp", {"variant": "road_2"}), ("mlp", {"variant": "road_4"}), ("L.Linear", {"group_size": 4})],
    "TRAINABLE_TOKENS": [("llama_tied", {"task_type": "CAUSAL_LM"})],
    "C3A": [("L.Linear", {"block_size": 4}), ("L.Linear", {"block_size": 8, "init_weights": True})],
    "WAVEFT": [
        ("mlp", {"wavelet_family": "db2"}),
        ("mlp", {"use_idwt": False}),
        ("llama", {"proportional_parameters": True}),
        ("mlp", {"random_loc_seed": 5, "wavelet_family": "sym3"}),
    ],
    "OSF": [("llama", {"effective_rank": 0.5})],
    "DELORA": [("L.Linear", {"delora_lambda": 5})],
    "GRALORA": [("L.Linear", {"hybrid_r": 2})],
    "TINYLORA": [
        ("llama", {"save_projection": False}),
        ("llama", {"weight_tying": 1.0}),
        ("llama", {"init_weights": "uniform"}),
        ("mlp", {"save_projection": False, "projection_seed": 9}),
    ],
    "PSOFT": [
        ("mlp", {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}),
        ("mlp", {"ab_svd_init": "pissa_init"}),
        ("mlp", {"psoft_svd": "lowrank"}),
        ("mlp", {"use_cayley_neumann": True}),
        ("mlp", {"psoft_svd": "lowrank", "random_seed": 3, "psoft_svd_lowrank_niter": 4}),
    ],
    "PEANUT": [("mlp", {"depth": 2})],
    "SHADOW": [
        ("llama", {"shadow_hidden_size": 32, "shadow_intermediate_size": 64, "shadow_num_attention_heads": 2}),
        ("llama", {"share_embeddings": False}),
    ],
    "SUPERTUNING": [
        ("mlp", {"r": 2, "lora_alpha": 4}),
        ("mlp", {"save_precomputed_indices": False}),
        ("mlp", {"save_precomputed_indices": False, "select_top": False, "sparsity": 0.7}),
    ],
    "DEFT": [("mlp", {"decomposition_method": "qr"}), ("mlp", {"para": True}), ("mlp", {"alpha": 4})],
    "PROMPT_TUNING": [
        ("llama", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
        ("t5", {"num_transformer_submodules": 1}),
    ],
    "P_TUNING": [
        ("llama", {"encoder_reparameterization_type": "LSTM"}),
        ("bert", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_hidden_size": 8}),
        ("t5", {"encoder_hidden_size": 8}),
    ],
    "PREFIX_TUNING": [
        ("llama", {"prefix_projection": True, "encoder_hidden_size": 32}),
        ("t5", {"prefix_projection": True}),
        ("bert", {"prefix_projection": True, "encoder_hidden_size": 8}),
        ("llama", {"init_weights": "zero"}),
    ],
    "CARTRIDGE": [("llama", {"num_frozen_tokens": 0}), ("t5", {"num_frozen_tokens": 2})],
    "CPT": [("llama", {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5})],
}


def _case(method: str, place: str, changes: dict[str, Any]) -> Case:
    how = METHODS[method]
    model, _, targets = place.partition(":")
    options = {**how.options, **changes}
    if model in TASKS:
        options.setdefault("task_type", TASKS[model])
    if how.targets and targets == "all-linear":
        options["target_modules"] = targets
    elif how.targets and model not in TASKS and model != "llama_tied":
        options["target_modules"] = _targets(model, targets)
    if method == "IA3" and "target_modules" in options:
        options.setdefault("feedforward_modules", [])
    words = [str(v) for v in changes.values() if not isinstance(v, list)]
    extra = {**how.extra, **AS_LABELS} if (method, model) == ("MULTITASK_PROMPT_TUNING", "t5") else how.extra
    name = "-".join([method, place.replace(":", "_"), *words])
    return Case(name, model, Config(how.config, options), extra, how.mergeable)


def _targets(model: str, requested: str) -> list[str]:
    return [requested] if requested else TARGETS.get(model, ["tgt"])


def cases() -> list[Case]:
    """Every case of every method, plain ones first."""
    plain = [(method, place, {}) for method, how in METHODS.items() for place in how.models]
    varied = [(method, place, changes) for method, more in VARIATIONS.items() for place, changes in more]
    return [_case(*each) for each in [*plain, *varied]]
