"""How the host of a module is found: by its class, then by what it holds and whether it runs as its class does."""

from __future__ import annotations

import torch
from torch import nn

from peft.hosts.base import Host, named_host, qualified
from peft.hosts.embedding import EmbeddingHost
from peft.hosts.linear import LinearHost
from peft.hosts.opaque import SELF_RUN, OpaqueEmbeddingHost, OpaqueLinearHost, is_packed, sizes, stored
from peft.hosts.tensors import PACKED, is_packed_tensor

_PACKED_OTHERWISE: dict[type[Host], type[Host]] = {LinearHost: OpaqueLinearHost, EmbeddingHost: OpaqueEmbeddingHost}
"""Where the layer alone knows what its weight means. No others: what can't be read right is refused."""


def host_class(module: nn.Module) -> type[Host] | None:
    """The host for a module, or None if it can't be adapted."""
    host = named_host(module)
    if host is None:
        return OpaqueLinearHost if _quantised_linear(module) else None
    if host.opaque:
        return host
    weight = module._parameters.get(host.parameter)
    weight = getattr(module, host.parameter, None) if weight is None else weight  # parametrised ones are properties
    if weight is None:
        return OpaqueLinearHost if host is LinearHost and stored(module) else host
    if is_packed(weight):
        return (PACKED if is_packed_tensor(weight) else _PACKED_OTHERWISE).get(host)
    return SELF_RUN[host] if host in SELF_RUN and _runs_itself(module, host) else host


def _runs_itself(module: nn.Module, host: type[Host]) -> bool:
    """Whether a module does not run as the class that the host is for."""
    if module.__dict__.get("forward") is not None:  # accelerate moves tensors there and runs the layer's own
        return getattr(module, "_hf_hook", None) is None
    own = type(module)
    plain = next(cls for cls in own.__mro__ if qualified(cls) in host.types)
    return any(getattr(own, name, None) is not getattr(plain, name, None) for name in ("forward", "_conv_forward"))


def _quantised_linear(module: nn.Module) -> bool:
    """Whether a module of unknown type has the sizes of a linear layer and a packed tensor in place of its weight."""
    shape = sizes(module)
    if shape is None or module._modules:
        return False
    held = stored(module)
    weight = held.get("weight")
    if weight is not None and not is_packed(weight):
        return False
    least = shape[0] * shape[1] // 2  # half a bit for each element of W
    return any(
        is_packed(t) and t.dtype != torch.bool and 8 * t.element_size() * t.numel() >= least for t in held.values()
    )
