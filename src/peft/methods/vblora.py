"""VB-LoRA: factors put together from one bank of vectors (arXiv 2405.15179)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, choice, positive
from peft.errors import ConfigError, StateError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import LowRank
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class VBLoRAConfig(TargetedConfig):
    """VB-LoRA (arXiv 2405.15179): W + B A; each piece of A and B is a mixture of `topk` vectors of a shared bank.

    The bank (num_vectors, vector_length) and one logit per piece and vector are trained; `vector_length` must divide
    both sides of every target. With `save_only_topk_weights` the file holds the chosen mixtures alone: far smaller,
    but such an adapter can't be trained further.

    Example:
        >>> from peft import VBLoRAConfig
        >>> VBLoRAConfig(vector_length=64, target_modules=["q_proj", "v_proj"]).topk
        2
    """

    r: int = field(default=4, metadata={"help": "Rank."})
    num_vectors: int = field(default=256, metadata={"help": "Vectors in the bank."})
    vector_length: int = field(default=256, metadata={"help": "Their length; divides both sides of every target."})
    topk: int = field(default=2, metadata={"help": "Vectors in each mixture."})
    save_only_topk_weights: bool = field(default=False, metadata={"help": "Save mixtures instead of all logits."})
    vblora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: str = field(default="none", metadata={"help": "Base biases to train: 'none', 'all' or 'vblora_only'."})
    init_vector_bank_bound: float = field(default=0.02, metadata={"help": "The bank starts uniform in ± this."})
    init_logits_std: float = field(default=0.1, metadata={"help": "Logits start normal with this deviation."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", "num_vectors", "vector_length", "topk")
        choice(self, "bias", ("none", "all", "vblora_only"))
        if self.topk > self.num_vectors:
            raise ConfigError(
                f"VBLoRAConfig.topk = {self.topk} is more than the {self.num_vectors} vectors of the bank."
            )


def count_savable(tuner: Any, adapter: str = "default") -> tuple[int, int]:
    """Numbers that a file of the adapter holds: (VB-LoRA's, of anything else trained). Indices count by their bytes."""
    from peft.checkpoint.state import get_peft_model_state_dict

    mine = other = 0
    for name, tensor in get_peft_model_state_dict(tuner, adapter_name=adapter).items():
        size = tensor.numel() if tensor.is_floating_point() else -(-tensor.numel() * tensor.element_size() // 4)
        mine, other = (mine + size, other) if "vblora_" in name else (mine, other + size)
    return mine, other


def print_savable(tuner: Any) -> None:
    """Print what a file of the adapter holds."""
    mine, other = count_savable(tuner)
    print(f"VB-LoRA parameters in the file: {mine:,} | others: {other:,} | together: {mine + other:,}")


class VBLoRA(WeightMethod, peft_type="VBLORA", config=VBLoRAConfig):
    slots = (
        Slot("vblora_logits_A", "r in/length vectors"),
        Slot("vblora_logits_B", "out/length r vectors"),
    )
    settings = ("r", "topk", "pruned")
    dropout = "vblora_dropout"
    samples = ({"num_vectors": 6, "vector_length": 4}, {"num_vectors": 6, "vector_length": 2, "topk": 3})
    tuner_methods: ClassVar[dict[str, Any]] = {
        "get_nb_savable_parameters": count_savable,
        "print_savable_parameters": print_savable,
    }

    def shared(self, config: VBLoRAConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Tensor]:
        bank = torch.empty(config.num_vectors, config.vector_length, device=device, dtype=dtype)
        bound = config.init_vector_bank_bound
        return {"vblora_vector_bank": nn.Parameter(nn.init.uniform_(bank, -bound, bound))}

    def saved_banks(self, config: VBLoRAConfig) -> tuple[str, ...]:
        return ("vblora_vector_bank",)

    def identity_at_start(self, config: VBLoRAConfig) -> bool:
        return False

    def resolve(self, config: VBLoRAConfig, host: Host, site: Site) -> dict[str, Any]:
        sizes = {"length": config.vector_length, "vectors": config.num_vectors}
        return {"r": config.r, "topk": config.topk, "pruned": False, **sizes}

    def reset(self, p: Parts, host: Host) -> None:
        for logits in (p.vblora_logits_A, p.vblora_logits_B):
            nn.init.normal_(logits, std=p.config.init_logits_std)

    def update(self, p: Parts, host: Host) -> Update:
        if p.pruned and p.training:
            raise StateError(
                "This VB-LoRA adapter was saved with save_only_topk_weights=True, so its other logits are lost and it "
                "can't be trained. Call model.eval(), or save with save_only_topk_weights=False before you train on."
            )
        down = mixtures(p.vblora_logits_A, p.vblora_vector_bank, p.topk).flatten(1)
        up = mixtures(p.vblora_logits_B, p.vblora_vector_bank, p.topk).transpose(1, 2).flatten(0, 1)
        return Add(LowRank(down, up), dropout=p.dropout)

    def to_file(self, p: Parts, name: str, tensor: Tensor, config: VBLoRAConfig) -> dict[str, Tensor]:
        if not config.save_only_topk_weights:
            return {name: tensor}
        top, index = tensor.topk(config.topk, dim=-1)
        # The last weight is one less the others.
        weights = top.softmax(-1)[..., :-1].contiguous()
        return {f"{name}_topk_indices": index.to(_integers(config.num_vectors)), f"{name}_topk_weights": weights}

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: VBLoRAConfig) -> dict[str, Tensor]:
        result = {}
        for name, value in tensors.items():
            stem = name.removesuffix("_topk_indices")
            if stem == name:
                result |= {} if name.endswith("_topk_weights") else {name: value}
                continue
            first = tensors[f"{stem}_topk_weights"]
            weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)
            logits = weights.new_full((*value.shape[:-1], config.num_vectors), -torch.inf)
            result[stem] = logits.scatter(-1, value.long(), weights.log())
            p.layer.pruned[p.adapter] = True
        return result


def mixtures(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """Logits (..., vectors) and the bank (vectors, length) -> mixtures of the `topk` likeliest (..., length)."""
    top, index = logits.topk(topk, dim=-1)
    return (top.softmax(-1)[..., None] * bank[index]).sum(-2)


def _integers(count: int) -> torch.dtype:
    """The smallest integers that can index `count` things, as files hold them."""
    return next(
        (d for d, bits in ((torch.uint8, 8), (torch.int16, 15), (torch.int32, 31)) if count < 2**bits), torch.int64
    )
