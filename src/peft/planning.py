"""A dry run: what a config would do to a model, before anything is changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peft import inject, serving, whole
from peft.checkpoint import state, tensors
from peft.config import PeftConfig
from peft.errors import ConfigError
from peft.status import count_parameters


@dataclass
class PlanReport:
    """What `plan` found.

    Attributes:
        modules: Paths of the layers that would be adapted, with the entry of the config that matched each.
        parameters: Paths of parameters that would be adapted, likewise.
        whole: Paths of modules that would be trained whole.
        tokens: Embeddings of which rows would train, with the token ids.
        unmatched: Entries that match nothing, by field of the config.
        excluded: Paths that match and are excluded.
        trainable: Parameters that would train.
        total: Parameters that the model would have.
        bytes: Size of `adapter_model.safetensors`.
        serving: Why a serving engine would refuse the adapter, by engine; engines that take it are not listed.
    """

    modules: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    trainable: int = 0
    total: int = 0
    bytes: int = 0
    serving: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines = [
            f"{len(self.modules) + len(self.parameters)} layers, {self.trainable:,} of {self.total:,} parameters "
            f"({share:.4f} %)"
        ]
        lines.append(f"{_size(self.bytes)} on disk")
        by_entry: dict[str, list[str]] = {}
        for path, entry in {**self.modules, **self.parameters}.items():
            by_entry.setdefault(entry, []).append(path)
        lines += [f"  {entry}: {len(paths)} × e.g. {paths[0]}" for entry, paths in by_entry.items()]
        lines += [f"trained whole: {', '.join(self.whole)}"] if self.whole else []
        lines += [f"token rows: {path} {ids}" for path, ids in self.tokens.items()]
        lines += [f"excluded: {len(self.excluded)} × e.g. {self.excluded[0]}"] if self.excluded else []
        lines += [f"matches nothing: {name} {entries}" for name, entries in self.unmatched.items() if entries]
        lines += [f"{engine} would refuse it: {'; '.join(why)}" for engine, why in self.serving.items()]
        return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes with the unit that suits them.

    >>> _size(512), _size(5_120), _size(1_234_567)
    ('512 B', '5.12 kB', '1.23 MB')
    """
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.2f} kB" if count < 1e6 else f"{count / 1e6:,.2f} MB"


def plan(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> PlanReport:
    """What `get_peft_model(model, config)` would do. Neither the model nor the config is changed.

    Args:
        model: The base model, on any device; its weights are not read.
        config: The config of a method that changes layers.
        adapter_name: The adapter's name.

    Returns:
        A report that prints well.

    Raises:
        TargetError: what `get_peft_model` would raise, except for entries that match nothing: those are reported.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, plan
        >>> print(plan(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"])))
        1 layers, 14 of 29 parameters (48.2759 %)
        240 B on disk
          0: 1 × e.g. 0
    """
    if config.is_prompt_learning:
        raise ConfigError("plan looks at methods that change layers; a prompt changes none.")
    twin = _without_weights(whole.base_of(model))
    asked: Any = copy.deepcopy(config)
    asked.allow_unmatched = True
    made = inject.inject(twin, asked, adapter_name, low_cpu_mem_usage=True)
    twin.peft_config = {adapter_name: asked}  # type: ignore[assignment]
    whole.set_adapter(twin, adapter_name)
    values = state.get_peft_model_state_dict(twin, adapter_name=adapter_name)
    trainable, total = count_parameters(twin)
    return PlanReport(
        modules=made.matches.modules,
        parameters=made.matches.parameters,
        whole=made.whole,
        tokens=made.tokens,
        unmatched={name: entries for name, entries in made.matches.unmatched.items() if entries},
        excluded=made.matches.excluded,
        trainable=trainable,
        total=total,
        bytes=tensors.encode(values).nbytes,
        serving=serving.refusals(asked, list(values)),
    )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors are on the meta device and take no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
