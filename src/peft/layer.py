"""The adapted layer: the one forward and the one merge.

What is in effect is a stack of adapters in the order of `active_adapters`. The stack is folded over the base layer, on
the way (`forward`) or on the parameters (`merge`), by the same updates, so the two can't disagree. Merging swaps
the base layer's parameters for new ones and keeps the old, so unmerging is exact in every dtype and a merged part of
the stack never changes what the whole computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from peft import autograd, registry, routing
from peft.autograd import overlay
from peft.errors import ConfigError, MethodError, PeftWarning, StateError, TargetError, UnsupportedError
from peft.holder import AdapterHolder, BaseTunerLayer
from peft.hosts import Host, host_class, supported
from peft.hosts.base import offloaded
from peft.hosts.parameter import ParameterHost
from peft.method import WeightMethod, method_of
from peft.parts import UNSEEN, Call, Parts, Read
from peft.plans import plan_of
from peft.rows import each_row
from peft.slots import adapter_dtype
from peft.updates import Update


class AdaptedLayer(AdapterHolder):
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
                "whole batch. Adapt the attention module itself, or run one adapter at a time (model.use(name))."
            )
        weight, bias = self.effective()
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    # what is in effect

    def _take_on(self, method: WeightMethod) -> None:
        if method.peft_type not in self.methods:
            made: Any = layer_class((*self.methods, method.peft_type), self.host_cls)
            self.__class__ = made

    def _stack(self, route: routing.Route | None) -> tuple[str, ...]:
        """Names of this layer's adapters in effect, nearest to the frozen weight first."""
        if route is not None:
            return tuple(n for n in route.names if n in self._adapters)
        if self._disable_adapters:
            return ()
        active = tuple([n for n in self._active_adapter if n in self._adapters])
        if not self.merged_adapters:
            return active
        return tuple(n for n in self.merged_adapters if n not in active) + active

    def updates(self, names: Iterable[str], running: bool = False) -> list[Update]:
        """The updates that these adapters are, with their dropout if they are `running`."""
        return self._updates(names, self.frozen, running)

    def _updates(
        self, names: Iterable[str], frozen: Host, running: bool, reads: list[Read] | None = None
    ) -> list[Update]:
        if self._waiting:
            self._derive_late()
            frozen = self.frozen
        return [self._update(n, frozen, running, reads) for n in names]

    def _update(self, name: str, host: Host, running: bool, reads: list[Read] | None) -> Update:
        method, leader = method_of(self._adapters[name]), self._leaders.get(name)
        if leader is None:
            update = method.update(Parts(self, name, running=running, reads=reads), host)
            return update if isinstance(update, Update) else _no_update(method, update)
        update = method.update(Parts(leader, name, running=running), leader.frozen)
        if reads is not None:
            reads.append(UNSEEN)
        return (
            update if leader.host_cls.one_hot == host.one_hot else update.transposed(Call(leader, leader.host, (), {}))
        )

    @property
    def _inside(self) -> AdaptedLayer | None:
        """The adapted layer that this one stands around, if both change the same weight (rows of an embedding)."""
        base: Any = self._modules["base_layer"]
        return base if isinstance(base, AdaptedLayer) and not self._is_parameter else None

    def _split(self, names: tuple[str, ...]) -> tuple[bool, tuple[str, ...]]:
        """Whether the merged base layer can serve as the bottom of the stack, and what is left to run on top."""
        merged, inside = tuple(self.merged_adapters), self._inside
        if merged and inside is not None and inside._split(inside._stack(routing.current())) != (True, ()):
            return False, names  # what is merged here lies on what is merged there
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

    def effective(self, names: tuple[str, ...] | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias (out,) of the plain layer that computes what the stack computes.

        Half precision bases are folded in float32.
        """
        host = self.host
        names = self._stack(routing.current()) if names is None else names
        call = Call(self, host, (), {})
        weight, bias = call.weight, call.bias
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight, bias = weight.float(), None if bias is None else bias.float()
        for update in self.updates(names):
            weight, bias = update.weight(weight, call), update.add_bias(bias, call)
        return weight, bias

    # forward

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if x is None:
            x = _input_by_name(self.get_base_layer(), kwargs)
        rows = kwargs.pop("adapter_names", None) if kwargs else None
        route = routing.current()
        if routing.used and self.training and rows is None and not torch.compiler.is_compiling():
            self._on_the_same_route(route)
        if rows is None and route is not None:
            rows = route.rows
        if rows is not None:
            return each_row(self, tuple(rows), x, args, kwargs)
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
        host, merged = self.host, self.merged_adapters
        on_merged, names = self._split(names) if merged else (True, names)
        if not names and on_merged and not host.always_acts:
            return self.base_layer(x, *args, **kwargs)
        call = Call(self, host, args, kwargs)
        if torch.compiler.is_compiling():
            updates = self._updates(names, self.frozen if merged else host, True)
        else:
            plan = plan_of(self, names, host)
            updates = plan.updates
            plain = host.fuses and not args and not kwargs and not x.is_nested
            if plain and autograd.can_fuse(host.module) and plan.form is not None:
                weight, bias = (host.weight(), host.bias()) if on_merged else self._frozen(host)
                y = host.fused(plan.form, call, x, weight, bias)
                if y is not None:
                    return y
            if host.opaque and host.on_input and autograd.can_fuse(host.module) and plan.form is not None:
                y = overlay.run(plan.form, call, x, call.run_merged if on_merged and merged else call.run, host.fresh)
                if y is not None:
                    return y
        if not host.factored or x.is_nested or not all(_runs(u, host) for u in updates):
            weight, bias = (host.weight(), host.bias()) if on_merged else (call.weight, call.bias)
            for update in updates:
                weight, bias = update.weight(weight, call), update.add_bias(bias, call)
            return host.act(weight, bias, x, *args, **kwargs)
        run = call.run_merged if on_merged and merged else call.run
        bias = host.bias() if on_merged else call.bias
        for update in updates:
            run, bias = partial(update.forward, prev=run, bias=bias, base=call), update.add_bias(bias, call)
        return host.finish(run(x), x)

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
        if offloaded(self.get_base_layer()) is not None:
            raise UnsupportedError(
                "accelerate keeps the weights of this layer elsewhere (offloading) and would bring the old ones back "
                "over merged ones. Call accelerate.hooks.remove_hook_from_submodules(model.get_base_model()) first, or "
                "load the base model without offloading."
            )
        if names and not self.host.writable:
            raise UnsupportedError(
                f"Nothing can be merged into {type(self.get_base_layer()).__name__} ({self.host.backend}): how its "
                "weight is packed is unknown. Run it unmerged, or load the base model unquantised (or dequantised, by "
                "transformers' model.dequantize()) and merge there: adapters fit both."
            )
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
        stored = {host.parameter: host.packed(weight)}
        adjust = host.adjust(weight, stored[host.parameter])
        old_bias = host.bias()
        if bias is not None and host.bias_parameter in module._parameters:
            stored[host.bias_parameter] = bias.to(host.dtype if old_bias is None else old_bias.dtype)
        elif bias is not None and old_bias is not None:
            adjust[host.bias_parameter] = bias.to(old_bias.dtype)
        kept = self._originals or {"parameters": {}, "attributes": {}}
        for name in stored:  # those that earlier merges changed are kept already
            kept["parameters"].setdefault(name, module._parameters[name])
        for name in adjust:
            kept["attributes"].setdefault(name, getattr(module, name))
        self._originals = kept
        # New parameters, not new values: whoever shares the old ones (tied weights, unmerge) keeps them untouched.
        for name, tensor in stored.items():
            known = isinstance(tensor, nn.Parameter)
            module._parameters[name] = tensor if known else nn.Parameter(tensor, requires_grad=False)
        if tied is not None and not host.opaque and tied.host.raw.shape == host.raw.shape:
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
                parameter = _moved(parameter, host.device)
            module._parameters[name] = parameter
        for name, value in self._originals["attributes"].items():
            setattr(module, name, value)
        self._originals = {}
        self.merged_adapters = []

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        """Move; what lies under merged weights moves along."""
        super()._apply(fn, recurse)
        self._caches.clear()
        kept = self._originals.get("parameters", {})
        for name, parameter in kept.items():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter:  # quantisers' move with what they carry
                kept[name] = fn(parameter)
                continue
            moved = fn(parameter.data)
            if torch._has_compatible_shallow_copy_type(parameter.data, moved):  # pyright: ignore[reportPrivateImportUsage]
                parameter.data = moved
            else:
                kept[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        return self

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's own shape."""
        host = self.host
        with torch.no_grad():
            delta = host.plus(self.effective((adapter,))[0], -self.effective(())[0])
        return host.native(delta).to(adapter_dtype(host.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a weight that can be turned into LoRA's."""
        return adapter_name in self._adapters and method_of(self._adapters[adapter_name]).mergeable

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Without what is only remembered: it refers to tensors as they were, some by views that can't be copied.
        return _rebuild, (self.methods, self.host_cls), {**self.__dict__, "_caches": {}}


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if type(parameter) is not nn.Parameter:
        return parameter.to(device)  # type: ignore[return-value]
    parameter.data = parameter.data.to(device)
    return parameter


def _input_by_name(module: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """The layer's input out of the keywords of a call, by the name that the base layer gives it."""
    name = type(module).forward.__code__.co_varnames[1]
    if name not in kwargs:
        raise TypeError(f"{type(module).__name__}.forward() missing 1 required positional argument: {name!r}")
    return kwargs.pop(name)


def _no_update(method: WeightMethod, found: Any) -> NoReturn:
    hint = ": Add(op)?" if hasattr(found, "dense") else "; is a `return` missing?" if found is None else "."
    raise MethodError(f"`update` of {method.peft_type} must return an Update, not {type(found).__name__}{hint}")


def _runs(update: Update, host: Host) -> bool:
    """Whether an update can act on the way on this host."""
    return not update.weight_only and (host.on_input or not update.acts_on_input)


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
        raise TargetError(
            f"{key!r} is a {type(module).__name__}, which has no single weight to adapt. Layers that can be adapted: "
            f"{', '.join(supported())}. Name one inside it, list it in modules_to_save to train it whole, or give "
            "one of its parameters in target_parameters."
        )
    return layer_class((method.peft_type,), host)(module, parameter_name=parameter_name)
