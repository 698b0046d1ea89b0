"""The adapted layer: the one forward, the one merge, and the bookkeeping of adapters by name on one base layer.

What is in effect is a stack of adapters in the order of `active_adapters`. The stack is folded over the base layer, on
the way (`forward`) or on the parameters (`merge`), by the same updates, so the two can't disagree. Merging swaps
the base layer's parameters for new ones and keeps the old, so unmerging is exact in every dtype and a merged part of
the stack never changes what the whole computes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft import autograd, registry, routing
from peft.errors import AdapterNameError, ConfigError, PeftWarning, StateError, TargetError, UnsupportedError, nearest
from peft.hosts import Host, host_class
from peft.hosts.parameter import ParameterHost, lend
from peft.method import Site, WeightMethod, method_of
from peft.parts import Call, Parts
from peft.rows import batched
from peft.slots import Sizes, adapter_dtype, container, create
from peft.updates import Update

_EXPERT = re.compile(r"(^|\.)experts?\.\d+(\.|$)")
"""Paths of layers inside one expert of a mixture, which see the tokens that a router sends there."""
_ADAPTER_STATE = ("base_layer", "_adapters", "_active_adapter", "merged_adapters")


class BaseTunerLayer:
    """What every adapted layer is: `isinstance(module, BaseTunerLayer)` finds them all."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A base layer and its adapters, any number of any methods.

    Args:
        base_layer: The layer to adapt; frozen parameters are the caller's business.
        adapter_name: If given with `config`, an adapter to add at once.
        config: Its config.
        parameter_name: Adapt this parameter of the module instead of the module's weight.
        **kwargs: Options of `add_adapter`.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from peft.tuners.lora import Linear
        >>> layer = Linear(torch.nn.Linear(4, 3), "default", config=LoraConfig(r=2))
        >>> layer(torch.ones(1, 4)).shape
        torch.Size([1, 3])
    """

    host_cls: ClassVar[type[Host]]
    methods: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: Any = None,
        *,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        if parameter_name is not None:
            self.parameter_name = parameter_name
        self.training = base_layer.training
        self._adapters: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        self._banks: dict[str, nn.Module] = {}
        self._dispatched = False
        self._uncalled = False
        self._leaders: dict[str, AdaptedLayer] = {}
        self._followers: dict[str, list[AdaptedLayer]] = {}
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._originals: dict[str, Any] = {}
        self._caches: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        if adapter_name is not None:
            kwargs.pop("is_target_conv_1d_layer", None)
            self.update_layer(adapter_name, config=config, **kwargs)
            self.set_adapter(adapter_name)

    # identity

    @property
    def host(self) -> Host:
        """The base layer as a weight that acts."""
        if self.host_cls is ParameterHost:
            return ParameterHost(self.base_layer, self.parameter_name)
        return self.host_cls(self.base_layer)

    @property
    def frozen(self) -> Host:
        """The base layer as it is without merged adapters; what methods see."""
        host = self.host
        if not self.merged_adapters:
            return host
        twin = lend(host.module, **self._parameters_as_they_were(host))
        twin.__dict__.update(self._originals["attributes"])
        return ParameterHost(twin, self.parameter_name) if self._is_parameter else self.host_cls(twin)

    def get_base_layer(self) -> nn.Module:
        """The innermost layer, under nested adapted layers."""
        layer: nn.Module = self
        while isinstance(layer, AdaptedLayer):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; the adapters' too where nobody calls the layer, as in `nn.MultiheadAttention`."""
        return self._read()[0] if self._uncalled else self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias; see `weight`."""
        return self._read()[1] if self._uncalled else self.get_base_layer().bias  # type: ignore[return-value]

    def _read(self) -> tuple[Tensor, Tensor | None]:
        route, dtype = routing.current(), self.host.dtype
        if route is not None and route.rows is not None:
            raise UnsupportedError(
                "adapter_names mixes adapters, but torch's attention reads the weight of its out_proj once for the "
                "whole "
                "batch. Adapt the attention module itself, or run one adapter at a time (model.use(name))."
            )
        weight, bias = self.effective()
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    @property
    def in_features(self) -> int:
        """Columns of the weight as a matrix."""
        return self.host.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight as a matrix."""
        return self.host.out_features

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as (in, out)."""
        return self.host_cls.fan_in_fan_out

    def get_param(self) -> Tensor:
        """The stored parameter that is adapted."""
        return ParameterHost(self.get_base_layer(), self.parameter_name).raw if self._is_parameter else self.host.raw

    @property
    def _is_parameter(self) -> bool:
        return self.host_cls is ParameterHost

    def __getattr__(self, name: str) -> Any:
        """Attributes that the layer lacks are those of the base layer; adapter dicts that it lacks are empty."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _ADAPTER_STATE or "base_layer" not in self._modules:
                raise
            if name in type(self).adapter_layer_names:
                return nn.ParameterDict() if "embedding" in name else nn.ModuleDict()
            return getattr(self._modules["base_layer"], name)

    # adapters by name

    def add_adapter(
        self,
        name: str,
        config: Any,
        *,
        site: Site | None = None,
        meta: bool = False,
        autocast: bool = True,
        banks: dict[str, nn.Module] | None = None,
        leader: AdaptedLayer | None = None,
    ) -> None:
        """Add an adapter, or replace the one of that name. It is not activated.

        Args:
            name: Its name; no dots.
            config: The config of a weight method.
            site: Where the layer is in the model.
            meta: Allocate nothing (tensors arrive later, by loading).
            autocast: Keep adapters of half precision bases in float32.
            banks: Shared tensors of the adapter, by name.
            leader: Take part in this layer's adapter (`follow`).

        Raises:
            TargetError: the method has no meaning on this layer.
        """
        site = site or Site(key="")
        if name in self.merged_adapters:
            raise StateError(f"Adapter {name!r} is merged into {site.key!r}; unmerge it before you replace it.")
        if leader is not None:
            self.follow(name, config, leader)
            return
        method, host = method_of(config), self.frozen
        try:
            settings = method.resolve(config, host, site)
            sizes = Sizes(settings)
            sizes.update({"in": host.in_features, "out": host.out_features, "groups": host.groups, **host.layout})
            device = torch.device("meta") if meta else host.device
            dtype = adapter_dtype(host.dtype, autocast)
            made = {
                host.slot_name(slot.name) if slot.host_names_it else slot.name: (
                    slot,
                    create(slot, host, sizes, host.device if slot.derived else device, dtype),
                )
                for slot in method.slots
                if slot.exists(sizes)
            }
        except ConfigError as error:
            if isinstance(error, TargetError):
                raise
            where = f" on {site.key!r} ({type(host.module).__name__}, {host.in_features} in, {host.out_features} out)"
            raise TargetError(f"{method.peft_type}{where}: {error}") from None
        for stored, (slot, value) in made.items():
            held = self._modules.get(stored)
            if held is not None and type(held) is not type(container(value, slot.is_saved(config))):
                raise TargetError(
                    f"{method.peft_type} on {site.key!r}: {' and '.join(self.methods)} keeps its own kind of "
                    f"{stored!r} "
                    "there, so the two can't share a layer. Give them different target_modules."
                )
        self._forget(name)
        if method.peft_type not in self.methods:
            self.__class__ = layer_class((*self.methods, method.peft_type), self.host_cls)
        self._adapters[name] = config
        for stored, (slot, value) in made.items():
            self._stored[slot.name] = stored
            if stored not in self._modules:
                self._modules[stored] = container(value, slot.is_saved(config))
            held = self._modules[stored]
            held[name] = value  # type: ignore[index]
        if method.dropout:
            rate = float(getattr(config, method.dropout, 0.0))
            if rate and not host.factored:
                warnings.warn(
                    f"{method.dropout} = {rate} has no effect on {site.key!r}: {type(host.module).__name__} reads "
                    f"its weight by "
                    "itself, so there is no input of the adapter to drop out.",
                    PeftWarning,
                    stacklevel=2,
                )
            self._add_dropout(method.dropout, name, rate)
        for setting in method.settings:
            self.__dict__.setdefault(setting, {})[name] = settings.get(setting)
        for bank, value in (banks or {}).items():
            self._modules[bank] = self._banks[bank] = value
        self._dispatched |= _EXPERT.search(site.key) is not None
        parts = Parts(self, name, site)
        with torch.no_grad():
            if host.device.type != "meta":
                method.derive(parts, host)
            if device.type != "meta":
                method.reset(parts, host)
        self.set_requires_grad(name, name in self._active_adapter)

    def _add_dropout(self, field: str, name: str, rate: float) -> None:
        if field not in self._modules:
            self._modules[field] = nn.ModuleDict()
        module = nn.Dropout(rate) if rate > 0 else nn.Identity()
        self._modules[field][name] = module.train(self.training)  # type: ignore[index]

    def update_layer(
        self, adapter_name: str, r: int | None = None, lora_alpha: int | None = None, config: Any = None, **kwargs: Any
    ) -> None:
        """Add or replace an adapter; `r` and `lora_alpha` override the config's."""
        from dataclasses import replace

        changes = {k: v for k, v in {"r": r, "lora_alpha": lora_alpha}.items() if v}
        self.add_adapter(adapter_name, replace(config, **changes) if changes else config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the first of the others becomes active."""
        if adapter_name not in self._adapters:
            return
        if adapter_name in self.merged_adapters:
            raise StateError(f"Adapter {adapter_name!r} is merged; call unmerge() before deleting it.")
        self._forget(adapter_name)
        if adapter_name in self._active_adapter:
            left = [n for n in self._active_adapter if n != adapter_name]
            if not left and self._adapters:
                left = [next(iter(self._adapters))]
                warnings.warn(
                    f"Adapter {adapter_name!r} was active and is gone; {left[0]!r} is active now.",
                    PeftWarning,
                    stacklevel=2,
                )
            self.set_adapter(left)

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name, keeping its place in the order."""
        if new in self._adapters:
            raise AdapterNameError(f"There is an adapter named {new!r} already; delete it or choose another name.")
        for held in self._holders():
            if old in held:
                value = held[old]
                del held[old]
                held[new] = value
        swap = {old: new}
        self._adapters = {swap.get(n, n): c for n, c in self._adapters.items()}
        self._leaders = {swap.get(n, n): layer for n, layer in self._leaders.items()}
        self._followers = {swap.get(n, n): held for n, held in self._followers.items()}
        self._active_adapter = [swap.get(n, n) for n in self._active_adapter]
        self.merged_adapters = [swap.get(n, n) for n in self.merged_adapters]

    def _holders(self) -> Iterator[Any]:
        """Every per-adapter dict of this layer (not the banks): modules, parameters, buffers and plain values."""
        for name, module in self._modules.items():
            holds = isinstance(module, (nn.ModuleDict, nn.ParameterDict)) or type(module).__name__ == "BufferDict"
            if holds and name not in self._banks:
                yield module
        for setting in {s for m in self.methods for s in registry.method(m).settings}:
            yield self.__dict__.get(setting, {})

    def follow(self, name: str, config: Any, leader: AdaptedLayer) -> None:
        """Take part in an adapter of the layer that this one shares its weight with: the same change, no parameters.

        Args:
            name: The adapter.
            config: Its config.
            leader: The layer that has its parameters.
        """
        self._forget(name)
        kind = method_of(config).peft_type
        if kind not in self.methods:
            self.__class__ = layer_class((*self.methods, kind), self.host_cls)
        self._adapters[name], self._leaders[name] = config, leader
        leader._followers.setdefault(name, []).append(self)

    def _tied(self, names: Sequence[str]) -> list[AdaptedLayer]:
        """Layers whose weight stays that of this one if these adapters change it."""
        found: list[AdaptedLayer] = []
        for lead in {id(layer): layer for layer in self._leaders.values()}.values():
            if all(self._leaders.get(n) is lead for n in names):
                found.append(lead)
        for follower in {id(f): f for held in self._followers.values() for f in held}.values():
            if all(follower._leaders.get(n) is self for n in names):
                found.append(follower)
        return found

    def _forget(self, name: str) -> None:
        for held in self._holders():
            if name in held:
                del held[name]
        self._adapters.pop(name, None)
        self._caches.pop("norms", None), self._caches.pop("rows", None)
        self._followers.pop(name, None)
        leader = self._leaders.pop(name, None)
        if leader is not None and self in leader._followers.get(name, ()):
            leader._followers[name].remove(self)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters, those of this layer or not."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active_adapter)

    @property
    def available_adapters(self) -> list[str]:
        """Names of the adapters that this layer has."""
        return list(self._adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer runs as if it had no adapters."""
        return self._disable_adapters or routing.current() == routing.NONE

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, in this order, and trainable unless `inference_mode`; the others freeze."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._train_only_active(inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Run with adapters (and let the active ones train), or without."""
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self._active_adapter)
        else:
            for name in self._adapters:
                self.set_requires_grad(name, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them. Slots that never train stay frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for slot, value in self.slots(name) if name in self._adapters else ():
                for parameter in _parameters(value):
                    parameter.requires_grad_(requires_grad and slot.trains)

    def _train_only_active(self, inference_mode: bool = False) -> None:
        active = () if inference_mode else self._active_adapter
        for stored in dict.fromkeys(self._stored.values()):
            held = self._modules[stored]
            assert held is not None
            for name, value in (*held._parameters.items(), *held._modules.items()):
                for parameter in _parameters(value) if name not in active else ():
                    if parameter.requires_grad:
                        parameter.requires_grad_(False)
        self.set_requires_grad(active)

    def train(self, mode: bool = True) -> AdaptedLayer:
        """`nn.Module.train`, without a visit to the modules of each tensor of each adapter."""
        self.training = mode
        self._caches.pop("norms", None), self._caches.pop("rows", None)
        self.base_layer.train(mode)
        for name, held in self._modules.items():
            if held is None or name == "base_layer":
                continue
            held.__dict__["training"] = mode
            for leaf in held._modules.values():
                if leaf is not None and leaf._modules:
                    leaf.train(mode)
                elif leaf is not None:
                    leaf.__dict__["training"] = mode
        return self

    def slots(self, name: str) -> Iterator[tuple[Any, Any]]:
        """The slots of an adapter, each with the module or tensor it holds."""
        for slot in method_of(self._adapters[name]).slots:
            held: Any = self._modules.get(self._stored.get(slot.name, slot.name))
            if held is not None and name in held:
                yield slot, held[name]

    def parts(self, name: str) -> Parts:
        """One adapter of this layer, by attribute."""
        if name not in self._adapters:
            raise AdapterNameError(f"There is no adapter {name!r} here.{nearest(name, self._adapters)}")
        return Parts(self, name)

    # scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to `scale` times its initial one."""
        scaling = self.__dict__.get("scaling", {})
        if adapter in scaling:
            scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self._active_adapter:
            if name in self.__dict__.get("scaling", {}):
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None restores the initial one."""
        for name in self._active_adapter:
            if name in self.__dict__.get("scaling", {}):
                self.scaling[name] = self._initial_scaling(name) if scale is None else self.scaling[name] / scale

    def _initial_scaling(self, name: str) -> float:
        return method_of(self._adapters[name]).initial_scaling(Parts(self, name))

    # what is in effect

    def _stack(self, route: routing.Route | None) -> tuple[str, ...]:
        """Names of this layer's adapters in effect, nearest to the frozen weight first."""
        if route is not None:
            return tuple(n for n in route.names if n in self._adapters)
        if self._disable_adapters:
            return ()
        active = tuple(n for n in self._active_adapter if n in self._adapters)
        return tuple(n for n in self.merged_adapters if n not in active) + active

    def updates(self, names: Iterable[str], running: bool = False) -> list[Update]:
        """The updates that these adapters are, with their dropout if they are `running`."""
        host = self.frozen
        return [self._update(n, host, running) for n in names]

    def _update(self, name: str, host: Host, running: bool) -> Update:
        method, leader = method_of(self._adapters[name]), self._leaders.get(name)
        if leader is None:
            return method.update(Parts(self, name, running=running), host)
        update = method.update(Parts(leader, name, running=running), leader.frozen)
        return (
            update if leader.host_cls.one_hot == host.one_hot else update.transposed(Call(leader, leader.host, (), {}))
        )

    def _split(self, names: tuple[str, ...]) -> tuple[bool, tuple[str, ...]]:
        """Whether the merged base layer can serve as the bottom of the stack, and what is left to run on top."""
        merged = tuple(self.merged_adapters)
        if names[: len(merged)] == merged:
            return True, names[len(merged) :]
        rest = tuple(n for n in names if n not in merged)
        if set(merged) <= set(names) and all(u.relative for u in self.updates(names)):
            return True, rest
        return False, names

    def _frozen(self, host: Host) -> tuple[Tensor, Tensor | None]:
        """W and b of the base layer without merged adapters."""
        frozen = self.frozen if self.merged_adapters else host
        return frozen.weight(), frozen.bias()

    def _parameters_as_they_were(self, host: Host) -> dict[str, Tensor | None]:
        device = host.device
        kept = self._originals["parameters"]
        return {name: None if t is None else t.to(device) for name, t in kept.items()}

    def _square_row_norms(self, host: Host) -> Tensor:
        weight = self._frozen(host)[0]
        if torch.compiler.is_compiling() or weight.device.type == "meta":
            return _square_row_norms(weight)
        key = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
        cached = self._caches.get("square_row_norms")
        if cached is None or cached[0] != key:
            cached = (key, _square_row_norms(weight))
            self._caches["square_row_norms"] = cached
        return cached[1]

    def effective(self, names: tuple[str, ...] | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias (out,) of the plain layer that computes what the stack computes.

        Half precision bases are folded in float32.
        """
        host = self.host
        names = self._stack(routing.current()) if names is None else names
        call = Call(self, host, (), {})
        weight, bias = self._frozen(host)
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight, bias = weight.float(), None if bias is None else bias.float()
        for update in self.updates(names):
            weight, bias = update.weight(weight, call), update.add_bias(bias, call)
        return weight, bias

    # forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop("adapter_names", None)
        route = routing.current()
        if routing.used and self.training and rows is None and not torch.compiler.is_compiling():
            self._on_the_same_route(route)
        if rows is None and route is not None:
            rows = route.rows
        if rows is not None:
            return self._forward_rows(tuple(rows), x, args, kwargs)
        return self._forward(self._stack(route), x, args, kwargs)

    def _on_the_same_route(self, route: routing.Route | None) -> None:
        """Raise if a checkpointed forward pass runs again on a route that is not surely its own."""
        parameter = next((p for name in self._adapters for p in self._trained(name)), None)
        version = -1 if parameter is None else parameter._version  # optimizers change it, so routes of old steps go
        was, seen = self._caches.get("routes", (version, frozenset()))
        if routing.recomputing():
            if seen and seen != {route}:
                raise StateError(
                    "Gradient checkpointing runs this layer again outside of the `use()`, `disable_adapter()` or "
                    "`adapter_names` of its forward pass. Switch it on by model.gradient_checkpointing_enable() on the "
                    "PeftModel, or give torch.utils.checkpoint context_fn=peft.routing.context_fn (and "
                    "use_reentrant=False)."
                )
        elif torch.is_grad_enabled() or (route is not None and route != routing.NONE):
            self._caches["routes"] = (version, (seen if was == version else frozenset()) | {route})

    def _trained(self, name: str) -> Iterator[nn.Parameter]:
        for slot, value in self.slots(name):
            for parameter in value.parameters() if isinstance(value, nn.Module) else (value,):
                if slot.trains and isinstance(parameter, nn.Parameter):
                    yield parameter

    def _forward(self, names: tuple[str, ...], x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        on_merged, names = self._split(names)
        host = self.host
        if not names and on_merged and not host.always_acts:
            return self.base_layer(x, *args, **kwargs)
        call = Call(self, host, args, kwargs)
        updates = self.updates(names, running=True)
        plain = host.on_input and not x.is_nested and not args and not kwargs
        if plain and autograd.can_fuse(host.module, *self._leaves(names)):
            weight, bias = (host.weight(), host.bias()) if on_merged else self._frozen(host)
            y = autograd.fused(updates, call, x, weight, bias)
            if y is not None:
                return y
        if not host.factored or x.is_nested or not all(_runs(u, host) for u in updates):
            weight, bias = (host.weight(), host.bias()) if on_merged else call.layer._frozen(host)
            for update in updates:
                weight, bias = update.weight(weight, call), update.add_bias(bias, call)
            return host.act(weight, bias, x, *args, **kwargs)
        run = call.run_merged if on_merged and self.merged_adapters else call.run
        bias = host.bias() if on_merged else call.bias
        for update in updates:
            run, bias = partial(update.forward, prev=run, bias=bias, base=call), update.add_bias(bias, call)
        return run(x)

    def _leaves(self, names: tuple[str, ...]) -> Iterator[nn.Module]:
        for name in names:
            for held in self._modules.values():
                if isinstance(held, nn.ModuleDict) and name in held:
                    yield held[name]

    def _forward_rows(self, rows: tuple[str, ...], x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Each sample with its own adapter: samples of one adapter run together."""
        if len(set(rows)) == 1:
            only = routing.use(None if rows[0] == routing.BASE else rows[0])
            with routing.route(only):
                return self._forward(self._stack(only), x, args, kwargs)
        dim = self.host.rows(x, kwargs)
        size = x.shape[dim]
        if self._dispatched:
            raise UnsupportedError(
                f"adapter_names mixes {sorted(set(rows))}, but this layer is one expert of many: it sees the tokens "
                "that were sent to it and can't know whose samples they are. Run one adapter at a time "
                "(model.use(name)), or leave the experts out of target_modules."
            )
        if size % len(rows):
            raise StateError(
                f"adapter_names has {len(rows)} entries, but the batch that reaches this layer has {size} rows. "
                "Give one name per sample."
            )
        if not args and not kwargs and not isinstance(self.base_layer, AdaptedLayer):
            y = batched(self, rows, x)
            if y is not None:
                return y
        each = [name for name in rows for _ in range(size // len(rows))]
        result: list[tuple[Tensor, Any]] = []
        for name in dict.fromkeys(each):
            index = torch.tensor([i for i, n in enumerate(each) if n == name], device=x.device)
            pick = partial(_take, index=index, dim=dim, size=size)
            chosen = routing.use(None if name == routing.BASE else name)
            picked = {key: pick(value) for key, value in kwargs.items()}
            with routing.route(chosen):  # for adapted layers inside the base layer
                result.append((index, self._forward(self._stack(chosen), pick(x), tuple(map(pick, args)), picked)))
        return _join(result, dim, size)

    # merge

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters into the base layer's own parameters. The output does not change.

        Args:
            safe_merge: Refuse to write values that are not finite.
            adapter_names: Which; None: the active ones.

        Raises:
            UnsupportedError: the method has no weight to merge.
            ValueError: `safe_merge`, and the result is not finite. Nothing was changed.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self._adapters]
        if not names:
            return
        merged = self._merge_order(names)
        with torch.no_grad():
            weight, bias = self.effective(tuple(merged))
            if safe_merge:
                _check_finite(weight, bias, names)
            self._write(weight, bias, next((t for t in self._tied(merged) if t.merged_adapters == merged), None))
        self.merged_adapters = merged

    def _merge_order(self, names: Sequence[str]) -> list[str]:
        """The merged part of the stack once these adapters are merged as well."""
        for name in names:
            method = method_of(self._adapters[name])
            if not method.mergeable:
                raise UnsupportedError(
                    f"{method.peft_type} depends on the input and has no weight to merge ({name!r})."
                )
        wanted = {*self.merged_adapters, *names}
        order = [n for n in self._active_adapter if n in wanted]
        return [n for n in (*self.merged_adapters, *names) if n not in order] + order

    def check_merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Raise what `merge` would raise, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self._adapters and n not in self.merged_adapters]
        order = self._merge_order(names)
        if safe_merge and names:
            with torch.no_grad():
                _check_finite(*self.effective(tuple(order)), names)

    def _write(self, weight: Tensor, bias: Tensor | None, tied: AdaptedLayer | None = None) -> None:
        host, module = self.host, self.get_base_layer()
        stored = {host.parameter: host.native(weight).to(host.dtype).contiguous()}
        old_bias = module._parameters.get(host.bias_parameter)
        if bias is not None and (old_bias is not None or host.bias_parameter in module._parameters):
            stored[host.bias_parameter] = bias.to(host.dtype)
        adjust = host.adjust(weight)
        if not self.merged_adapters:
            self._originals = {
                "parameters": {name: module._parameters[name] for name in stored},
                "attributes": {name: getattr(module, name) for name in adjust},
            }
        # New parameters, not new values: whoever shares the old ones (tied weights, unmerge) keeps them untouched.
        for name, tensor in stored.items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        if tied is not None and tied.host.raw.shape == host.raw.shape:
            module._parameters[host.parameter] = tied.host.raw  # type: ignore[assignment]
        for name, value in adjust.items():
            setattr(module, name, value)

    def unmerge(self) -> None:
        """Restore the base layer's parameters, bit for bit."""
        if not self.merged_adapters:
            warnings.warn("Nothing is merged, so there is nothing to unmerge.", PeftWarning, stacklevel=2)
            return
        host, module = self.host, self.get_base_layer()
        for name, parameter in self._originals["parameters"].items():
            if parameter is not None and parameter.device != host.device:
                parameter.data = parameter.data.to(host.device)
            module._parameters[name] = parameter
        for name, value in self._originals["attributes"].items():
            setattr(module, name, value)
        self._originals = {}
        self.merged_adapters = []

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        """Move; what lies under merged weights moves along."""
        super()._apply(fn, recurse)
        kept = self._originals.get("parameters", {})
        for name, parameter in kept.items():
            if parameter is None:
                continue
            moved = fn(parameter.data)
            if torch._has_compatible_shallow_copy_type(parameter.data, moved):
                parameter.data = moved
            else:
                kept[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        return self

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's own shape."""
        host = self.host
        with torch.no_grad():
            delta = self.effective((adapter,))[0] - self.effective(())[0]
        return host.native(delta).to(adapter_dtype(host.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a weight that can be turned into LoRA's."""
        return adapter_name in self._adapters and method_of(self._adapters[adapter_name]).mergeable

    # copying and moving

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self.host.device
        if device.type != "meta":
            for held in self._holders():
                if isinstance(held, nn.Module) and adapter_name in held and held[adapter_name].__class__ is not dict:  # type: ignore[index]
                    held.to(device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.methods, self.host_cls), self.__dict__

    def extra_repr(self) -> str:
        return f"adapters={list(self._adapters)}, active={self._active_adapter}"


def _parameters(value: Any) -> Iterable[nn.Parameter]:
    """The parameters of what a slot holds."""
    if isinstance(value, nn.Parameter):
        return (value,)
    if not isinstance(value, nn.Module):
        return ()
    return value.parameters() if value._modules else [p for p in value._parameters.values() if p is not None]


def _square_row_norms(weight: Tensor) -> Tensor:
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return wide.detach().square().sum(1)


def _runs(update: Update, host: Host) -> bool:
    """Whether an update can act on the way on this host."""
    return not update.weight_only and (host.on_input or not update.acts_on_input)


def _take(value: Any, index: Tensor, dim: int, size: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == size:
        return value.index_select(dim, index)
    return value


def _join(parts: list[tuple[Tensor, Any]], dim: int, size: int) -> Any:
    """Put outputs of some rows each back into the order of the batch; tuples (attention) element by element."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(_join([(i, y[k]) for i, y in parts], 0 if k else dim, size) for k in range(len(first)))
    if first is None:
        return None
    order = torch.cat([index for index, _ in parts]).argsort()
    return torch.cat([y for _, y in parts], dim).index_select(dim, order)


def _check_finite(weight: Tensor, bias: Tensor | None, names: Sequence[str]) -> None:
    if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError(f"NaNs or infinities in the merged weights: adapter {names} is broken. Nothing was merged.")


def check_adapters_to_merge(module: AdaptedLayer, adapter_names: Sequence[str] | None = None) -> list[str]:
    """The adapters that are to be merged now: the given or active ones, less those that are merged already."""
    if isinstance(adapter_names, str):
        raise ConfigError(f"adapter_names should be a list of names; give [{adapter_names!r}].")
    names = module.active_adapters if adapter_names is None else list(adapter_names)
    left = [n for n in names if n not in module.merged_adapters]
    if names and not left:
        warnings.warn(f"All of {names} are merged already.", PeftWarning, stacklevel=3)
    return left


# classes


@cache
def marker(peft_type: str) -> type[BaseTunerLayer]:
    """The class that marks layers with an adapter of this method, e.g. `LoraLayer`."""
    method = registry.method(peft_type)
    names: list[str] = []
    embedding: list[str] = []
    for slot in method.slots:
        names.append(slot.name)
        head, _, tail = slot.name.rpartition("_")
        if slot.host_names_it and head:
            embedding.append(f"{head}_embedding_{tail}")
    pure = [n for n in names if not n.endswith("magnitude_vector")]
    ordered = (*pure, *embedding, *(n for n in names if n not in pure))
    other = (*method.settings, *((method.dropout,) if method.dropout else ()))
    return type(
        f"{method.class_name}Layer",
        (BaseTunerLayer,),
        {
            "adapter_layer_names": ordered,
            "other_param_names": other,
            "__module__": f"peft.tuners.{peft_type.lower()}.layer",
        },
    )


@cache
def layer_class(methods: tuple[str, ...], host: type[Host]) -> type[AdaptedLayer]:
    """The class of layers of that type with adapters of those methods."""
    markers = tuple(marker(m) for m in methods)
    names = tuple(dict.fromkeys(n for m in markers for n in m.adapter_layer_names))
    other = tuple(dict.fromkeys(n for m in markers for n in m.other_param_names))
    body = {
        "host_cls": host,
        "methods": methods,
        "adapter_layer_names": names,
        "other_param_names": other,
        "__module__": f"peft.tuners.{methods[0].lower()}.layer" if methods else __name__,
    }
    return type(host.name, (AdaptedLayer, *markers), body)


def _rebuild(methods: tuple[str, ...], host: type[Host]) -> AdaptedLayer:
    cls = layer_class(methods, host)
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    return layer


def adapt(module: nn.Module, method: WeightMethod, key: str, parameter_name: str | None = None) -> AdaptedLayer:
    """Wrap a module so that adapters of `method` can be added to it.

    Raises:
        TargetError: there is no host for the module's type.
    """
    host = ParameterHost if parameter_name is not None else host_class(module)
    if host is None:
        from peft.hosts import supported

        raise TargetError(
            f"{key!r} is a {type(module).__name__}, which has no single weight to adapt. Layers that can be adapted: "
            f"{', '.join(supported())}. Name one inside it, list it in modules_to_save to train it whole, or give "
            f"one of its "
            "parameters in target_parameters."
        )
    return layer_class((method.peft_type,), host)(module, parameter_name=parameter_name)
