"""The module between a `PeftModel` and its base model: adapters of weight methods, for the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft import inject, registry, routing, whole
from peft.auxiliary import AuxiliaryTrainingWrapper
from peft.checkpoint import keys
from peft.combine.models import add_weighted_adapter
from peft.config import PeftConfig, TargetedConfig
from peft.errors import ConfigError
from peft.layer import AdaptedLayer, marker
from peft.method import method_of


class BaseTuner(nn.Module):
    """Wraps a model and holds adapters by name in its layers. Attributes it lacks are those of the model.

    Args:
        model: The base model; changed in place.
        peft_config: A config, or configs by adapter name.
        adapter_name: Name of the adapter to add.
        low_cpu_mem_usage: Create adapters on the meta device.
        state_dict: Adapt the modules that these tensors belong to, whatever the config's targets.
    """

    prefix: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    uses_shared_state: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, Any] = (
            dict(peft_config) if isinstance(peft_config, Mapping) else {adapter_name: peft_config}
        )
        self.active_adapter: str | list[str] = adapter_name
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        model.peft_config = self.peft_config  # type: ignore[assignment]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict:
        """The model's config as a dict; a model without one counts as `custom`."""
        config = getattr(model, "config", None)
        if config is None:
            return {"model_type": "custom"}
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter whose config is in `peft_config`."""
        config: TargetedConfig = self.peft_config[adapter_name]
        wanted = None if state_dict is None else keys.modules_of(state_dict, method_of(config))
        custom = type(self)._create_and_replace is not BaseTuner._create_and_replace
        plan = inject.inject(
            model,
            config,
            adapter_name,
            root=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            keys=wanted,
            create=self._create if custom else None,
        )
        self.targeted_module_names = [t.key for t in plan.targets if t.parameter is None]
        self.targeted_parameter_names = [f"{t.key}.{t.parameter}" for t in plan.targets if t.parameter]
        if adapter_name in self.active_adapters:
            if not plan.first or config.inference_mode:  # what is alone is active and trains
                self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        else:
            whole.stand_by(model, adapter_name, self.active_adapters)

    def _create(self, model: nn.Module, config: Any, name: str, target: inject.Target, options: Any, undo: Any) -> None:
        parent, leaf = inject.parent_of(model, target.key)
        key, self._injection = target.key, (model, target, options, undo)
        extra = {} if target.parameter is None else {"parameter_name": target.parameter}
        self._create_and_replace(config, name, target.module, leaf, parent, current_key=key, **extra)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Called for each target by subclasses and patches that want to step in; this does the work."""
        model, place, options, undo = self._injection
        inject.wrap(model, peft_config, adapter_name, place, options, undo)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active, in this order, and trainable unless `inference_mode`."""
        whole.set_adapter(self.model, adapter_name, inference_mode)
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else list(adapter_name)
        if len(self.active_adapters) == 1:
            self.active_adapter = self.active_adapters[0]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        whole.set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, the first of the others becomes active."""
        if adapter_name not in self.peft_config:
            raise ConfigError(f"Adapter {adapter_name!r} does not exist. Adapters: {list(self.peft_config)}.")
        was_active = adapter_name in self.active_adapters
        whole.delete_adapter(self.model, adapter_name)
        del self.peft_config[adapter_name]
        left = whole.successors(self.active_adapters, self.peft_config, adapter_name)
        if was_active and left:
            self.set_adapter(left)
        self.active_adapter = left[0] if len(left) == 1 else left

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name, keeping its place in the order.

        Raises:
            AdapterNameError: there is no such adapter, or already one of the new name.
        """
        whole.rename_adapter(self.model, old, new)
        configs = {new if name == old else name: config for name, config in self.peft_config.items()}
        self.peft_config.clear()
        self.peft_config.update(configs)
        left = [new if name == old else name for name in self.active_adapters]
        self.active_adapter = left[0] if len(left) == 1 else left

    def enable_adapter_layers(self) -> None:
        """Run with adapters."""
        whole.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Run as the base model."""
        whole.enable_adapters(self.model, False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (None: the active ones) into the base weights. The output does not change.

        If a layer would refuse, nothing is merged.
        """
        whole.merge_all(self.model, safe_merge, adapter_names)
        for copies in whole.copies(self.model):
            copies.merge(safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """Restore the base weights, bit for bit."""
        for layer in whole.layers(self.model):
            if layer.merged:
                layer.unmerge()
        for copies in whole.copies(self.model):
            copies.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold adapters into the base weights and return the plain model, without any trace of adapters."""
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Return the plain base model, as it was."""
        return self._unload_and_optionally_merge(False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        model = whole.unload(self.model, merge, safe_merge, adapter_names, progressbar)
        model.__dict__.pop("peft_config", None)
        return model

    add_weighted_adapter = add_weighted_adapter

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer of the adapter is a weight that LoRA can approximate."""
        mine = [layer for layer in whole.layers(self.model) if adapter_name in layer.available_adapters]
        return bool(mine) and all(layer.supports_lora_conversion(adapter_name) for layer in mine)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Bring half precision weights of an adapter to float32, in which they train stably."""
    if not autocast_adapter_dtype:
        return
    for layer in whole.layers(model):
        if adapter_name not in layer.available_adapters:
            continue
        for _, value in layer.slots(adapter_name):
            for parameter in value.parameters() if isinstance(value, nn.Module) else (value,):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()


@cache
def tuner_class(peft_type: str) -> type[BaseTuner]:
    """The tuner class of a method, e.g. `LoraModel`."""
    method = registry.method(peft_type)
    body = {
        "prefix": method.prefix,
        "peft_type": peft_type,
        "tuner_layer_cls": marker(peft_type),
        "__module__": f"peft.tuners.{peft_type.lower()}.model",
        "__reduce_ex__": _reduce,
        **method.tuner_methods,
    }
    return type(f"{method.class_name}Model", (BaseTuner,), body)


def _reduce(tuner: BaseTuner, protocol: Any) -> Any:
    """Pickles name the method: the module of a third-party method's tuner class exists nowhere."""
    return _rebuild, (tuner.peft_type,), tuner.__dict__


def _rebuild(peft_type: str) -> BaseTuner:
    cls = tuner_class(peft_type)
    tuner = cls.__new__(cls)
    nn.Module.__init__(tuner)
    return tuner


def has_adapters(model: nn.Module) -> bool:
    """Whether anything in the model is adapted."""
    return any(isinstance(m, (AdaptedLayer, AuxiliaryTrainingWrapper)) for m in model.modules())


__all__ = ["BaseTuner", "cast_adapter_dtype", "has_adapters", "routing", "tuner_class"]
