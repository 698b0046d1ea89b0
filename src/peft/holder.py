"""Adapters by name on one base layer: add, delete, rename, activate, train, scale.

Nothing here runs them: the layer that does is `peft.layer.AdaptedLayer`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peft import registry, routing
from peft.errors import (
    AdapterNameError,
    ConfigError,
    MethodError,
    PeftWarning,
    StateError,
    TargetError,
    UnsupportedError,
    nearest,
)
from peft.hosts import Host
from peft.hosts.base import bare, blank
from peft.hosts.parameter import ParameterHost, lend
from peft.method import Site, WeightMethod, method_of
from peft.parts import Parts
from peft.slots import Sizes, Slot, adapter_dtype, create, room

if TYPE_CHECKING:
    from typing_extensions import Self

    from peft.layer import AdaptedLayer

_EXPERT = re.compile(r"(^|\.)experts?\.\d+(\.|$)")
"""Paths of layers inside one expert of a mixture, which see the tokens that a router sends there."""
_BY_NAME = ("_adapters", "_stored", "_banks", "_leaders", "_followers", "_originals", "_caches", "_waiting", "_scales")
ITS_OWN = frozenset({"_hf_hook", "_old_forward"})
"""What accelerate leaves on a module and takes off again: never that of a module inside."""
_ADAPTER_STATE = ("base_layer", "_adapters", "_active_adapter", "merged_adapters")


class BaseTunerLayer:
    """What every adapted layer is: `isinstance(module, BaseTunerLayer)` finds them all."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()


class AdapterHolder(nn.Module, BaseTunerLayer):
    """A base layer and its adapters, any number of any methods; see `peft.layer.AdaptedLayer`."""

    host_cls: ClassVar[type[Host]]
    methods: ClassVar[tuple[str, ...]] = ()
    merged_adapters: list[str]
    _dispatched: bool
    _uncalled: bool
    _disable_adapters: bool
    _active_adapter: list[str]
    _adapters: dict[str, Any]
    _stored: dict[str, str]
    _banks: dict[str, nn.Module]
    _leaders: dict[str, Any]
    _followers: dict[str, list[Any]]
    _originals: dict[str, Any]
    _caches: dict[str, Any]
    _waiting: dict[str, Site]
    _scales: dict[str, Any]
    """The scaling with which each adapter that has one began."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: Any = None,
        *,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        state = self.__dict__
        state.update(blank(), training=base_layer.training, _active_adapter=[], merged_adapters=[])
        state.update(_dispatched=False, _uncalled=False, _disable_adapters=False)
        for name in _BY_NAME:
            state[name] = {}
        self._modules["base_layer"] = base_layer
        if parameter_name is not None:
            self.parameter_name = parameter_name
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
        return self.host_cls(self._modules["base_layer"])  # type: ignore[arg-type]

    @property
    def frozen(self) -> Host:
        """The base layer as it is without merged adapters; what methods see."""
        host = self.host
        if not self.merged_adapters:
            return host
        device, kept = host.device, self._originals["parameters"]
        # Not `to` where nothing moves: quantisers' parameters make a copy of themselves around the same state.
        kept = {name: t if t is None or t.device == device else t.to(device) for name, t in kept.items()}
        twin = lend(host.module, **kept)
        twin.__dict__.update(self._originals["attributes"])
        return ParameterHost(twin, self.parameter_name) if self._is_parameter else self.host_cls(twin)

    def get_base_layer(self) -> nn.Module:
        """The innermost layer, under nested adapted layers."""
        layer: nn.Module = self
        while isinstance(layer, AdapterHolder):
            layer = layer.base_layer
        return layer

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
            if name in _ADAPTER_STATE or name in ITS_OWN or "base_layer" not in self._modules:
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
        meta = meta or host.device.type == "meta"
        device = torch.device("meta") if meta else host.device
        settings, made = self._create(method, config, host, site, device, autocast)
        if self._adapters:
            self._forget(name)
        self._take_on(method)
        self._adapters[name] = config
        for stored, (slot, value) in made.items():
            self._stored[slot.name] = stored
            held = self._modules[stored] = room(self._modules.get(stored), value, slot.is_saved(config))
            held[name] = value  # type: ignore[index]
        if method.dropout:
            self._add_dropout(method.dropout, name, config, site)
        for setting in method.settings:
            self.__dict__.setdefault(setting, {})[name] = settings.get(setting)
        if "scaling" in method.settings:
            self._scales[name] = settings.get("scaling")
        for bank, module in (banks or {}).items():
            self._modules[bank] = self._banks[bank] = module
        self._dispatched |= _EXPERT.search(site.key) is not None
        parts = Parts(self, name, site)
        with torch.no_grad():
            if host.device.type != "meta":
                method.derive(parts, host)
            else:
                self._waiting[name] = site
            if not meta:
                method.reset(parts, host)
        self.set_requires_grad(name, name in self._active_adapter)

    def _create(
        self,
        method: WeightMethod,
        config: Any,
        host: Host,
        site: Site,
        device: torch.device,
        autocast: bool,
    ) -> tuple[dict[str, Any], dict[str, tuple[Slot, Any]]]:
        """The settings of a new adapter, and its slots with their tensors by the name that holds them here."""
        try:
            settings = method.resolve(config, host, site)
            unset = tuple(name for name in method.settings if name not in settings)
            if unset:
                raise MethodError(f"{method.peft_type} names settings {unset} that resolve() does not return.")
            sizes = Sizes(settings)
            sizes.update({"in": host.in_features, "out": host.out_features, "groups": host.groups, **host.layout})
            dtype = adapter_dtype(host.raw.dtype, autocast)
            made = {
                host.slot_name(slot.name) if slot.host_names_it else slot.name: (
                    slot,
                    create(slot, host, sizes, host.device if slot.derived else device, dtype),
                )
                for slot in method.slots
                if slot.exists(sizes)
            }
        except TargetError:
            raise
        except ConfigError as error:
            where = f" on {site.key!r} ({type(host.module).__name__}, {host.in_features} in, {host.out_features} out)"
            raise TargetError(f"{method.peft_type}{where}: {error}") from None
        return settings, made

    def _derive_late(self) -> None:
        """Derive what follows from a base layer that had no values yet when the adapters were put here."""
        host = self.frozen
        if host.device.type == "meta":
            return
        for name, site in self._waiting.items():
            shared: list[Any] = [bank[name] for bank in self._banks.values() if name in bank]  # type: ignore[operator,index]
            if any(
                t.is_meta for held in shared for t in ((held,) if isinstance(held, Tensor) else dict(held).values())
            ):
                raise StateError(
                    f"What the layers of adapter {name!r} share follows from base weights that were on the meta device "
                    "when it was made. Load the base weights first, then add or load the adapter."
                )
            config, loaded = self._adapters[name], []
            for slot, old in [(s, v) for s, v in self.slots(name) if s.derived]:
                fresh = torch.empty_like(old, device=host.device)
                value = nn.Parameter(fresh, requires_grad=False) if isinstance(old, nn.Parameter) else fresh
                self._modules[self._stored[slot.name]][name] = value  # type: ignore[index]
                loaded += [(value, old)] if slot.is_saved(config) and not old.is_meta else []
            with torch.no_grad():
                method_of(config).derive(Parts(self, name, site), host)
                for value, old in loaded:  # what a file holds stands
                    value.copy_(old)
        self._waiting.clear()

    def _take_on(self, method: WeightMethod) -> None:
        """Become a layer that has adapters of this method."""
        raise NotImplementedError

    def _add_dropout(self, field: str, name: str, config: Any, site: Site) -> None:
        rate, host = float(getattr(config, field, 0.0)), self.host
        if rate and not host.factored:
            warnings.warn(
                f"{field} = {rate} has no effect on {site.key!r}: {type(host.module).__name__} reads its weight by "
                "itself, so there is no input of the adapter to drop out.",
                PeftWarning,
                stacklevel=3,
            )
        module = nn.Dropout(rate) if rate > 0 else bare(nn.Identity)
        module.training = self.training
        if field not in self._modules:
            self._modules[field] = bare(nn.ModuleDict)
        self._modules[field]._modules[name] = module  # type: ignore[union-attr]

    def update_layer(
        self, adapter_name: str, r: int | None = None, lora_alpha: int | None = None, config: Any = None, **kwargs: Any
    ) -> None:
        """Add or replace an adapter; `r` and `lora_alpha` override the config's."""
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
        self._waiting = {swap.get(n, n): site for n, site in self._waiting.items()}
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
        yield self._scales

    def follow(self, name: str, config: Any, leader: AdaptedLayer) -> None:
        """Take part in an adapter of the layer that this one shares its weight with: the same change, no parameters.

        Args:
            name: The adapter.
            config: Its config.
            leader: The layer that has its parameters.
        """
        self._forget(name)
        self._take_on(method_of(config))
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
        self._waiting.pop(name, None)
        for kept in ("norms", "rows", "plans"):
            self._caches.pop(kept, None)
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
                trains = requires_grad and slot.trains
                for parameter in _parameters(value):
                    if parameter.requires_grad is not trains:
                        parameter.requires_grad_(trains)

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

    def train(self, mode: bool = True) -> Self:
        """`nn.Module.train`, without a visit to the modules of each tensor of each adapter."""
        self.training = mode
        self._caches.pop("norms", None)
        self._caches.pop("rows", None)
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
        """Set the adapter's scaling to `scale` times its initial one. A layer without that adapter has nothing to set.

        Raises:
            UnsupportedError: the adapter's method has no scaling, and `scale` is not 1.
        """
        leader = self._leaders.get(adapter)
        if leader is not None:
            leader.set_scale(adapter, scale)
        elif adapter in self._scales:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)
        elif adapter in self._adapters and scale != 1:
            method = method_of(self._adapters[adapter]).peft_type
            raise UnsupportedError(
                f"set_scale({adapter!r}, {scale}): {method} has no scaling to set. To run the model without the "
                "adapter, use disable_adapter(), or set_adapter() with the names of the others."
            )

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters; warns of those that have none."""
        for name in self._scalable(scale):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None restores the initial one."""
        for name in self._scalable(1 if scale is None else scale):
            self.scaling[name] = self._initial_scaling(name) if scale is None else self.scaling[name] / scale

    def _scalable(self, scale: float) -> list[str]:
        """The active adapters of this layer that have a scaling; the others can't follow a factor that is not 1."""
        for name in self._active_adapter if scale != 1 else ():
            if name in self._adapters and name not in self._scales and name not in self._leaders:
                method = method_of(self._adapters[name]).peft_type
                warnings.warn(
                    f"Adapter {name!r} stays as strong as it is: {method} has no scaling.", PeftWarning, stacklevel=3
                )
        return [name for name in self._active_adapter if name in self._scales]

    def _initial_scaling(self, name: str) -> Any:
        return method_of(self._adapters[name]).initial_scaling(Parts(self, name))

    # copying and moving

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self.host.device
        if device.type != "meta":
            for held in self._holders():
                if isinstance(held, nn.Module) and adapter_name in held and held[adapter_name].__class__ is not dict:  # type: ignore[index]
                    held.to(device)

    def extra_repr(self) -> str:
        return f"adapters={list(self._adapters)}, active={self._active_adapter}"


def _parameters(value: Any) -> Iterable[nn.Parameter]:
    """The parameters of what a slot holds."""
    if isinstance(value, nn.Parameter):
        return (value,)
    if not isinstance(value, nn.Module):
        return ()
    return value.parameters() if value._modules else [p for p in value._parameters.values() if p is not None]
