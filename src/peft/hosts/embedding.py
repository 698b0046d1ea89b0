"""`nn.Embedding`: a matrix W (dim, vocabulary) that acts on one-hot columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.hosts.base import Host
from peft.operators import LowRank, Operator
from peft.operators.base import SMALL, picked


class EmbeddingHost(Host):
    """Looks up columns of W. Subclasses that scale their output (Gemma's, BART's) have `embed_scale` applied here
    too."""

    name = "Embedding"
    types = ("torch.nn.modules.sparse.Embedding",)
    one_hot = True
    takes_bias = False

    @property
    def always_acts(self) -> bool:
        """Where the layer itself would clip rows that it looks up in place, W would depend on what ran before."""
        return self.module.max_norm is not None

    @property
    def factored(self) -> bool:
        """Not where rows are clipped or their gradients rescaled: what is done to a whole row knows no summands."""
        return self.module.max_norm is None and not self.module.scale_grad_by_freq

    def weight(self) -> Tensor:
        return self.raw.mT

    def native(self, weight: Tensor) -> Tensor:
        return weight.mT

    def bias(self) -> None:
        return None

    def act(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        emb, rows = self.module, weight.mT.to(self.dtype)
        y = F.embedding(
            x,
            rows if emb.max_norm is None else rows.clone(),
            emb.padding_idx,
            emb.max_norm,
            emb.norm_type,
            emb.scale_grad_by_freq,
            emb.sparse,
        )
        return self._scaled(y)

    def lift(self, op: Operator, x: Tensor) -> Tensor:
        dtype = self.dtype
        if not isinstance(op, LowRank):
            return self._scaled(op.to(dtype).columns(x))
        # What is looked up is cast, not the factor over the whole vocabulary.
        if x.numel() * op.up.shape[0] <= SMALL:
            return self._scaled(op.columns(x).to(dtype))
        return self._scaled(op.raised(picked(op.down, x).to(dtype)))

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Positions of the padding token send no gradients to what an adapter changes, as they send none to W."""
        padding = self.module.padding_idx
        if padding is None or not y.requires_grad:
            return y
        return torch.where((x == padding)[..., None], y.detach(), y)

    def _scaled(self, y: Tensor) -> Tensor:
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def leaf(self, kind: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        return None

    def slot_name(self, name: str) -> str:
        head, _, tail = name.rpartition("_")
        return f"{head}_embedding_{tail}"
