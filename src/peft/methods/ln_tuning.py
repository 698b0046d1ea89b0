"""LN tuning: normalisation layers are trained whole, as copies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from peft import routing
from peft.auxiliary import ModulesToSaveWrapper
from peft.config import TargetedConfig
from peft.errors import ConfigError
from peft.method import WeightMethod


@dataclass
class LNTuningConfig(TargetedConfig):
    """LayerNorm tuning (arXiv 2312.11420): all parameters of the target modules train, normally of norms.

    Any module can be a target. One adapter can be active at a time.

    Example:
        >>> import torch
        >>> from peft import LNTuningConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> get_peft_model(model, LNTuningConfig(target_modules=["1"])).get_nb_trainable_parameters()
        (8, 36)
    """

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {"layers_to_transform", "layers_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_parameters:
            raise ConfigError("LN tuning trains whole modules: name them in target_modules, not in target_parameters.")


class LNTuningLayer(ModulesToSaveWrapper):
    """A module (`base_layer`) with a trained copy per adapter (`ln_tuning_layers`)."""

    original, copies = "base_layer", "ln_tuning_layers"
    adapter_layer_names = ("ln_tuning_layers",)

    _kept: nn.Module | None = None

    @property
    def original_module(self) -> nn.Module:  # type: ignore[override]
        """The module as it was."""
        return self._kept or self._modules["base_layer"]  # type: ignore[return-value]

    @property
    def modules_to_save(self) -> nn.ModuleDict:  # type: ignore[override]
        """The copies by adapter."""
        return self._modules["ln_tuning_layers"]  # type: ignore[return-value]

    def module(self, name: str | None) -> nn.Module:
        return self._modules["base_layer"] if name in self.merged_adapters else super().module(name)  # type: ignore[return-value]

    def _chosen(self, route: routing.Route | None) -> str | None:
        merged = self.merged_adapters if route is None and not self._disable_adapters else ()
        return merged[0] if merged else super()._chosen(route)

    def check_merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        names = self._active_adapter if adapter_names is None else adapter_names
        names = [*self.merged_adapters, *(n for n in names if n in self.names() and n not in self.merged_adapters)]
        if len(names) > 1:
            raise ConfigError(f"One module can't be several copies at once: of {names}, merge only one adapter.")
        if safe_merge and names and not all(p.isfinite().all() for p in self.trained(names[0])):
            raise ValueError(f"NaNs or infinities in the copy of adapter {names[0]!r}. Nothing was merged.")

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put the trained copy where the module stood. The output does not change."""
        self.check_merge(safe_merge, adapter_names)
        names = self._active_adapter if adapter_names is None else adapter_names
        for name in (n for n in names if n in self.names() and n not in self.merged_adapters):
            merged = self.settled(copy.deepcopy(self.modules_to_save[name]))
            self.__dict__["_kept"] = self._modules["base_layer"]  # no submodule, as merged layers keep their weights
            self._modules["base_layer"], self.merged_adapters = merged, [name]

    def unmerge(self) -> None:
        """Put the module back."""
        if self._kept is not None:
            self._modules["base_layer"], self.merged_adapters = self.__dict__.pop("_kept"), []

    def _apply(self, fn: Any, recurse: bool = True) -> LNTuningLayer:
        if self._kept is not None:
            self._kept._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> LNTuningLayer:
        if self._kept is not None:
            self._kept.train(mode)
        return super().train(mode)

    def rename_adapter(self, old: str, new: str) -> None:
        super().rename_adapter(old, new)
        self.merged_adapters = [new if n == old else n for n in self.merged_adapters]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        names = self.modules_to_save[adapter_name].state_dict()
        return {f"{self.copies}.{k}": f"{self.copies}.{adapter_name}.{k}" for k in names}


class LNTuning(WeightMethod, peft_type="LN_TUNING", config=LNTuningConfig):
    """Nothing is added to a weight here; copies stand in for modules."""

    copies = LNTuningLayer
