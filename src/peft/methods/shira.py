"""SHiRA: sparse high-rank updates (arXiv 2406.13175)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig, positive
from peft.errors import PeftWarning, TargetError
from peft.hosts import Host
from peft.hosts.parameter import lend
from peft.method import Site, WeightMethod
from peft.methods._places import draw, must_fit
from peft.operators import Sparse, scaled
from peft.parts import Parts
from peft.slots import Slot
from peft.updates import Add, Update


@dataclass
class ShiraConfig(TargetedConfig):
    """SHiRA (arXiv 2406.13175): W + S, S sparse with r (in + out) trained entries, as many as LoRA of rank r has.

    The places are random, or those of your own `mask_fn(base_layer, r, **kwargs)`, set on the config before it is used:
    it returns a mask shaped as the layer's weight with exactly r (in + out) ones. Files hold the places.

    Example:
        >>> from peft import ShiraConfig
        >>> config = ShiraConfig(r=32, target_modules=["q_proj", "v_proj"])
        >>> config.mask_fn = lambda layer, r, **kwargs: layer.weight.abs() > 0.1
    """

    r: int = field(default=32, metadata={"help": "Entries per layer, counted as r (in + out)."})
    mask_type: Literal["random"] = field(
        default="random", metadata={"help": "'random', or a name for what your `mask_fn` does."}
    )
    random_seed: int | None = field(default=None, metadata={"help": "Seed of random places; None is a fixed one too."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    init_weights: bool = field(default=True, metadata={"help": "Entries zero, so training starts at the base model."})

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r")
        self.mask_fn: Callable[..., Tensor] | None = random_mask if self.mask_type == "random" else None


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """A mask, shaped as the layer's weight, with r (rows + columns) ones at random places."""
    weight: Any = base_layer.weight
    rows, columns = weight.shape
    index = draw(rows, columns, r * (rows + columns), random_seed).to(weight.device)
    return torch.zeros_like(weight, dtype=torch.float32).index_put(tuple(index), torch.tensor(1.0))


class Shira(WeightMethod, peft_type="SHIRA", config=ShiraConfig):
    slots = (
        Slot("shira_weight", "count"),
        Slot("shira_indices", "2 count", kind="buffer", trains=False, dtype=torch.int32),
    )
    linear = True
    settings = ("r", "scaling")
    samples = ({"r": 1}, {"r": 1, "random_seed": 3, "init_weights": False})

    def resolve(self, config: ShiraConfig, host: Host, site: Site) -> dict[str, Any]:
        count = config.r * (host.out_features + host.in_features)
        must_fit(f"r = {config.r}", count, site.key, host.out_features, host.in_features)
        return {"r": config.r, "scaling": 1.0, "count": count}

    def reset(self, p: Parts, host: Host) -> None:
        nn.init.zeros_(p.shira_weight) if p.config.init_weights else nn.init.normal_(p.shira_weight)
        p.shira_indices.copy_(self.places(p, host))

    def places(self, p: Parts, host: Host) -> Tensor:
        """Rows and columns (2, count) of the trained entries, row by row."""
        config, count, (out, inner) = p.config, p.shira_weight.shape[0], (host.out_features, host.in_features)
        if config.mask_fn is None:
            message = f"mask_type is {config.mask_type!r} without a mask_fn: the places are unknown until they load."
            warnings.warn(message, PeftWarning, stacklevel=2)
            return torch.zeros_like(p.shira_indices)
        if config.mask_fn is random_mask:
            rows, columns = draw(out, inner, count, config.random_seed)
            flat = (rows * inner + columns).sort().values
            return torch.stack((flat // inner, flat % inner))
        twin = copy.copy(host)
        mask = config.mask_fn(host.module, config.r, random_seed=config.random_seed)
        twin.module = lend(host.module, **{host.parameter: mask})
        found = torch.stack(torch.where(host.native(mask) if host.opaque else twin.weight()))
        if found.shape[1] != count:
            where = p.site.key if p.site else host.name
            raise TargetError(
                f"mask_fn chose {found.shape[1]} entries of {where!r}; with r = {config.r} it has to choose "
                f"r (in + out) = {count}."
            )
        return found

    def update(self, p: Parts, host: Host) -> Update:
        values = scaled(p.shira_weight, p.scaling)
        return Add(Sparse(p.shira_indices, values, host.out_features, host.in_features))
