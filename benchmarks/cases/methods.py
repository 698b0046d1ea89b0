"""The methods, with the options they are measured with."""

from __future__ import annotations

from typing import Any

import torch

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r16": ("LoraConfig", {"r": 16}),
    "DoRA r16": ("LoraConfig", {"r": 16, "use_dora": True}),
    "LoHa r8": ("LoHaConfig", {"r": 8}),
    "LoKr r8": ("LoKrConfig", {"r": 8}),
    "LoKr r16 f4": ("LoKrConfig", {"r": 16, "decompose_factor": 4}),
    "HRA r8": ("HRAConfig", {"r": 8}),
    "FourierFT n1000": ("FourierFTConfig", {"n_frequency": 1000}),
    "C3A b128": ("C3AConfig", {"block_size": 128}),
    "BOFT b4": ("BOFTConfig", {"boft_block_size": 4}),
    "OFT b32": ("OFTConfig", {"oft_block_size": 32}),
    "VeRA r256": ("VeraConfig", {"r": 256}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 1000}),
    "MiSS r64": ("MissConfig", {"r": 64}),
    "RandLoRA r32": ("RandLoraConfig", {"r": 32}),
    "WaveFT n1000": ("WaveFTConfig", {"n_frequency": 1000}),
    "SHiRA r16": ("ShiraConfig", {"r": 16}),
    "RoAd": ("RoadConfig", {}),
    "GraLoRA r32": ("GraloraConfig", {"r": 32}),
    "DeLoRA r16": ("DeloraConfig", {"r": 16}),
    "HiRA r16": ("HiraConfig", {"r": 16}),
    "VB-LoRA r4": ("VBLoRAConfig", {"r": 4, "num_vectors": 64, "vector_length": 64}),
    "PVeRA r256": ("PveraConfig", {"r": 256}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "PSOFT r16": ("PsoftConfig", {"r": 16}),
    "OSF": ("OSFConfig", {}),
    "Uni-LoRA r4": ("UniLoraConfig", {"r": 4}),
    "PEANuT": ("PeanutConfig", {}),
    "GLoRA": ("GloraConfig", {}),
    "FRoD": ("FrodConfig", {}),
    "DEFT": ("DeftConfig", {}),
    "BEFT": ("BeftConfig", {}),
    "AdaMSS": ("AdamssConfig", {}),
    "SuperTuning": ("SupertuningConfig", {}),
}
INPUT_DROPOUT = {
    "LoRA r16": "lora_dropout",
    "DoRA r16": "lora_dropout",
    "VeRA r256": "vera_dropout",
    "AdaLoRA": "lora_dropout",
    "MiSS r64": "miss_dropout",
    "RandLoRA r32": "randlora_dropout",
    "GraLoRA r32": "gralora_dropout",
    "DeLoRA r16": "module_dropout",
    "HiRA r16": "hira_dropout",
    "VB-LoRA r4": "vblora_dropout",
    "PVeRA r256": "pvera_dropout",
    "TinyLoRA": "tinylora_dropout",
    "PSOFT r16": "psoft_dropout",
    "Uni-LoRA r4": "unilora_dropout",
    "FRoD": "frod_dropout",
    "DEFT": "deft_dropout",
}
"""The option of each method that drops elements of the input.

Others drop more or less work at random, so that two runs are not the same work (rows, blocks or all of the update:
LoHa, LoKr, BOFT, OFT), or nothing with these options (SuperTuning), and are left out.
"""


def config(method: str, dropout: float = 0.0, **more: Any) -> Any:
    """The config of a method; `more` goes before its options here."""
    import peft

    name, options = METHODS[method]
    dropping = {INPUT_DROPOUT[method]: dropout} if dropout else {}
    return getattr(peft, name)(**{**options, **dropping, **more})
