"""What every matrix of the catalogue can do, and the defaults that make half of it free.

The contract comes in three grades:

* needed: `shape`, and one of `apply` and `dense` (each is the default of the other);
* worth giving for speed: the other one, `flops` and `flops_dense`, `T`, `columns`;
* only where it holds: `factors`, the exact thin factors of a matrix of low rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from peft.errors import ShapeError

Scale = float | Tensor
"""A number, or a 0-d tensor where the number is learnt or changes without a recompilation."""

_NARROW = 24
"""Rows up to which oneDNN's 16-bit product is faster, by up to three times, where they don't come last (measured)."""

SMALL = 1 << 16
"""Elements of input and output together up to which calls cost more than what they compute (measured on a CPU)."""

Op = TypeVar("Op", bound="Operator")


@dataclass(frozen=True, eq=False)
class Operator:
    """A matrix of shape (out, in) that knows how to act on the last dimension of a tensor.

    Subclasses are frozen dataclasses whose fields are tensors, operators (or tuples of them) and numbers; they hold
    what they are given and copy nothing, so gradients flow to the fields. All tensors of one operator, and the input
    of `apply`, share a dtype; `to` brings an operator there.

    >>> from peft.operators import LowRank
    >>> op = LowRank(down=torch.randn(2, 6), up=torch.randn(4, 2))
    >>> op.shape
    (4, 6)
    >>> op.apply(torch.randn(5, 6)).shape
    torch.Size([5, 4])
    """

    by_adjoint: ClassVar[bool] = False
    """Whether `T.apply` is a cheaper way to the gradient of the input than differentiating `apply` (FFTs)."""

    brief: ClassVar[bool] = False
    """Whether building `dense` takes fewer calls than `apply` does, which decides where all that runs is small."""

    rounds: ClassVar[bool] = False
    """Whether its sum with a 16-bit weight may be rounded to 16 bits on the way, as a merge would: where entries stand
    beside those of W and a product of their own would cost more than the layer."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.apply is Operator.apply and cls.dense is Operator.dense:
            raise TypeError(f"{cls.__name__} needs `apply` or `dense`: each is only the default of the other.")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError(f"{type(self).__name__} does not say its `shape`.")

    @property
    def reach(self) -> int:
        """Rows that mix: of a square matrix only entries in diagonal blocks of this size differ from zero."""
        return self.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), equal to `x @ dense().T`."""
        return F.linear(x, self.dense())

    def on(self, x: Tensor) -> Tensor:
        """`apply` in the dtype of x."""
        return self.to(x.dtype).apply(x)

    def over(self, y: Tensor, x: Tensor) -> Tensor:
        """y (n, out) + op x for x (n, in), all of one dtype, written over y."""
        return y.add_(self.apply(x))

    def dense(self) -> Tensor:
        """The matrix itself, (out, in)."""
        like = self.like()
        return self.apply(torch.eye(self.shape[1], dtype=like.dtype, device=like.device)).mT

    def onto(self, weight: Tensor) -> Tensor:
        """`weight + dense()`, for a weight of the same dtype; a new tensor."""
        return weight + self.dense()

    def keeps(self, x: Tensor) -> bool:
        """Whether what differentiating `apply` keeps is thin beside x, or takes too long to make again."""
        return False

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """Backward of `apply` without running it again: for x (n, in) and the gradient (n, out) of its result.

        Returns:
            The gradient of x (None unless `need_x`), a tensor on the way from the fields to the result, and the
            gradient of that. None where differentiating `apply` is as good.
        """
        return None

    def pull_dense(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The same for `dense`, given the gradient (out, in) of its result: the tensor on the way, and its gradient."""
        return self.dense(), grad

    def flops(self, tokens: int) -> float:
        """Floating point operations of `apply` on `tokens` vectors, including what it prepares once per call."""
        return self.flops_dense(tokens) if type(self).apply is Operator.apply else gemm(tokens, *self.shape)

    def flops_dense(self, tokens: int) -> float:
        """Floating point operations of building `dense()` and multiplying `tokens` vectors with it."""
        build = self.flops(self.shape[1]) if type(self).dense is Operator.dense else 0
        return build + gemm(tokens, *self.shape)

    @property
    def T(self) -> Operator:
        """The transpose, of shape (in, out)."""
        return Transposed(self)

    def columns(self, index: Tensor) -> Tensor:
        """Integer index (...,) -> (..., out): the columns `dense().T[index]`, as an embedding needs them."""
        return F.embedding(index, self.dense().mT)

    def narrowed(self) -> tuple[Tensor, Operator] | None:
        """A matrix (k, in) that does not learn, and the operator (out, k) after it; None where the first one learns."""
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`up` (out, k) and `down` (k, in) with `up @ down == dense()` where the rank is low by construction."""
        return None

    def to(self: Op, dtype: torch.dtype) -> Op:
        """The operator with its floating point tensors in `dtype`; itself when they already are."""
        values: dict[str, Any] = {name: _cast(getattr(self, name), dtype) for name in self.__match_args__}
        if all(value is getattr(self, name) for name, value in values.items()):
            return self
        return made_of(type(self), values)

    def like(self) -> Tensor:
        """A tensor with the dtype and device of the matrix."""
        for field in fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Operator):
                    return item.like()
                if isinstance(item, Tensor) and item.is_floating_point():
                    return item
        raise NotImplementedError(f"{type(self).__name__} holds no tensor, so it has to say its `like`.")


def narrow(x: Tensor, factor: Tensor) -> Tensor:
    """x (n, k) times the transpose of a factor (r, k) of few rows."""
    factor = factor.to(x.dtype)
    if x.element_size() == 2 and factor.shape[0] <= _NARROW:
        return (factor @ x.mT).mT
    return F.linear(x, factor)


def picked(thin: Tensor, index: Tensor) -> Tensor:
    """Columns (…, r) of a matrix (r, in) of few rows, at integer index (…)."""
    # A lookup in the transpose would read, and in backward write, whole rows of it one element at a time.
    return thin.index_select(1, index.reshape(-1)).mT.reshape(*index.shape, thin.shape[0])


def made_of(cls: type[Op], values: dict[str, Any]) -> Op:
    """An operator with these fields, whose shapes are not checked: they are those of one that was."""
    if torch.compiler.is_compiling():
        return cls(**values)
    made = object.__new__(cls)
    made.__dict__.update(values)
    return made


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that an operator is made of, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Operator):
        value = [getattr(value, name) for name in value.__match_args__]
    return [t for item in value for t in tensors_of(item)] if isinstance(value, (list, tuple)) else []


def shell(value: Any) -> Any:
    """An operator without its tensors, so that a node that keeps it keeps none of them."""
    return _mapped(value, lambda _: _HOLE)


def filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `shell`, given the tensors in the order of `tensors_of`."""
    return _mapped(value, lambda _: next(tensors))


_HOLE = object()


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor) or value is _HOLE:
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    if not isinstance(value, Operator):
        return value
    return made_of(type(value), {name: _mapped(getattr(value, name), change) for name in value.__match_args__})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A field in `dtype`; itself when it already is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype != dtype and value.is_floating_point() else value
    if isinstance(value, Operator):
        return value.to(dtype)
    if isinstance(value, tuple):
        items = tuple([_cast(item, dtype) for item in value])
        return value if all(one is two for one, two in zip(items, value, strict=True)) else items
    return dtype if isinstance(value, torch.dtype) else value


def sources(*pairs: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    """What `pull` returns where several tensors lie on the way: those that are differentiated, and their gradients."""
    needed = [pair for pair in pairs if pair[0].requires_grad]
    return tuple(tensor for tensor, _ in needed), tuple(grad for _, grad in needed)


def eager() -> bool:
    """Whether operations run one by one, here and now: nothing compiles, vectorises or differentiates functions."""
    compiling = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not compiling and forward_ad._current_level < 0


def act(op: Operator, x: Tensor) -> Tensor:
    """`op.apply(x)`, or one GEMM with `op.dense()` where that takes fewer operations.

    >>> from peft.operators import Identity
    >>> act(Identity(3), torch.arange(3.0))
    tensor([0., 1., 2.])
    """
    tokens = math.prod(x.shape[:-1])
    if op.flops(tokens) <= op.flops_dense(tokens):
        return op.apply(x)
    return F.linear(x, op.dense())


def gemm(tokens: int, out: int, inner: int) -> float:
    """Operations of (tokens, inner) @ (inner, out)."""
    return 2.0 * tokens * out * inner


def rfft_flops(size: int) -> float:
    """What a real FFT costs, in operations of a GEMM: 2.5 n log2 n of its own, eight times slower (measured)."""
    return 20.0 * size * math.log2(max(size, 2))


def cheapest(op: Operator, tokens: int) -> float:
    """Operations of `act(op, x)` for `tokens` vectors."""
    return min(op.flops(tokens), op.flops_dense(tokens))


def chunk(like: Tensor, width: int) -> int:
    """Tokens of `width` elements that are transformed at a time: on a CPU, as many as stay in its cache."""
    return max(1, (1 << 17 if like.device.type == "cpu" else 1 << 24) // width)


def unrecorded(*tensors: Tensor) -> bool:
    """Whether nothing follows what happens to these tensors, so that results may be written in place."""
    return eager() and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def scaled(x: Tensor, scale: Scale) -> Tensor:
    """`x * scale`, without a copy where the scale is the number one."""
    return x if isinstance(scale, (int, float)) and scale == 1 else x * scale


def widened(x: Tensor) -> Tensor:
    """`x` in float32 where it has 16 bits: FFTs and linear solves know no half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def expect(holds: bool, operator: Operator, rule: str) -> None:
    """Raises ShapeError with the `rule` that the fields of `operator` broke, and the sizes they have."""
    if holds:
        return
    sizes = []
    for field in fields(operator):
        value = getattr(operator, field.name)
        if isinstance(value, (Tensor, Operator)):
            sizes.append(f"{field.name} {tuple(value.shape)}")
        elif isinstance(value, tuple):
            sizes.append(f"{field.name} [{', '.join(str(tuple(item.shape)) for item in value)}]")
        else:
            sizes.append(f"{field.name} {value}")
    raise ShapeError(f"{type(operator).__name__}: {rule}; got {', '.join(sizes)}.")


@dataclass(frozen=True, eq=False)
class Transposed(Operator):
    """The transpose of an operator that has no better form of it."""

    op: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return self.op.shape[1], self.op.shape[0]

    def dense(self) -> Tensor:
        return self.op.dense().mT

    def flops_dense(self, tokens: int) -> float:
        return self.op.flops_dense(tokens)

    @property
    def T(self) -> Operator:
        return self.op

    def factors(self) -> tuple[Tensor, Tensor] | None:
        factors = self.op.factors()
        return None if factors is None else (factors[1].mT, factors[0].mT)
