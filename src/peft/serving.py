"""What serving engines take. Knows their rules as of vLLM 0.33, SGLang 0.5.23 and llama.cpp of autumn 2026."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_HEADS = {"classifier", "score"}
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def refusals(config: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """Why each engine would refuse an adapter, or compute something else than was trained; {} if all take it.

    Args:
        config: The adapter's config.
        names: Names of its tensors in the file.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        why = f"{kind} is not LoRA; convert it with peft.save_as_lora"
        return {engine: [why] for engine in ("vllm", "sglang", "llama.cpp")}
    names = list(names)
    found = {"vllm": _vllm(config), "sglang": _sglang(config), "llama.cpp": _llama_cpp(config, names)}
    return {engine: why for engine, why in found.items() if why}


def _vllm(config: Any) -> list[str]:
    why = [
        name
        for name in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora")
        if getattr(config, name)
    ]
    why += ["bias != 'none'"] if config.bias != "none" else []
    extra = set(config.modules_to_save or ()) - _HEADS
    why += [f"modules_to_save {sorted(extra)}"] if extra else []
    why += ["trainable_token_indices"] if config.trainable_token_indices else []
    init = config.init_lora_weights
    why += [f"init_lora_weights={init!r}"] if isinstance(init, str) and init not in _VLLM_INITS else []
    return why


def _sglang(config: Any) -> list[str]:
    why = ["use_dora"] if config.use_dora else []
    why += ["use_rslora is ignored: it scales by lora_alpha / r"] if config.use_rslora else []
    why += [
        f"{name} is ignored" for name in ("rank_pattern", "alpha_pattern", "modules_to_save") if getattr(config, name)
    ]
    why += (
        ["target_modules is a regex"]
        if isinstance(config.target_modules, str) and config.target_modules != "all-linear"
        else []
    )
    return why


def _llama_cpp(config: Any, names: list[str]) -> list[str]:
    ends = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "base_layer.weight")
    odd = [n for n in names if not n.endswith(ends)]
    why = [f"it knows no tensor {odd[0]!r}"] if odd else []
    why += ["use_rslora is ignored: it scales by lora_alpha / r"] if config.use_rslora else []
    why += ["alpha_pattern is ignored"] if config.alpha_pattern else []
    return why
