"""LN tuning: normalisation layers are trained whole, as copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

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

    @property
    def original_module(self) -> nn.Module:  # type: ignore[override]
        """The module as it was."""
        return self._modules["base_layer"]  # type: ignore[return-value]

    @property
    def modules_to_save(self) -> nn.ModuleDict:  # type: ignore[override]
        """The copies by adapter."""
        return self._modules["ln_tuning_layers"]  # type: ignore[return-value]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        names = self.modules_to_save[adapter_name].state_dict()
        return {f"{self.copies}.{k}": f"{self.copies}.{adapter_name}.{k}" for k in names}


class LNTuning(WeightMethod, peft_type="LN_TUNING", config=LNTuningConfig):
    """Nothing is added to a weight here; copies stand in for modules."""

    copies = LNTuningLayer
    samples = ()
