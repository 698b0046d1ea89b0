"""`get_peft_model` and `inject_adapter_in_model`: the two ways in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from peft import inject
from peft.config import PeftConfig
from peft.errors import ConfigError, PeftWarning
from peft.model import PeftModel
from peft.persistence import name_of
from peft.tasks import model_class
from peft.tuner import has_adapters, tuner_class


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze a model and put an adapter into it, ready to train.

    Args:
        model: The base model; changed in place.
        peft_config: Which method, where, how large. `task_type` chooses the class that is returned.
        adapter_name: The adapter's name.
        mixed: Return a `PeftMixedModel`.
        autocast_adapter_dtype: Train adapters of half precision models in float32.
        revision: Revision of the base model, for the adapter's config.
        low_cpu_mem_usage: Create the adapter on the meta device, for a load that follows.

    Raises:
        TargetError: a target does not exist, or can't be adapted by the method. The model is as it was.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 14 || all params: 29 || trainable%: 48.2759
    """
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config is a {type(peft_config).__name__}; give a config object, such as LoraConfig(...)."
        )
    if isinstance(model, PeftModel) or has_adapters(model):
        warnings.warn(
            "The model has adapters already. To add another one, call model.add_adapter(name, config); to start "
            "afresh, call model.unload() first.",
            PeftWarning,
            stacklevel=2,
        )
    if (name := name_of(model)) is not None:
        peft_config.base_model_name_or_path = name
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft_config.revision {peft_config.revision!r} is replaced by {revision!r}.", PeftWarning, stacklevel=2
            )
        peft_config.revision = revision
    if mixed:
        from peft.mixed_model import PeftMixedModel

        return PeftMixedModel(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    if peft_config.is_prompt_learning and peft_config.task_type is None:
        raise ConfigError("Prompt methods need to know the model's task: set task_type, e.g. task_type='CAUSAL_LM'.")
    return model_class(peft_config.task_type)(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model without wrapping it: same object, same class, `model.peft_config` set.

    Args:
        peft_config: Config of a method that changes layers.
        model: The model; changed in place.
        adapter_name: The adapter's name.
        low_cpu_mem_usage: Create the adapter on the meta device, for a load that follows.
        state_dict: Adapt just the modules that these tensors belong to.

    Returns:
        `model`.

    Raises:
        ConfigError: prompt methods have nothing to inject.
        TargetError: as in `get_peft_model`.
    """
    if peft_config.is_prompt_learning:
        raise ConfigError("`inject_adapter_in_model` does not support prompt learning; use get_peft_model.")
    configs = dict(getattr(model, "peft_config", None) or {})
    configs[adapter_name] = peft_config
    tuner_class(inject.peft_type_name(peft_config))(
        model, configs, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    return model
