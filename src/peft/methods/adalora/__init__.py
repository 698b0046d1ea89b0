"""AdaLoRA: ranks go where they matter most while training (arXiv 2303.10512)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from peft.config import positive
from peft.errors import ConfigError, PeftWarning
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.methods.adalora import training
from peft.methods.adalora.allocator import RankAllocator, cut
from peft.methods.lora.config import LoraConfig, variants
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA (arXiv 2303.10512): W + s B diag(E) A, whose singular values E are pruned while training.

    Every layer starts with `init_r` ranks. From step `tinit` on the least important ones of the whole model are zeroed
    every `deltaT` steps, along a cubic schedule, until `target_r` per layer are left on average, `tfinal` steps before
    `total_step`. A and B are kept orthogonal by a term of the loss. The steps are counted by
    `model.base_model.update_and_allocate(step)`, to be called after every optimizer step and before gradients are
    zeroed; with transformers' Trainer, `peft.integrations.callbacks.AllocationCallback` does it.

    Raises:
        ConfigError: no `total_step`, a schedule without room for pruning, or options that only LoRA has.

    Example:
        >>> from peft import AdaLoraConfig
        >>> AdaLoraConfig(init_r=12, target_r=4, total_step=1000, target_modules=["q_proj"]).tfinal
        0
    """

    rank_pattern: dict | None = field(
        default=None, metadata={"help": "{layer.lora_E: which ranks are left}, written when pruning is over."}
    )
    target_r: int = field(default=8, metadata={"help": "Ranks per layer in the end, on average."})
    init_r: int = field(default=12, metadata={"help": "Ranks per layer in the beginning."})
    tinit: int = field(default=0, metadata={"help": "Steps before pruning starts."})
    tfinal: int = field(default=0, metadata={"help": "Steps at the end with the ranks fixed."})
    deltaT: int = field(default=1, metadata={"help": "Steps between prunings."})
    beta1: float = field(default=0.85, metadata={"help": "Decay of the average importance."})
    beta2: float = field(default=0.85, metadata={"help": "Decay of its uncertainty."})
    orth_reg_weight: float = field(default=0.5, metadata={"help": "Weight of the orthogonality loss."})
    total_step: int | None = field(default=None, metadata={"help": "Optimizer steps of the whole training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or None
        positive(self, "init_r", "target_r", "deltaT")
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError(
                "AdaLoraConfig.total_step: AdaLoRA prunes along the whole training; give its optimizer steps."
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"AdaLoraConfig: tinit = {self.tinit} and tfinal = {self.tfinal} leave none of the {self.total_step} "
                "steps for pruning. Lower them, or raise total_step."
            )
        if chosen := variants(self):
            raise ConfigError(f"AdaLoRA does not support {chosen[0]}, an option of LoRA's.")
        ignored = [n for n in ("use_rslora", "lora_bias", "alpha_pattern", "layer_replication") if getattr(self, n)]
        ignored += ["r"] if self.r != 8 else []
        if ignored:
            warnings.warn(f"AdaLoRA does not use {ignored} (its rank is init_r).", PeftWarning, stacklevel=3)


class AdaLora(WeightMethod, peft_type="ADALORA", config=AdaLoraConfig):
    prefix = "lora_"
    slots = (
        Slot("lora_A", "r in", factor=True),
        Slot("lora_E", "r 1"),
        Slot("lora_B", "out r", factor=True),
        Slot("ranknum", "1", trains=False, saved=False),
    )
    settings = ("r", "lora_alpha", "scaling", "kept")
    tuner_methods: ClassVar[dict[str, Any]] = {
        "forward": training.forward,
        "update_and_allocate": training.update_and_allocate,
        "rankallocator": property(training.allocator),
        "resize_modules_by_rank_pattern": training.resize_modules,
        "resize_state_dict_by_rank_pattern": training.resize_state_dict,
    }
    dropout = "lora_dropout"
    samples = (
        {"init_r": 3, "target_r": 2, "total_step": 10},
        {"init_r": 2, "target_r": 1, "total_step": 10, "lora_alpha": 3, "init_lora_weights": False},
    )

    def run_state(self, tuner: Any, adapter: str) -> dict[str, Any]:
        return training.run_state(tuner, adapter)

    def load_run_state(self, tuner: Any, adapter: str, state: dict[str, Any]) -> None:
        training.load_run_state(tuner, adapter, state)

    def identity_at_start(self, config: AdaLoraConfig) -> bool:
        return config.init_lora_weights is not False

    def resolve(self, config: AdaLoraConfig, host: Host, site: Site) -> dict[str, Any]:
        kept = (config.rank_pattern or {}).get(f"{site.key}.lora_E")
        r = config.init_r if kept is None else sum(kept)
        scaling = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        return {"r": r, "lora_alpha": config.lora_alpha, "scaling": scaling, "kept": None}

    def derive(self, p: Parts, host: Host) -> None:
        # The rank in the beginning: the scale of an update does not change when other ranks are pruned.
        p.ranknum.fill_(p.config.init_r)

    def reset(self, p: Parts, host: Host) -> None:
        start = p.config.init_lora_weights is not False
        for factor in (p.lora_A, p.lora_B):
            nn.init.normal_(factor, std=0.02 if start else 1.0)
        nn.init.zeros_(p.lora_E) if start else nn.init.normal_(p.lora_E)

    def update(self, p: Parts, host: Host) -> Update:
        gain = p.scaling / (p.ranknum + 1e-5)
        return Add(LowRank(p.lora_A * (p.lora_E * gain), p.lora_B), dropout=p.dropout)

    def to_file(self, p: Parts, name: str, tensor: Tensor, config: AdaLoraConfig) -> dict[str, Tensor]:
        return {name: tensor if p.kept is None else cut(name, tensor, p.kept)}


def __getattr__(name: str) -> Any:
    if name == "SVDLinear":
        from peft.hosts.linear import LinearHost
        from peft.layer import layer_class

        return layer_class(("ADALORA",), LinearHost)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["AdaLora", "AdaLoraConfig", "RankAllocator"]
