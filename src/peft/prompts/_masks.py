"""Attention masks of any form, made wider on the left for a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft.errors import UnsupportedError
from peft.prompts._cache import View
from peft.prompts._prefix import Rows


def widened(mask: Any, rows: Rows, view: View, shape: tuple[int, int], device: torch.device, config: Any) -> Any:
    """`mask` with columns for the prompt.

    Args:
        mask: Of padding, (batch, keys); or prepared, (batch or 1, heads or 1, queries, keys), bool or additive; or a
            dict of prepared ones by kind of layer; or None.
        rows: The prompts.
        view: The cache that begins with them.
        shape: (batch, queries).
        device: Of the inputs.
        config: Of the model.
    """
    batch, queries = shape
    window = getattr(config, "sliding_window", None)
    if isinstance(mask, dict):
        if "chunked_attention" in mask:
            raise UnsupportedError(
                "The masks of chunked attention were prepared before the prompt was there, which moves the bounds of "
                "the chunks (generate does so for static caches). Use a dynamic cache with this model, or give the "
                "mask of padding, of shape (batch, length)."
            )
        windows = {name: None if name == "full_attention" else window for name in mask}
        return {name: _prepared(part, rows, view, shape, device, windows[name]) for name, part in mask.items()}
    if mask is None:
        mask = torch.ones(batch, queries + int(view.get_seq_length()) - rows.length, dtype=torch.long, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return torch.cat([rows.visible(batch, mask.device).to(mask), mask], dim=1)
    one_kind = bool(view.is_sliding) and all(view.is_sliding)
    return _prepared(mask, rows, view, shape, device, window if one_kind else None)


def _prepared(
    mask: Tensor | None, rows: Rows, view: View, shape: tuple[int, int], device: torch.device, window: int | None
) -> Tensor | None:
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedError(
            f"An attention mask of type {type(mask).__name__} can't be given together with a prompt; pass the mask of "
            "padding, of shape (batch, length)."
        )
    batch, queries = shape
    layer = next((i for i, slides in enumerate(view.is_sliding) if slides == (window is not None)), 0)
    if not view.in_sight(layer):
        return mask
    ends = view.get_seq_length(layer) + torch.arange(queries, device=device)[:, None]
    seen = _causal(torch.arange(rows.length, device=device), ends, window)
    seen = seen & rows.visible(batch, device)[:, None, None, :]
    if (
        mask is None
    ):  # a mask that the model would have left to `is_causal`, which assumes keys and queries begin together
        keys = torch.arange(rows.length, view.mask_length(queries, layer), device=device)
        return torch.cat([seen, _causal(keys, ends, window).expand(batch, 1, -1, -1)], dim=-1)
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.cat([seen.expand(-1, mask.shape[1], -1, -1), mask.expand(batch, -1, -1, -1)], dim=-1)


def _causal(keys: Tensor, ends: Tensor, window: int | None) -> Tensor:
    """Which keys a query at each of `ends` sees, shape (queries, keys)."""
    seen = keys <= ends
    return seen if window is None else seen & (keys > ends - window)
