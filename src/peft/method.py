"""The base class of methods that change weights. A method is a subclass in a file of its own in `peft/methods/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from peft import registry
from peft.config import PeftType, TargetedConfig
from peft.errors import MethodError, nearest
from peft.hosts import Host
from peft.slots import Slot
from peft.updates import Update

if TYPE_CHECKING:
    from peft.parts import Parts


@dataclass
class Site:
    """Where in the model an adapter is being put.

    Args:
        key: Module path, e.g. `model.layers.0.self_attn.q_proj`.
        index: Position among the adapted layers, in model order.
        count: Number of adapted layers.
        shared: What `WeightMethod.shared` returned for this adapter.
    """

    key: str
    index: int = 0
    count: int = 1
    shared: Mapping[str, Any] = field(default_factory=dict)


class WeightMethod:
    """A method: settings and slots per layer, an initialisation, and the update they mean.

    Subclass with `class C3A(WeightMethod, peft_type="C3A", config=C3AConfig)`. Instances hold nothing; everything about
    one adapter on one layer is in its `Parts`: slots by name as tensors, settings by name, the config.

    Every hook that gets a host gets the *frozen* one: the base layer without adapters, even while some are merged into
    it. So an adapter that is added then is the one that would be added before.

    Example:
        >>> from peft import registry
        >>> registry.method("LORA").slots[0].name
        'lora_A'
    """

    peft_type: ClassVar[str]
    config: ClassVar[type[TargetedConfig]]
    prefix: ClassVar[str]
    """What names of its tensors begin with."""
    slots: ClassVar[tuple[Slot, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    """Per-adapter values that stand on the layer as plain dicts and are read at call time
    (`layer.scaling["default"]`)."""
    dropout: ClassVar[str | None] = None
    """Config field, and dict on the layer, of the dropout on the adapter's input."""
    mergeable: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    """Whether the change is linear in the tensors that train, so that a weighted sum of adapters is that of theirs."""
    ties: ClassVar[bool] = False
    """Whether files that say nothing of ties were made with ties kept."""
    copies: ClassVar[Any] = None
    """A `ModulesToSaveWrapper`, for methods that train copies of whole modules; the rest of this class is idle then."""
    fallback_targets: ClassVar[str | None] = None
    """`target_modules` for architectures of which no default is known; None: the user has to say."""
    samples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Options of configs that suit tiny layers (sides of 8, 12 and 24, vocabulary 12), one per variant: the contract
    suite (`peft.testing`) tries the method with each."""
    tuner_methods: ClassVar[dict[str, Any]] = {}
    """Functions that the method's tuner class (`AdaLoraModel`) offers beyond those that all have."""
    class_name: ClassVar[str] = ""
    """Stem of class names in the PEFT API: "Lora" gives LoraModel and LoraLayer. Default: the method's class name."""

    def __init_subclass__(cls, peft_type: str | None = None, config: type | None = None, **kwargs: Any) -> None:
        """Register the method; raises `MethodError` if its declaration contradicts itself."""
        super().__init_subclass__(**kwargs)
        if peft_type is None or config is None:
            return
        cls.peft_type, cls.config = peft_type, config
        cls.class_name = cls.__dict__.get("class_name") or cls.__name__
        cls.prefix = cls.__dict__.get("prefix") or f"{peft_type.lower()}_"
        _check_declaration(cls)
        registry.register(peft_type, config, cls())

    # what a method gives

    def resolve(self, config: Any, host: Host, site: Site) -> dict[str, Any]:
        """Settings of the adapter on this layer: ranks after patterns, block sizes, whatever `slots` and `update` need.

        Called on any device, meta included: a layer's sizes may decide, its values may not.
        Raises `TargetError` where the method has no meaning on such a layer, saying which choice would be legal.
        """
        return {}

    def reset(self, p: Parts, host: Host) -> None:
        """Fill the slots in place with their initial values. Runs under `no_grad`, never on the meta device.

        The one hook that may draw from torch's global generator. It does not run when a file is loaded.
        """
        raise NotImplementedError

    def derive(self, p: Parts, host: Host) -> None:
        """Fill the buffers that files don't hold (seeded indices and the like), in place. Runs before `reset`.

        It runs again wherever the adapter is loaded, so it has to give the same: from the config, the frozen weight and
        generators with seeds of their own. If the base layer is on the meta device, it waits for the weights.
        Here and in `reset`, `p.site` says where the layer is.
        """

    def loaded(self, p: Parts, host: Host) -> None:
        """Refill what follows from banks, in place, after a file may have brought other ones. Runs under `no_grad`."""

    def update(self, p: Parts, host: Host) -> Update:
        """The update that the adapter is; called in every forward pass and merge, also compiled and on fake tensors."""
        raise NotImplementedError

    # what it may give

    def shared(self, config: Any, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Any]:
        """What all layers of one adapter share, made once per adapter before the layers; `targets` are frozen hosts.

        Tensors, parameters and groups (`ParameterDict`, `BufferDict`) become banks: `p.<name>` on each layer, one entry
        in the model (`base_model.<name>`).
        Other values are only for `resolve`, as `site.shared`. Draw from a generator with a seed of its own: where files
        don't hold a bank (`saved_banks`), this makes it again.
        """
        return {}

    def identity_at_start(self, config: Any) -> bool:
        """Whether an untrained adapter with this config leaves the output as it is."""
        return getattr(config, "init_weights", True) is not False

    def default_targets(self, config: Any, model: nn.Module) -> list[str] | str | None:
        """Modules to adapt if the config names none; None leaves it to the table of architectures."""
        return None

    def complete(self, config: Any, model: nn.Module) -> None:
        """Fill in fields of the config, besides `target_modules`, that are left to the model's architecture."""

    def check_targets(self, config: Any, targets: Mapping[str, Host]) -> None:
        """Raise if the targets as a whole (frozen hosts) can't be adapted."""

    def initial_scaling(self, p: Parts) -> float:
        """What `set_scale` multiplies, for methods with the setting `scaling`: by default what `resolve` gave.

        Override it where other settings that users may change decide (LoRA: `lora_alpha` and `r`).
        """
        return p.layer._scales[p.adapter]

    def saved_banks(self, config: Any) -> tuple[str, ...]:
        """Names of the shared tensors that files hold."""
        return ()

    def mirrored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds for a layer tied to the one whose tensors these are (names without the layer's path).

        Nothing, by default: the tensors of one layer and `ensure_weight_tying` say it all.
        """
        return {}

    def run_state(self, tuner: Any, adapter: str) -> dict[str, Any]:
        """What a training run of the adapter knows beyond its tensors: plain data and tensors, saved to resume."""
        return {}

    def load_run_state(self, tuner: Any, adapter: str, state: dict[str, Any]) -> None:
        """The inverse of `run_state`."""

    def owns(self, name: str) -> bool:
        """Whether a name in a file (without the layer's path) is one of this method's tensors."""
        return name.startswith(self.prefix)

    def to_file(self, p: Parts, name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
        """Tensors under which a slot is saved (without the layer's path). Default: itself under its name."""
        return {name: tensor}

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The inverse of `to_file` for all tensors of one layer (names without the layer's path)."""
        return tensors


def _check_declaration(cls: type[WeightMethod]) -> None:
    """Raise if slots, dropout and config of a method don't fit each other."""
    if "__dataclass_fields__" not in vars(cls.config):
        raise MethodError(
            f"{cls.config.__name__}, the config of {cls.peft_type}, needs @dataclass: without it its own fields are "
            "neither accepted nor saved."
        )
    known = [f.name for f in fields(cls.config)]
    if cls.dropout is not None and cls.dropout not in known:
        raise MethodError(
            f"{cls.peft_type}: dropout = {cls.dropout!r} names no field of {cls.config.__name__}."
            f"{nearest(cls.dropout, known)}"
        )
    names = [slot.name for slot in cls.slots]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MethodError(f"{cls.peft_type} has two slots named {' and '.join(map(repr, twice))}.")
    if cls.owns is WeightMethod.owns:
        strange = [s.name for s in cls.slots if s.saved is not False and not s.name.startswith(cls.prefix)]
        if strange:
            raise MethodError(
                f"{cls.peft_type}: files would hold {', '.join(map(repr, strange))}, which nothing finds there: names "
                f"of slots begin with {cls.prefix!r}; rename them, or set `prefix`."
            )


def method_of(config: Any) -> WeightMethod:
    """The method that a config configures."""
    peft_type = config.peft_type
    return registry.method(peft_type if isinstance(peft_type, PeftType) else PeftType(peft_type).value)
