"""How operators change an affine map, and the law that ties running to merging.

A layer computes `y = W x + b`. An update turns that map into another affine one, and can do so in two ways: on the way
(`forward`), or on the parameters (`weight`, `bias`). The law, for every update and every stack of them:

    forward(x)  =  weight(W) x + bias(b)

Relative updates (`Add`, `Rewrite`, `Magnitude`) are computed from the frozen W and b, whatever ran before them, so they
sum and commute. `Before` and `After` compose: the first of a stack is nearest to the frozen weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from peft.operators import Diagonal, HadamardLowRank, LowRank, Operator
from peft.operators.base import chunk, eager

Run = Callable[[Tensor], Tensor]

_SMALL = 1 << 16
"""Elements of a weight up to which a product with it costs less than a dozen calls."""


class Base(Protocol):
    """The frozen layer, as an update may see it. W is always (out, in), whatever the layer stores."""

    @property
    def weight(self) -> Tensor:
        """W (out, in); dequantised where the layer is quantised."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """b (out,), or None."""
        ...

    def remember(self, tensors: tuple[Tensor, ...], scale: float, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of W, these tensors and a number, kept between calls in inference until one of them
        changes.

        A change through `.data` is not seen before the layer's next `train()` or `eval()`; in training nothing is kept.
        """
        ...

    def run(self, x: Tensor) -> Tensor:
        """W x + b."""
        ...

    def lift(self, op: Operator, x: Tensor) -> Tensor:
        """The output that a layer with weight `op` and no bias gives (a convolution slides it, an embedding looks
        it up)."""
        ...

    def act(self, weight: Tensor, x: Tensor) -> Tensor:
        """The same for a dense weight."""
        ...

    def out(self, op: Operator, y: Tensor) -> Tensor:
        """`op` on the output features of y, wherever the layer puts them."""
        ...

    def shift(self, y: Tensor, bias: Tensor | None, sign: int = 1) -> Tensor:
        """y plus (or minus) a vector over output features."""
        ...

    def plus(self, weight: Tensor, delta: Tensor) -> Tensor:
        """The sum of two weights."""
        ...

    def mixable(self, weight: Tensor, block: int) -> Tensor:
        """The weight with columns that mean the same in all rows of a block: those of a grouped convolution don't."""
        ...


class Update:
    """Base of updates.

    `relative` updates are computed from the frozen W and b; `needs_weight` says that running it reads W, so a quantised
    layer has to dequantise; `acts_on_input` that it changes x, which not every layer type allows; `weight_only` that it
    can't run on the way at all.
    """

    relative: bool = False
    needs_weight: bool = False
    acts_on_input: bool = False
    weight_only: bool = False

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        """Output for x, given the map before (`prev`, whose bias is `bias`)."""
        raise NotImplementedError

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        """The weight (out, in) after the update, given the one before."""
        return weight

    def add_bias(self, bias: Tensor | None, base: Base) -> Tensor | None:
        """The bias after the update, given the one before."""
        return bias

    def transposed(self, base: Base) -> Update:
        """What a layer tied to the updated one, `base`, needs to hold the transpose of its weight still."""
        return Mirrored(self, base)


@dataclass(frozen=True, eq=False)
class Mirrored(Update):
    """The change that `inner` makes to the weight of `other`, for a layer tied to it: W -> inner(Wᵀ)ᵀ. No bias
    moves."""

    inner: Update
    other: Base
    needs_weight = True
    weight_only = True

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.inner.relative

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        return self.inner.weight(weight.mT, self.other).mT


@dataclass(frozen=True, eq=False)
class Add(Update):
    """W + op, b + shift. `dropout` acts on what the operator sees, and is gone when merged."""

    op: Operator
    shift: Tensor | None = None
    dropout: Callable[[Tensor], Tensor] | None = None
    relative = True

    def delta(self, x: Tensor, base: Base) -> Tensor:
        """What is added to the output, without `shift`."""
        return base.lift(self.op, x if self.dropout is None else self.dropout(x))

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        y = prev(x)
        y = y + self.delta(x, base).to(y.dtype)  # under autocast not all operators run in the dtype of the layer
        return y if self.shift is None else base.shift(y, self.shift)

    def transposed(self, base: Base) -> Update:
        return Add(self.op.T)

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        op = self.op
        if op.shape == weight.shape and (isinstance(op, LowRank) or op.like().dtype == weight.dtype):
            return op.to(weight.dtype).onto(weight)  # thin factors lose no more to rounding than x does
        return base.plus(weight, op.dense())

    def add_bias(self, bias: Tensor | None, base: Base) -> Tensor | None:
        return _sum(bias, self.shift)


@dataclass(frozen=True, eq=False)
class Shift(Update):
    """b + vector, of shape (out,) or (1, out)."""

    vector: Tensor
    relative = True

    @property
    def shift(self) -> Tensor:
        """What is added (out,)."""
        return self.vector.flatten()

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        return base.shift(prev(x), self.shift)

    def add_bias(self, bias: Tensor | None, base: Base) -> Tensor | None:
        return _sum(bias, self.shift)


@dataclass(frozen=True, eq=False)
class Rewrite(Update):
    """W + delta(W), b + shift(W, b): any function of the frozen parameters.

    `delta` maps W (out, in) to what is added to it; `shift` maps (W, b) to what is added to b, or None.
    """

    delta: Callable[[Tensor], Tensor]
    shift: Callable[[Tensor, Tensor | None], Tensor | None] | None = None
    dropout: Callable[[Tensor], Tensor] | None = None
    relative = True
    needs_weight = True

    def _shift(self, base: Base) -> Tensor | None:
        return None if self.shift is None else self.shift(base.weight, base.bias)

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        seen = x if self.dropout is None else self.dropout(x)
        y = prev(x) + base.act(self.delta(base.weight), seen)
        return base.shift(y, self._shift(base))

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        return base.plus(weight, self.delta(base.weight))

    def add_bias(self, bias: Tensor | None, base: Base) -> Tensor | None:
        return _sum(bias, self._shift(base))


@dataclass(frozen=True, eq=False)
class Before(Update):
    """W op: the operator acts on the input."""

    op: Operator
    dropout: Callable[[Tensor], Tensor] | None = None
    acts_on_input = True

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        seen = x if self.dropout is None else self.dropout(x)
        return prev(self.op.on(seen))

    def transposed(self, base: Base) -> Update:
        return After(self.op.T, keep_bias=True)

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        # A grouped convolution has as many columns as one group, unless another update has widened it to all groups.
        return _apply(self.op.T, weight.unflatten(1, (-1, self.op.shape[0]))).flatten(1)


@dataclass(frozen=True, eq=False)
class After(Update):
    """op W: the operator acts on the output; on the bias too unless `keep_bias`."""

    op: Operator
    keep_bias: bool = False

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        y = prev(x)
        if self.keep_bias and bias is not None:
            return base.shift(base.out(self.op, base.shift(y, bias, -1)), bias)
        return base.out(self.op, y)

    def transposed(self, base: Base) -> Update:
        return Before(self.op.T)

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        return _apply(self.op, base.mixable(weight, self.op.reach).mT).mT

    def add_bias(self, bias: Tensor | None, base: Base) -> Tensor | None:
        return bias if self.keep_bias or bias is None else _apply(self.op, bias)


@dataclass(frozen=True, eq=False)
class Chain(Update):
    """Several updates as one, the first nearest to W."""

    links: tuple[Update, ...]

    @property
    def acts_on_input(self) -> bool:  # type: ignore[override]
        return any(link.acts_on_input for link in self.links)

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        return any(link.needs_weight for link in self.links)

    @property
    def weight_only(self) -> bool:  # type: ignore[override]
        return any(link.weight_only for link in self.links)

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        for link in self.links:
            prev, bias = partial(link.forward, prev=prev, bias=bias, base=base), link.add_bias(bias, base)
        return prev(x)

    def transposed(self, base: Base) -> Update:
        return Chain(tuple(link.transposed(base) for link in self.links))

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        for link in self.links:
            weight = link.weight(weight, base)
        return weight

    def add_bias(self, bias: Tensor | None, base: Base) -> Tensor | None:
        for link in self.links:
            bias = link.add_bias(bias, base)
        return bias


@dataclass(frozen=True, eq=False)
class Magnitude(Update):
    """Rows of the updated weight rescaled to learnt lengths: diag(m / |W + op|) (W + op), DoRA (arXiv 2402.09353).

    `inner` is the update whose direction is kept, `magnitude` (out,) the lengths. The norm takes part as a constant:
    no gradient flows through it (section 4.3 of the paper).
    """

    inner: Add
    magnitude: Tensor
    relative = True
    needs_weight = True

    def gain(self, base: Base) -> Tensor:
        """m / |W + op| (out,)."""
        op = self.inner.op
        if not isinstance(op, LowRank) or isinstance(op.scale, Tensor):
            return self.magnitude / _constant_row_norms(op, base)
        return self.magnitude / base.remember((op.down, op.up), op.scale, partial(_constant_row_norms, op, base))

    def forward(self, x: Tensor, prev: Run, bias: Tensor | None, base: Base) -> Tensor:
        gain = self.gain(base)
        seen = x if self.inner.dropout is None else self.inner.dropout(x)
        y = prev(x)
        frozen = base.shift(base.run(seen), base.bias, -1)
        y = y + base.out(Diagonal(gain - 1), frozen) + base.out(Diagonal(gain), base.lift(self.inner.op, seen))
        return base.shift(y, self.inner.shift)

    def weight(self, weight: Tensor, base: Base) -> Tensor:
        gain, op = self.gain(base)[:, None], self.inner.op
        delta = op.dense()
        if delta.shape != base.weight.shape:
            return base.plus(base.plus(weight, (gain - 1) * base.weight), gain * delta)
        if _is_ours(delta, weight, op):
            return delta.mul_(gain).addcmul_(gain - 1, base.weight).add_(weight)
        return base.plus(weight, (gain * delta).addcmul(gain - 1, base.weight))

    def add_bias(self, bias: Tensor | None, base: Base) -> Tensor | None:
        return self.inner.add_bias(bias, base)


def _is_ours(delta: Tensor, weight: Tensor, op: Operator) -> bool:
    """Whether the sum of both may be written over `delta`, which `op` has made: fresh memory costs as much as a sum."""
    alike = delta.dtype == weight.dtype and delta.shape == weight.shape and delta.stride() == weight.stride()
    return alike and isinstance(op, (LowRank, HadamardLowRank)) and not torch.is_grad_enabled()


def row_norms(op: Operator, base: Base) -> Tensor:
    """The norm of each row of W + op (out,), without building W + op where the operator is thin.

    |w + s b A|² = |w|² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ for each row.
    """
    weight = base.weight.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if not (isinstance(op, LowRank) and op.groups == 1) or weight.numel() <= _SMALL:
        return torch.linalg.vector_norm(base.plus(weight, op.to(dtype).dense()), dim=1)
    # Not kept between steps: it costs a hundredth of a step, and a change of W through `.data` would leave no trace.
    squares, wide = _squares(weight, dtype), op.to(dtype)
    up = wide.up * wide.scale
    # The product with W runs in W's dtype, so no wider copy of W is made; it sums in float32 all the same.
    cross = (up * (weight @ op.down.to(weight.dtype).mT).to(up.dtype)).sum(1)
    square = (up @ (wide.down @ wide.down.mT) * up).sum(1)
    return (squares + 2 * cross + square).clamp_min(0).sqrt()


def _squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """|w|² of each row of a matrix (out, in)."""
    if weight.stride(1) == 1 or weight.device.type != "cpu" or not eager():
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    # Of columns in memory (embeddings, Conv1D) torch's norm takes ten times as long as sums over a few rows at a time.
    total = torch.zeros(weight.shape[0], dtype=dtype)
    for rows in weight.mT.split(chunk(weight, weight.shape[0])):
        total += rows.to(dtype).square().sum(0)
    return total


def _constant_row_norms(op: Operator, base: Base) -> Tensor:
    with torch.no_grad():
        return row_norms(op, base)


def _apply(op: Operator, x: Tensor) -> Tensor:
    """`op` on x in the wider of their dtypes: 16-bit weights meet adapters in float32."""
    dtype = torch.promote_types(op.like().dtype, x.dtype)
    return op.to(dtype).apply(x.to(dtype))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b.to(a.dtype)
