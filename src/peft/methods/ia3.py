"""(IA)³: vectors that scale outputs, or inputs of feed-forward layers (arXiv 2205.05638)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from peft import targets
from peft.config import TargetedConfig
from peft.errors import ConfigError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Diagonal
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import After, Before, Rewrite, Update


@dataclass
class IA3Config(TargetedConfig):
    """(IA)³ (arXiv 2205.05638): l ∘ (W x + b), and W (l ∘ x) + b for the targets that are feed-forward, l trained.

    Convolutions have one factor per channel. Both lists default to those of the model's architecture.

    Raises:
        ConfigError: `feedforward_modules` names something that `target_modules` does not.

    Example:
        >>> from peft import IA3Config
        >>> config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        >>> config.feedforward_modules
        {'down_proj'}
    """

    feedforward_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Targets whose input is scaled: names, or a regex. [] for none."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    init_ia3_weights: bool = field(default=True, metadata={"help": "Ones, so training starts at the base model."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {"layers_to_transform", "layers_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set):
            foreign = sorted(self.feedforward_modules - self.target_modules)
            if foreign:
                raise ConfigError(
                    f"`feedforward_modules` should be a subset of `target_modules`: {foreign} are not among "
                    f"{sorted(self.target_modules)}. Add them there, or leave them out here."
                )


def _shape(sizes: Sizes) -> tuple[int, ...]:
    if sizes.kernel:
        return (1, sizes.factors, *(1 for _ in sizes.kernel))
    return (1, sizes.factors) if sizes.is_feedforward else (sizes.factors, 1)


class IA3(WeightMethod, peft_type="IA3", config=IA3Config):
    slots = (Slot("ia3_l", _shape),)
    linear = True
    settings = ("is_feedforward",)
    samples = (
        {"feedforward_modules": []},
        {"feedforward_modules": ".*"},
        {"feedforward_modules": [], "init_ia3_weights": False},
    )

    def complete(self, config: IA3Config, model: nn.Module) -> None:
        if config.feedforward_modules is not None:
            return
        table, known = targets.feedforward_table(), targets.model_type(model)
        if known not in table:
            raise ConfigError(
                f"Please specify `feedforward_modules` in the IA3Config: there is no default for the architecture "
                f"{known!r}. Name the targets whose input is to be scaled; [] scales outputs only."
            )
        found = table[known]
        config.feedforward_modules = found if isinstance(found, str) else set(found)

    def identity_at_start(self, config: IA3Config) -> bool:
        return config.init_ia3_weights

    def resolve(self, config: IA3Config, host: Host, site: Site) -> dict[str, Any]:
        match = targets.matcher(config.feedforward_modules, "IA3Config.feedforward_modules")
        inside = match is not None and match.entry(site.key) is not None
        channels = host.in_features * host.groups // math.prod(host.kernel)
        return {"is_feedforward": inside, "factors": channels if inside else host.out_features, "kernel": host.kernel}

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.ones_(p.ia3_l) if p.config.init_ia3_weights else nn.init.normal_(p.ia3_l)

    def update(self, p: Parts, host: Host) -> Update:
        factors: Tensor = p.ia3_l
        if not p.is_feedforward:
            return After(Diagonal(factors))
        if math.prod(host.kernel) == 1 and host.groups == 1:
            return Before(Diagonal(factors))
        columns = factors.flatten().repeat_interleave(math.prod(host.kernel))
        if host.groups == 1:
            return Before(Diagonal(columns))
        # Each group of outputs sees channels of its own, so no one matrix stands before W.
        gain = columns.view(host.groups, -1).repeat_interleave(host.out_features // host.groups, dim=0)
        return Rewrite(lambda weight: weight * (gain - 1))
