"""Trainable tokens: some rows of an embedding are replaced by trained ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft import inject
from peft.config import TargetedConfig
from peft.errors import TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Base, Run, Update


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Train the embedding rows of some tokens. Targets default to the input embedding.

    Example:
        >>> from peft import TrainableTokensConfig
        >>> TrainableTokensConfig(token_indices=[5, 9]).token_indices
        [5, 9]
    """

    token_indices: list[int] = field(default_factory=list, metadata={"help": "Ids of the tokens to train."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the current rows; False: from noise."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
    }

    def to_file_dict(self) -> dict[str, Any]:
        found = super().to_file_dict()
        if found.get("ensure_weight_tying"):  # what HF PEFT does with ties, and has no word for
            del found["ensure_weight_tying"]
        return found


@dataclass(frozen=True, eq=False)
class Replace(Update):
    """Vectors of W, one per token, replaced by others: columns of an embedding (dim, vocabulary), rows of a head."""

    index: Tensor
    value: Tensor
    columns: bool

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        y = prev(x)
        if not self.columns:
            rows = torch.nn.functional.linear(x, self.value.to(x.dtype))
            if bias is not None:
                rows = rows + bias[self.index].to(x.dtype)
            return y.index_copy(-1, self.index, rows.to(y.dtype))
        hit = x[..., None] == self.index
        scale = getattr(base.host.module, "embed_scale", None)  # type: ignore[attr-defined]
        value = self.value.to(y.dtype) if scale is None else self.value.to(y.dtype) * scale
        found = torch.nn.functional.embedding(hit.int().argmax(-1), value)
        return torch.where(hit.any(-1, keepdim=True), found, y)

    def transposed(self, base: Base) -> Update:
        return Replace(self.index, self.value, not self.columns)

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        if self.columns:
            return weight.index_copy(1, self.index, self.value.mT.to(weight.dtype))
        return weight.index_copy(0, self.index, self.value.to(weight.dtype))


class TrainableTokens(WeightMethod, peft_type="TRAINABLE_TOKENS", config=TrainableTokensConfig):
    """The rows are absolute values, not differences; ids live in the config only."""

    slots = (
        Slot("trainable_tokens_delta", "tokens width"),
        Slot("trainable_tokens_index", "tokens", kind="buffer", trains=False, saved=False, dtype=torch.long),
    )
    settings = ("token_indices",)
    samples = ({"token_indices": [1, 3]},)
    ties = True

    def default_targets(self, config: TrainableTokensConfig, model: nn.Module) -> str | None:
        return inject.input_embedding_name(model)

    def resolve(self, config: TrainableTokensConfig, host: Host, site: Site) -> dict[str, Any]:
        size, width = (host.in_features, host.out_features) if host.one_hot else (host.out_features, host.in_features)
        if host.layout.get("spatial"):
            raise TargetError(f"{site.key!r} is a {host.name}, which has no row per token: target an embedding.")
        ids = list(config.token_indices)
        wrong = [i for i in ids if not 0 <= i < size]
        if wrong or len(set(ids)) != len(ids) or not ids:
            raise TargetError(
                f"token_indices {wrong or ids} on {site.key!r}: give different ids from 0 to {size - 1}, at least one. "
                "New tokens need model.resize_token_embeddings first."
            )
        return {"tokens": len(ids), "width": width, "token_indices": ids}

    def derive(self, p: Parts, host: Host) -> None:
        p.trainable_tokens_index.copy_(torch.tensor(p.token_indices))

    def reset(self, p: Parts, host: Host) -> None:
        if getattr(p.config, "init_weights", True):
            weight = host.weight().mT if host.one_hot else host.weight()
            p.trainable_tokens_delta.copy_(weight[p.trainable_tokens_index])
        else:
            p.trainable_tokens_delta.normal_()

    def mirrored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors  # rows of W here are columns there, and a file knows them as rows

    def update(self, p: Parts, host: Host) -> Update:
        return Replace(p.trainable_tokens_index, p.trainable_tokens_delta, host.one_hot)
