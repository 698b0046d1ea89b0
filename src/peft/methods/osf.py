"""OSF: training within what the weight does not use (arXiv 2504.07097)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft import patterns
from peft.config import TargetedConfig
from peft.errors import ConfigError, PeftWarning
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Operator
from peft.operators.base import eager, gemm, sources, unrecorded
from peft.parts import Parts
from peft.slots import Sizes, Slot
from peft.updates import Add, Update


@dataclass
class OSFConfig(TargetedConfig):
    """OSF (arXiv 2504.07097): the top singular triplets of W stay, the others are trained at right angles to them.

    W = U S Vᵀ is split after `effective_rank` triplets. The rest (U_low, S_low, V_low) is trained, and the gradients
    of U_low and V_low are projected off the frozen directions, so that what was learnt before is not overwritten.

    Example:
        >>> from peft import OSFConfig
        >>> OSFConfig(effective_rank=0.5, target_modules=["q_proj"]).effective_rank
        0.5
    """

    effective_rank: int | float | None = field(
        default=None, metadata={"help": "Frozen triplets: a number, a share (above 0, at most 1), or None for half."}
    )
    rank_pattern: dict[str, int | float] | None = field(
        default=None, metadata={"help": "{name or regex: effective rank}; first match wins."}
    )
    init_weights: bool | None = field(default=True, metadata={"help": "Start at W; False: from noise."})
    target_svd_config: dict[str, int] | None = field(
        default=None, metadata={"help": "Without effect, as in HF PEFT; rank_pattern gives ranks by name."}
    )

    _optional: ClassVar[frozenset[str]] = TargetedConfig._optional | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and rank <= 0:
                raise ConfigError(
                    f"OSFConfig: an effective rank of {rank}; it is a number of triplets or a share, above 0."
                )
        if self.target_svd_config:
            warnings.warn(
                "OSFConfig.target_svd_config has no effect, here as in HF PEFT. Give ranks by name in rank_pattern.",
                PeftWarning,
                stacklevel=3,
            )


def _low(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {"U_low": (sizes["out"], sizes.low), "S_low": (sizes.low,), "V_low": (sizes.low, sizes["in"])}


class OSF(WeightMethod, peft_type="OSF", config=OSFConfig):
    slots = (
        Slot("osf_svd_params", _low, kind="group", when="low"),
        Slot("osf_U", "out all", kind="buffer", saved=False),
        Slot("osf_S", "all", kind="buffer", saved=False),
        Slot("osf_V", "all in", kind="buffer", saved=False),
    )
    settings = ("effective_rank",)
    fallback_targets = "all-linear"
    samples = ({}, {"effective_rank": 2, "init_weights": False})

    def resolve(self, config: OSFConfig, host: Host, site: Site) -> dict[str, Any]:
        most = min(host.in_features, host.out_features)
        rank = patterns.lookup(config.rank_pattern, site.key, config.effective_rank)
        if rank is None:
            rank = most // 2
        elif isinstance(rank, float) and rank <= 1:
            rank = rank * most
        kept = min(int(rank), most)
        return {"effective_rank": kept, "low": most - kept, "all": most}

    def derive(self, p: Parts, host: Host) -> None:
        weight = p.call(host).weight
        weight = weight if weight.dtype == torch.float64 else weight.float()
        for held, part in zip((p.osf_U, p.osf_S, p.osf_V), torch.linalg.svd(weight, full_matrices=False), strict=True):
            held.copy_(part)

    def reset(self, p: Parts, host: Host) -> None:
        start = _rest(p)
        for name, tensor in p.osf_svd_params.items() if p.has("osf_svd_params") else ():
            nn.init.normal_(tensor) if p.config.init_weights is False else tensor.copy_(start[name])

    def from_file(self, p: Parts, tensors: dict[str, Tensor], config: OSFConfig) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if tensor.numel()}  # HF PEFT keeps empty ones

    def update(self, p: Parts, host: Host) -> Update:
        group = p.osf_svd_params if p.has("osf_svd_params") else _rest(p)
        return Add(Retrained(group["U_low"], group["S_low"], group["V_low"], p.osf_U, p.osf_S, p.osf_V))


def _rest(p: Parts) -> dict[str, Tensor]:
    """The triplets of W that are not frozen."""
    kept = p.effective_rank
    return {"U_low": p.osf_U[:, kept:], "S_low": p.osf_S[kept:], "V_low": p.osf_V[kept:]}


@dataclass(frozen=True, eq=False)
class Retrained(Operator):
    """What training the last k of n singular triplets adds to a weight: `up diag(s) down`, less what they were.

    Gradients of `up` lose their part in the span of the first columns of `u`, those of `down` that in the first rows of
    `v`. So that this is as exact in 16 bits, the tensors keep their dtype; that of the matrix is `dtype`, None for
    theirs.

    Shapes: `up` (out, k), `s` (k,), `down` (k, in); `u` (out, n), `d` (n,) and `v` (n, in).
    """

    up: Tensor
    s: Tensor
    down: Tensor
    u: Tensor
    d: Tensor
    v: Tensor
    dtype: torch.dtype | None = None
    brief = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def _start(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the trained triplets were."""
        k, dtype = self.s.shape[0], self.dtype
        kept = self.d.shape[0] - k
        start = self.u.narrow(1, kept, k), self.d.narrow(0, kept, k), self.v.narrow(0, kept, k)
        return start if dtype is None else (start[0].to(dtype), start[1].to(dtype), start[2].to(dtype))

    def _guarded(self) -> tuple[Tensor, Tensor]:
        """Thin factors of the trained part."""
        kept, dtype = self.d.shape[0] - self.s.shape[0], self.dtype or self.s.dtype
        up, down = OffSubspace.apply(self.up, self.u[:, :kept]), OffSubspace.apply(self.down.mT, self.v[:kept].mT).mT
        return (up * self.s).to(dtype), down.to(dtype)

    def apply(self, x: Tensor) -> Tensor:
        u, d, v = self._start()
        if unrecorded(x, self.up, self.s, self.down):
            y = _thin(x, self.up, self.s, self.down)
        elif eager():
            y = Thin.apply(x, self.up, self.s, self.down, self.u, self.v)
        else:
            up, down = self._guarded()
            y = F.linear(F.linear(x, down), up)
        return y - F.linear(F.linear(x, v) * d, u)

    def dense(self) -> Tensor:
        u, d, v = self._start()
        if unrecorded(self.up, self.s, self.down):
            whole = _whole(self.up, self.s, self.down, u.dtype)
        elif eager():
            whole = Whole.apply(self.up, self.s, self.down, self.u, self.v, u.dtype)
        else:
            up, down = self._guarded()
            whole = up @ down
        return torch.addmm(whole, u * d, v, alpha=-1)

    def columns(self, index: Tensor) -> Tensor:
        (up, down), (u, d, v) = self._guarded(), self._start()
        return F.linear(F.embedding(index, down.mT), up) - F.linear(F.embedding(index, v.mT) * d, u)

    @property
    def T(self) -> Retrained:
        return Retrained(self.down.mT, self.s, self.up.mT, self.v.mT, self.d, self.u.mT, self.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        (up, down), (u, d, v) = self._guarded(), self._start()
        return torch.cat((up, -u * d), 1), torch.cat((down, v))

    def flops(self, tokens: int) -> float:
        return gemm(tokens, sum(self.shape), 2 * self.s.shape[0])

    def flops_dense(self, tokens: int) -> float:
        return gemm(*self.shape, 2 * self.s.shape[0]) + gemm(tokens, *self.shape)

    def to(self, dtype: torch.dtype) -> Retrained:
        return self if dtype == (self.dtype or self.s.dtype) else replace(self, dtype=dtype)

    def like(self) -> Tensor:
        return self.s if self.dtype is None else torch.empty(0, dtype=self.dtype, device=self.s.device)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> Any:
        with torch.no_grad():
            back, *found = Thin.pull(x, self.up, self.s, self.down, self.u, self.v, grad, need_x)
            if need_x:
                u, d, v = self._start()
                back = back.addmm_(grad @ u * d, v, alpha=-1)
        return back, *sources(*zip((self.up, self.s, self.down), found, strict=True))

    def pull_dense(self, grad: Tensor) -> Any:
        with torch.no_grad():
            found = Whole.pull(self.up, self.s, self.down, self.u, self.v, grad)
        return sources(*zip((self.up, self.s, self.down), found, strict=True))


def _thin(x: Tensor, up: Tensor, s: Tensor, down: Tensor) -> Tensor:
    dtype = x.dtype
    return F.linear(F.linear(x, down.to(dtype)) * s.to(dtype), up.to(dtype))


def _whole(up: Tensor, s: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    return (up * s).to(dtype) @ down.to(dtype)


class Thin(torch.autograd.Function):
    """x (…, in) times the transpose of `up diag(s) down`; see `Retrained` for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, s: Tensor, down: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(x, up, s, down, u, v)
        return _thin(x, up, s, down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *triplets = ctx.saved_tensors
        tokens, grad = x.reshape(-1, x.shape[-1]), grad.to(x.dtype).reshape(-1, grad.shape[-1])
        up, s, down, u, v = triplets
        back, *found = Thin.pull(tokens, up, s, down, u, v, grad, ctx.needs_input_grad[0])
        return None if back is None else back.view(x.shape), *found, None, None

    @staticmethod
    def pull(
        x: Tensor, up: Tensor, s: Tensor, down: Tensor, u: Tensor, v: Tensor, grad: Tensor, need_x: bool
    ) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Gradients of x (tokens, in), `up`, `s` and `down`, given that of the result (tokens, out)."""
        scale, wide, kept = s.to(x.dtype), up.dtype, u.shape[1] - s.shape[0]
        u, v = u[:, :kept], v[:kept]
        left, right = grad @ up.to(x.dtype), F.linear(x, down.to(x.dtype))
        grad_s = (left * right).sum(0, dtype=wide)
        left, right = left * scale, right * scale
        back = left @ down.to(x.dtype) if need_x else None
        if 2 * len(x) <= len(s):  # so few that projecting them takes less than projecting the sums of their products
            grad, x = grad.to(wide), x.to(wide)
            grad, x = _off_rows(grad, u.mT), _off_rows(x, v)
            return back, grad.mT @ right.to(wide), grad_s, left.to(wide).mT @ x
        return back, _off_columns((grad.mT @ right).to(wide), u), grad_s, _off_rows((left.mT @ x).to(wide), v)


class Whole(torch.autograd.Function):
    """`up diag(s) down` (out, in) in a dtype; see `Retrained` for gradients."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, s: Tensor, down: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(up, s, down, u, v)
        return _whole(up, s, down, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        up, s, down, u, v = ctx.saved_tensors
        return *Whole.pull(up, s, down, u, v, grad), None, None, None

    @staticmethod
    def pull(up: Tensor, s: Tensor, down: Tensor, u: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `up`, `s` and `down`, given that of the result (out, in)."""
        kept = u.shape[1] - s.shape[0]
        left = (grad @ down.to(grad.dtype).mT).to(up.dtype)
        right = ((up * s).to(grad.dtype).mT @ grad).to(up.dtype)
        return _off_columns(left * s, u[:, :kept]), (up * left).sum(0), _off_rows(right, v[:kept])


def _off_columns(grad: Tensor, u: Tensor) -> Tensor:
    """What of grad (out, k) is at right angles to the columns of u (out, m)."""
    return torch.addmm(grad, u, u.mT @ grad, alpha=-1)


def _off_rows(grad: Tensor, v: Tensor) -> Tensor:
    """What of grad (k, in) is at right angles to the rows of v (m, in)."""
    return torch.addmm(grad, grad @ v.mT, v, alpha=-1)


class OffSubspace(torch.autograd.Function):
    """The identity on x (n, k), whose gradient loses its part in the span of the columns of u (n, m)."""

    @staticmethod
    def forward(x: Tensor, u: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _off_columns(grad, *ctx.saved_tensors), None
