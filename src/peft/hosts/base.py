"""The contract of a host, and how the host of a module is found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peft.operators import Operator

if TYPE_CHECKING:
    from peft.autograd import Form
    from peft.updates import Base

_HOSTS: dict[str, type[Host]] = {}


class Host:
    """A base layer seen as a matrix W (out, in) with a bias b (out,).

    A host is made anew for each call, holds nothing but its module, and is the only code that knows how that type of
    layer stores and applies its weight. Subclasses give `name`, `types`, `weight` and `act`; those on which operators
    can run without the dense weight give `lift` and `out` as well; the others say so in `factored`.
    """

    name: ClassVar[str] = ""
    """Class name of the adapted layer in the PEFT API."""
    types: ClassVar[tuple[str, ...]] = ()
    """Qualified names of the layer types, so that nothing is imported to look one up."""
    on_input: ClassVar[bool] = False
    """Whether an operator can be applied to the layer's input in place of its weight."""
    fuses: ClassVar[bool] = False
    """Whether there is a `fused`."""
    takes_bias: ClassVar[bool] = True
    """Whether the layer type has a bias at all."""
    beside: ClassVar[str] = ""
    """Name of a layer inside it that is adapted beside it."""
    one_hot: ClassVar[bool] = False
    """Whether inputs are indices of the columns of W (an embedding) and can't be multiplied by anything."""
    fan_in_fan_out: ClassVar[bool] = False
    """Whether the layer stores its weight as (in, out)."""
    parameter: ClassVar[str] = "weight"
    """The parameter that holds W."""
    bias_parameter: ClassVar[str] = "bias"
    opaque: ClassVar[bool] = False
    """Whether the layer itself runs, by kernels of its own, and `weight()` is made on demand (quantised layers)."""
    fresh: ClassVar[bool] = False
    """Whether an opaque layer's outputs are new tensors that nobody else holds, so that they may be written over."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _HOSTS.update(dict.fromkeys(cls.__dict__.get("types", ()), cls))

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    # what it is

    @property
    def raw(self) -> Tensor:
        """The stored weight, whatever its shape and dtype."""
        found = self.module._parameters.get(self.parameter)  # attributes of modules are looked up slowly
        if found is None:
            return getattr(self.module, self.parameter)
        return fetched(self.module, self.parameter, found) if found.is_meta else found

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        hook = offloaded(self.module)
        return self.raw.device if hook is None else torch.device(hook.execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight has, or is dequantised to."""
        return self.raw.dtype

    @property
    def backend(self) -> str | None:
        """What quantised the layer, in the words of HF PEFT (`"bnb 4bit"`); None for plain layers."""
        return None

    @property
    def writable(self) -> bool:
        """Whether the layer can be given another weight, so that adapters can be merged into it."""
        return True

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.weight().shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.weight().shape[1]

    @property
    def always_acts(self) -> bool:
        """Whether `act` runs even with nothing to update; here, because a layer inside may be adapted."""
        return bool(self.beside)

    @property
    def factored(self) -> bool:
        """Whether updates run on the way, without the dense weight."""
        return True

    @property
    def groups(self) -> int:
        """Blocks into which the output is split (grouped convolutions), else 1."""
        return 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps of a convolution in each of its dimensions; empty for other layers."""
        return ()

    @property
    def layout(self) -> dict[str, int]:
        """Sizes that methods may use beyond (out, in); a convolution tells its channels and kernel here."""
        return {}

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """The shape that the stored weight has where nothing quantises it."""
        return tuple(self.raw.shape)

    def weight(self) -> Tensor:
        """W (out, in), a view where possible; dequantised, a new tensor, where the layer is quantised."""
        return self.raw

    def bias(self) -> Tensor | None:
        """b (out,), or None."""
        found = self.module._parameters.get(self.bias_parameter, self)
        if found is self:
            return getattr(self.module, self.bias_parameter, None)
        return fetched(self.module, self.bias_parameter, found) if found is not None and found.is_meta else found

    def native(self, weight: Tensor) -> Tensor:
        """W (out, in) in the shape in which the layer stores it."""
        return weight

    def packed(self, weight: Tensor) -> Tensor:
        """W (out, in) as the layer stores it: a new tensor, quantised by the layer's own settings where it is."""
        return self.native(weight).to(self.dtype).contiguous()

    def adjust(self, weight: Tensor, stored: Tensor) -> dict[str, Any]:
        """Attributes of the layer that must change for it to hold `weight`, packed as `stored` (groups of a
        convolution, states of quantisers)."""
        return {}

    # how it acts

    def act(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with W and b replaced for this call."""
        raise NotImplementedError

    def run(self, layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the layer (or of an adapted one that stands around it), with a gradient for x even where the
        layer's own kernel has none."""
        return layer(x, *args, **kwargs)

    def lift(self, op: Operator, x: Tensor) -> Tensor:
        """The output of a layer whose weight is `op` and whose bias is none."""
        return self.act(op.dense().to(x.dtype), None, x)

    def out(self, op: Operator, y: Tensor) -> Tensor:
        """`op` on the output features of y."""
        return op.on(y).to(y.dtype)  # autocast would give its own dtype

    def fused(self, form: Form, base: Base, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output under a stack of updates in fewer passes over memory than `forward` of each takes; None where
        this type of layer has no way for it.

        Args:
            form: The stack.
            base: The frozen layer.
            x: The layer's input.
            weight: W (out, in), with whatever is merged.
            bias: b (out,), or None.
        """
        return None

    def shift(self, y: Tensor, bias: Tensor | None, sign: int = 1) -> Tensor:
        """y plus or minus a vector over output features."""
        if bias is None:
            return y
        return y + bias.to(y.dtype) if sign > 0 else y - bias.to(y.dtype)

    def plus(self, weight: Tensor, delta: Tensor) -> Tensor:
        """The sum of two weights of this layer."""
        return weight + delta

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """What the layer type does to an output that updates have passed through."""
        return y

    def mixable(self, weight: Tensor, block: int) -> Tensor:
        """A weight whose rows can be mixed within blocks of consecutive ones."""
        return weight

    def rows(self, x: Tensor, kwargs: dict[str, Any]) -> int:
        """The dimension of inputs and outputs that counts samples."""
        return 0

    # what an adapter of it is made of

    def leaf(self, kind: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """The module that holds a factor: `down` (r, in) or `up` (out, r) as a layer. None: a bare parameter does."""
        return linear(shape[1], shape[0], device, dtype)

    def slot_name(self, name: str) -> str:
        """The name under which a factor is stored."""
        return name


def named_host(module: nn.Module) -> type[Host] | None:
    """The host registered for a module's class, or for one that it derives from."""
    for cls in type(module).__mro__:
        if (host := _HOSTS.get(qualified(cls))) is not None:
            return host
    return None


def qualified(cls: type) -> str:
    """The name by which a layer type is registered."""
    return f"{cls.__module__}.{cls.__qualname__}"


def supported() -> list[str]:
    """Names of the layer types that have a host."""
    return sorted({name.rpartition(".")[2] for name in _HOSTS})


def offloaded(module: nn.Module) -> Any:
    """The hook by which accelerate brings a module's parameters from where it keeps them to a call; None without."""
    hook = module.__dict__.get("_hf_hook")
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "weights_map", None) is not None), None)


def fetched(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The values of a parameter on the meta device, if accelerate keeps them elsewhere; else the parameter."""
    hook = offloaded(module)
    return parameter if hook is None else hook.weights_map[name].to(hook.execution_device)


_BLANK = vars(nn.Module())
_FLAGS = {name: value for name, value in _BLANK.items() if not hasattr(value, "copy")}
_EMPTY = [(name, type(value)) for name, value in _BLANK.items() if name not in _FLAGS]


def blank() -> dict[str, Any]:
    """What `nn.Module.__init__` sets; not by `nn.Module.__setattr__`, since large models get thousands of modules."""
    attributes = _FLAGS.copy()
    for name, kind in _EMPTY:
        attributes[name] = kind()
    return attributes


def bare(cls: type[nn.Module], **attributes: Any) -> nn.Module:
    """A module of a given class without running its `__init__`, which would fill weights that are thrown away."""
    module = cls.__new__(cls)
    module.__dict__.update(blank(), **attributes)
    return module


def linear(in_features: int, out_features: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """An `nn.Linear` without bias whose weight is allocated and not filled."""
    module = bare(nn.Linear, in_features=in_features, out_features=out_features)
    weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    module._parameters.update(weight=weight, bias=None)
    return module  # type: ignore[return-value]
