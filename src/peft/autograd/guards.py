"""Where a fused form may stand in: layers that may be computed past, plain tensors, the dtype in which they meet."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_PLAIN = (Tensor, nn.Parameter)
_AS_IT_IS = nullcontext()


def can_fuse(module: nn.Module) -> bool:
    """Whether a base layer may be computed past: nothing compiles or transforms its call, or watches it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or _has_any_global_hook():
        return False
    if "forward" in module.__dict__:  # replaced on this one module, as accelerate does to bring weights it offloads
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether all that are there are dense tensors of torch's own classes."""
    for t in tensors:  # noqa: SIM110  (a loop, since this runs for each layer of each token)
        if t is not None and (type(t) not in _PLAIN or t.layout is not torch.strided):
            return False
    return True


def no_autocast(x: Tensor) -> Any:
    """A context without autocast on the device of x, where it is on: what runs there has its dtype already."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


def computes_in(x: Tensor, weight: Tensor, autocast: bool) -> torch.dtype | None:
    """The dtype that a linear layer computes in; None where it would refuse, or where autocast leaves x alone."""
    if not autocast:
        return weight.dtype if x.dtype == weight.dtype else None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
