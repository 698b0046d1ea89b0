"""Plain tensors that train besides an adapter: whole modules (a new head), and rows of an embedding (new tokens)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft import routing
from peft.errors import AdapterNameError, ConfigError, PeftWarning, TargetError, UnsupportedError
from peft.holder import ITS_OWN
from peft.hosts.base import offloaded
from peft.layer import AdaptedLayer, layer_class
from peft.rows import in_turns
from peft.slots import adapter_dtype


class AuxiliaryTrainingWrapper(nn.Module):
    """Stands where a module stood and holds, per adapter, what is trained in its place."""

    is_auxiliary_wrapper = True
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def active_adapter(self) -> str:
        """The adapter in whose place this module stands; one at a time."""
        return self._active_adapter[0] if self._active_adapter else ""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active_adapter)

    @property
    def disable_adapters(self) -> bool:
        """Whether the original module runs."""
        return self._disable_adapters or routing.current() == routing.NONE

    def names(self) -> list[str]:
        """Adapters that have something here."""
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        """Run what the active adapter trained, or the original module."""
        self._disable_adapters = not enabled
        self.set_requires_grad(self.names(), False)
        if enabled:
            self.set_requires_grad(self._active_adapter, True)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter active (and trainable, unless `inference_mode`).

        Raises:
            ValueError: several are asked for that all have something here; one module can't be two.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [n for n in names if n in self.names()]
        if len(here) > 1:
            raise ConfigError(f"Only one adapter can be set at a time for {type(self).__name__}, not {here}.")
        self._active_adapter = here
        self.set_requires_grad(self.names(), False)
        self.set_requires_grad(here, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let what adapters have here train, or freeze it."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for parameter in self.trained(name):
                parameter.requires_grad_(requires_grad)

    def trained(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters that an adapter has here."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Drop what an adapter has here; if it was active, the first of the given ones that is here becomes active."""
        raise NotImplementedError

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The module to leave behind."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in a file (relative to this module) to names in this wrapper."""
        raise NotImplementedError

    def _chosen(self, route: routing.Route | None) -> str | None:
        names = self.names()
        if route is not None:
            here = [n for n in route.names if n in names]
        else:
            here = [] if self._disable_adapters else [n for n in self._active_adapter if n in names]
        return here[0] if here else None


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with a trained copy per adapter.

    Copies of half precision modules train in float32; what goes in and comes out keeps its dtype.
    """

    adapter_layer_names = ("modules_to_save",)
    original: ClassVar[str] = "original_module"
    copies: ClassVar[str] = "modules_to_save"

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        super().__init__()
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict({})
        self.update(adapter_name, tied_module)

    @classmethod
    def around(cls, module: nn.Module) -> ModulesToSaveWrapper:
        """A wrapper of a module, without copies yet."""
        wrapper = cls.__new__(cls)
        AuxiliaryTrainingWrapper.__init__(wrapper)
        wrapper.add_module(cls.original, module)
        wrapper.add_module(cls.copies, nn.ModuleDict({}))
        wrapper.training = module.training
        return wrapper

    def names(self) -> list[str]:
        return list(self._modules[self.copies]._modules)  # type: ignore[union-attr]  # looked up in each call

    def trained(self, name: str) -> Iterator[nn.Parameter]:
        return self.modules_to_save[name].parameters() if name in self.modules_to_save else iter(())

    def update(
        self, adapter_name: str, tied_module: nn.Module | None = None, autocast: bool = True, **kwargs: Any
    ) -> None:
        """Give an adapter its copy; with `tied_module`, one that shares that module's weight."""
        if isinstance(self.original_module, AdaptedLayer):
            raise TargetError(
                "A layer can't be adapted and trained whole (modules_to_save, LN tuning) at once; choose one of them."
            )
        inside = next((m for m in self.original_module.modules() if isinstance(m, AdaptedLayer)), None)
        if inside is not None:
            raise TargetError(
                f"A {type(self.original_module).__name__} can't be trained whole (modules_to_save) while layers inside "
                f"it are adapted by {inside.available_adapters}; delete those first, or adapt the layers here as well."
            )
        if any(offloaded(m) is not None for m in self.original_module.modules()):
            raise UnsupportedError(
                f"accelerate keeps the weights of a {type(self.original_module).__name__} elsewhere (offloading) and "
                "would bring them to its trained copy as well (modules_to_save, LN tuning). Load the base model "
                "without offloading that module (device_map), or leave it out."
            )
        fresh: dict[int, Any] = {id(b): b.detach().clone() for b in self.original_module.buffers()}
        for parameter in self.original_module.parameters():
            floating = parameter.is_floating_point()
            dtype = adapter_dtype(parameter.dtype, autocast) if floating else parameter.dtype
            fresh[id(parameter)] = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=floating)
        made = copy.deepcopy(self.original_module, fresh)  # tensors by hand: fake ones don't survive a deepcopy
        if tied_module is not None:
            made.weight = tied_module.weight
        made.train(self.training)
        self.modules_to_save[adapter_name] = made

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Drop an adapter's copy."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        if adapter_name in self._active_adapter:
            self._active_adapter = []
            if new_active_adapters:
                self.set_adapter([n for n in new_active_adapters if n in self.modules_to_save][:1])

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        if old in self.modules_to_save:
            self.modules_to_save[new] = self.modules_to_save.pop(old)
            self._active_adapter = [new if n == old else n for n in self._active_adapter]

    def module(self, name: str | None) -> nn.Module:
        """An adapter's copy, or the original."""
        return self.original_module if name is None else self._modules[self.copies]._modules[name]  # type: ignore

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop("adapter_names", None)
        route = routing.current()
        if rows is None and route is not None:
            rows = route.rows
        if rows is None:
            return self._run(self._chosen(route), *args, **kwargs)

        def run(name: str, *args: Any, **kwargs: Any) -> Any:
            return self._run(name if name in self.modules_to_save else None, *args, **kwargs)

        size = next((v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), 0)
        return in_turns(run, rows, 0, size, args, kwargs)

    def _run(self, name: str | None, /, *args: Any, **kwargs: Any) -> Any:
        module = self.module(name)
        if name is None or torch.is_autocast_enabled():
            return module(*args, **kwargs)
        was, now = _dtype(self.original_module), _dtype(module)
        if was is None or now is None or was == now:
            return module(*args, **kwargs)
        y = module(*(_cast(a, was, now) for a in args), **{k: _cast(v, was, now) for k, v in kwargs.items()})
        return _cast(y, now, was)

    def check_merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Raise what `merge` would raise, and change nothing."""

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Nothing: copies run in place of their module while their adapter is active, until they are unloaded."""
        waiting = [n for n in adapter_names or () if n in self.modules_to_save and n not in self._active_adapter]
        if waiting:
            warnings.warn(
                f"{waiting} is merged, but what it trained whole (modules_to_save) runs only while it is active; call "
                "set_adapter() as well.",
                PeftWarning,
                stacklevel=4,
            )

    def unmerge(self) -> None:
        """Nothing."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The module to leave behind: the trained copy if merging, else the original."""
        names = (
            self._active_adapter if adapter_names is None else [n for n in adapter_names if n in self.modules_to_save]
        )
        return self.settled(self.modules_to_save[names[0]]) if merge and names else self.original_module

    def settled(self, trained: nn.Module) -> nn.Module:
        """A copy as it stands in the base model: frozen, in the dtype of the original."""
        return trained.to(_dtype(self.original_module)).requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ITS_OWN or not {self.original, self.copies} <= self.__dict__.get("_modules", {}).keys():
                raise
            return getattr(self.module(self._chosen(routing.current())), name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in a file (relative to this module) to names in this wrapper."""
        return {k: f"modules_to_save.{adapter_name}.{k}" for k in self.modules_to_save[adapter_name].state_dict()}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter as a file names them, taken from a state dict of this wrapper."""
        return {k: state_dict[v] for k, v in self.adapter_state_dict_load_map(adapter_name).items()}


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding (or the output layer tied to it) of which some rows train.

    The rows replace those of the embedding after all other adapters of it, in whatever order they are active.
    `token_adapter` is the embedding, adapted by the method TRAINABLE_TOKENS.
    """

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices",)

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: list[int],
        tied_adapter: AdaptedLayer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        inner = module_to_save.get_base_layer() if isinstance(module_to_save, AdaptedLayer) else module_to_save
        from peft.hosts import host_class

        host = host_class(inner)
        if host is None:
            raise TargetError(f"trainable_token_indices needs an embedding, not a {type(inner).__name__}.")
        self.token_adapter = layer_class(("TRAINABLE_TOKENS",), host)(module_to_save)
        self.update(adapter_name, token_indices=token_indices, tied_adapter=tied_adapter, **kwargs)

    @property
    def original_module(self) -> nn.Module:
        """The embedding itself."""
        return self.token_adapter.base_layer

    def names(self) -> list[str]:
        return self.token_adapter.available_adapters

    def trained(self, name: str) -> Iterator[nn.Parameter]:
        if name in self.token_adapter._adapters:
            yield self.token_adapter.trainable_tokens_delta[name]

    def update(
        self,
        adapter_name: str,
        token_indices: list[int] | None = None,
        tied_adapter: AdaptedLayer | None = None,
        **kwargs: Any,
    ) -> None:
        """Give an adapter its rows; with `tied_adapter`, the rows of that embedding."""
        from peft.methods.trainable_tokens import TrainableTokensConfig

        config = TrainableTokensConfig(token_indices=list(token_indices or []))
        options = {k: v for k, v in kwargs.items() if k in ("meta", "autocast")}
        self.token_adapter.add_adapter(adapter_name, config, **options)
        if tied_adapter is not None:
            self.token_adapter.trainable_tokens_delta[adapter_name] = tied_adapter.trainable_tokens_delta[adapter_name]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.token_adapter.set_adapter(self._active_adapter, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Drop an adapter's rows."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftWarning)
            self.token_adapter.delete_adapter(adapter_name)
        if adapter_name in self._active_adapter:
            self.set_adapter([n for n in new_active_adapters or () if n in self.names()][:1])

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        self.token_adapter.rename_adapter(old, new)
        self._active_adapter = [new if n == old else n for n in self._active_adapter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write the rows into the embedding."""
        self.token_adapter.merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Restore the embedding."""
        if self.token_adapter.merged:
            self.token_adapter.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The embedding to leave behind."""
        if merge:
            self.token_adapter.merge(safe_merge, adapter_names)
        else:
            self.unmerge()
        return self.token_adapter.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ITS_OWN or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["token_adapter"], name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in a file (relative to this module) to names in this wrapper."""
        name = "token_adapter.trainable_tokens_delta"
        return {name: f"{name}.{adapter_name}"}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter as a file names them, taken from a state dict of this wrapper."""
        return {k: state_dict[v] for k, v in self.adapter_state_dict_load_map(adapter_name).items()}


def check_name(adapter_name: str) -> None:
    """Raise unless a string can be the name of an adapter."""
    text = adapter_name if isinstance(adapter_name, str) else ""
    if not text.strip() or not text.isprintable() or set(text) & set("./\\"):
        raise AdapterNameError(
            f"{adapter_name!r} can't name an adapter: give a non-empty string without dots, slashes and line breaks."
        )
    if adapter_name == routing.BASE:
        raise AdapterNameError(
            f"{routing.BASE!r} means 'no adapter' in adapter_names, so no adapter can have that name."
        )
    if hasattr(nn.ModuleDict(), adapter_name):
        raise AdapterNameError(
            f"{adapter_name!r} can't name an adapter: adapters are entries of torch modules, which have an attribute "
            f"of that name. Choose another, such as {adapter_name + '_adapter'!r}."
        )


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a module computes in, if it has floating point parameters."""
    weight = module._parameters.get("weight")  # a walk through all takes longer than a norm
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _cast(value: Any, was: torch.dtype, now: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, was, now) for item in value)
    return value.to(now) if isinstance(value, Tensor) and value.dtype == was else value
