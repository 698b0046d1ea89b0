"""Any change of a weight as LoRA factors: exact where its rank is low, by SVD with a measured error elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from peft.combine.factored import Factors, recompress, truncate
from peft.operators import Operator


def to_factors(
    change: Operator | Tensor,
    rank: int | float | None = None,
    dtype: torch.dtype | None = None,
    driver: str | None = None,
) -> tuple[Factors, float]:
    """ΔW as `B @ A` of the given rank, with the measured relative error (Frobenius).

    Args:
        change: an operator, or the dense ΔW (out, in). An operator that knows its thin factors is never made dense.
        rank: an integer; a float in (0, 1], the share of ‖ΔW‖² to keep; or None, the rank that holds ΔW.
        dtype: of the factors; default: that of the change.
        driver: of `torch.linalg.svd`, on CUDA only.

    >>> from peft.operators import LowRank
    >>> factors, error = to_factors(LowRank(down=torch.randn(3, 16), up=torch.randn(12, 3), scale=2.0), rank=0.999999)
    >>> factors.rank, error < 1e-5
    (3, True)
    """
    if isinstance(change, Tensor):
        return truncate(change, rank, dtype, driver=driver)
    thin = change.factors()
    if thin is not None:
        up, down = thin
        return recompress([Factors(down.detach(), up.detach())], rank, dtype)
    return truncate(change.dense(), rank, dtype, driver=driver)
