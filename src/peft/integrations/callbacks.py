"""Callbacks for transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peft.errors import PeftWarning
from peft.tuner import BaseTuner


class AllocationCallback(TrainerCallback):
    """Tells adapters that prune themselves while training (AdaLoRA, AdaMSS) of every optimizer step.

    Example:
        >>> from peft.integrations.callbacks import AllocationCallback
        >>> callbacks = [AllocationCallback()]  # Trainer(..., callbacks=callbacks)
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Warn if the schedule of an adapter does not end where training ends."""
        for tuner in _pruning(model):
            for name in tuner.active_adapters:
                planned = getattr(tuner.peft_config[name], "total_step", None)
                if planned is not None and planned != state.max_steps:
                    warnings.warn(
                        f"Adapter {name!r} prunes over total_step={planned} steps, but training has {state.max_steps}. "
                        f"Set total_step={state.max_steps} in its config.",
                        PeftWarning,
                        stacklevel=2,
                    )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prune; gradients are still there."""
        for tuner in _pruning(model):
            tuner.update_and_allocate(state.global_step + 1)


AdamssAsaCallback = AllocationCallback


def _pruning(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, BaseTuner) and hasattr(type(m), "update_and_allocate"))


__all__ = ["AdamssAsaCallback", "AllocationCallback"]
