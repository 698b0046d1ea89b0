"""FRoD: all weights of a kind in one common basis; their coordinates there learn, the diagonal and a few others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import TargetedConfig
from peft.errors import ConfigError, TargetError
from peft.hosts import Host
from peft.method import Site, WeightMethod
from peft.operators import Bilinear, LoneSparse, kept
from peft.parts import Parts
from peft.slots import BufferDict, Slot
from peft.updates import Add, Update


@dataclass
class FrodConfig(TargetedConfig):
    """FRoD: U (diag(λ) + S) Vᵀ with W = U diag(λ₀) Vᵀ. λ and the sparse S learn; V is common to layers of one kind.

    Layers are of one kind if the last two parts of their names agree (`self_attn.q_proj`).

    Example:
        >>> from peft import FrodConfig
        >>> FrodConfig(sparse_rate=0.05, target_modules=["q_proj"]).regularization_alpha
        0.001
    """

    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the places of S."})
    save_projection: bool = field(default=True, metadata={"help": "Write V and the places of S into files."})
    frod_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the change, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the base layer; False: from noise around it."})
    sparse_rate: float = field(default=0.01, metadata={"help": "Share of the off-diagonal coordinates that learn."})
    regularization_alpha: float = field(default=0.001, metadata={"help": "Added to the Gram matrices of a kind."})
    progressbar: bool = field(default=True, metadata={"help": "Kept for files; there is nothing to wait for."})
    runtime_offload_base_weight: bool = field(default=False, metadata={"help": "Kept for files; no effect."})

    _optional: ClassVar[frozenset[str]] = (TargetedConfig._optional - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.frod_dropout <= 1:
            raise ConfigError(f"frod_dropout is {self.frod_dropout!r}; it is a probability, from 0 to 1.")
        if not 0 < self.sparse_rate <= 1:
            raise ConfigError(f"sparse_rate is {self.sparse_rate!r}; it is a share, above 0 and at most 1.")


def kind(key: str) -> str:
    """What layers of one name pattern share: the last two parts of the path, numbers left out.

    >>> kind("model.layers.0.self_attn.q_proj"), kind("experts.0.w1")
    ('self_attn_q_proj', 'w1')
    """
    *path, name = key.split(".")
    if "attention.output" in key:
        return "attention_output"
    return f"{path[-1]}_{name}" if path and not path[-1].isdigit() else name


def basis(weights: list[Tensor], alpha: float) -> Tensor:
    """V (n, n) for weights (m_i, n): singular vectors if they have fewer rows than columns, else Rᵀ E.

    Q R are the stacked weights, and E the eigenvectors of the mean of (Q_iᵀ Q_i + alpha I)⁻¹.
    In float32, whatever the weights are: eigenvectors of equal eigenvalues depend on it, and files may leave V out.
    """
    weights = [w.float() for w in weights]
    stack = torch.cat(weights)
    if stack.shape[0] < stack.shape[1]:
        return torch.linalg.svd(stack, full_matrices=True)[2].mT
    q, r = torch.linalg.qr(stack)
    eye = torch.eye(r.shape[0], device=r.device)
    inverses = [torch.linalg.inv(part.mT @ part + alpha * eye) for part in q.split([w.shape[0] for w in weights])]
    return r.mT @ torch.linalg.eigh(sum(inverses[1:], start=inverses[0]) / len(inverses))[1]


def coordinates(weight: Tensor, basis: Tensor) -> Tensor:
    """X (m, n) with X Vᵀ = W; the smallest where V is singular, because the columns of W depend on each other."""
    try:
        return torch.linalg.solve(basis, weight.mT).mT
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return weight @ torch.linalg.pinv(basis, rtol=1e-6).mT


def places(size: int, rate: float, generator: torch.Generator) -> Tensor:
    """Rows and columns (2, k) of different off-diagonal places of a (size, size) matrix."""
    free = size * size - size
    flat = torch.randperm(free, generator=generator)[: min(free, max(1, int(size * size * rate)))]
    row, column = flat // max(size - 1, 1), flat % max(size - 1, 1)
    return torch.stack((row, column + (column >= row)))


def with_diagonal(others: Tensor, size: int) -> Tensor:
    """The places (2, size + k) of the diagonal and of `others` (2, k)."""
    return torch.cat((torch.arange(size, device=others.device).expand(2, size), others), dim=1)


class Frod(WeightMethod, peft_type="FROD", config=FrodConfig):
    slots = (
        Slot("frod_lambda_l", "in"),
        Slot("frod_lambda_s_values", "count", when="count"),
        Slot("frod_U", "out in", kind="buffer", saved=False),
        Slot("frod_start", "in", kind="buffer", saved=False),
    )
    settings = ("frod_kind",)
    dropout = "frod_dropout"
    samples = ({"sparse_rate": 0.1}, {"sparse_rate": 0.2, "save_projection": False, "init_weights": False})

    def shared(self, config: FrodConfig, targets: Mapping[str, Host], device: Any, dtype: Any) -> dict[str, Any]:
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, host in targets.items():
            # Of an encoder's and a decoder's layer of one number, HF PEFT reads the latter; a file may count on it.
            number = next((part for part in key.split(".") if part.isdigit()), key)
            kinds.setdefault(kind(key), {})[number] = host.weight()
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        banks: dict[str, dict[str, Tensor]] = {"frod_V": {}, "frod_s_indices": {}, "frod_s_size": {}}
        for name in sorted(kinds):
            widths = {host.in_features for key, host in targets.items() if kind(key) == name}
            if len(widths) > 1:
                raise TargetError(
                    f"FROD: the layers of kind {name!r} have inputs of {sorted(widths)} features and can't share a "
                    "basis. Adapt those of one width, or give the others an adapter of their own."
                )
            (width,) = widths
            banks["frod_V"][name] = basis(list(kinds[name].values()), config.regularization_alpha).to(device, dtype)
            banks["frod_s_indices"][name] = places(width, config.sparse_rate, generator).to(device)
            banks["frod_s_size"][name] = torch.tensor([width, width], device=device)
        return {name: BufferDict(tensors) for name, tensors in banks.items()}

    def saved_banks(self, config: FrodConfig) -> tuple[str, ...]:
        return ("frod_V", "frod_s_indices", "frod_s_size") if config.save_projection else ()

    def resolve(self, config: FrodConfig, host: Host, site: Site) -> dict[str, Any]:
        name = kind(site.key)
        return {"frod_kind": name, "count": site.shared["frod_s_indices"][name].shape[1]}

    def derive(self, p: Parts, host: Host) -> None:
        """U and λ₀: the columns of W V⁻ᵀ, and their lengths."""
        columns = coordinates(host.weight().double(), p.frod_V[p.frod_kind].double())
        lengths = columns.norm(dim=0)
        p.frod_start.copy_(lengths)
        p.frod_U.copy_(columns / lengths.clamp_min(1e-12))

    def loaded(self, p: Parts, host: Host) -> None:
        if host.device.type != "meta":
            self.derive(p, host)

    def reset(self, p: Parts, host: Host) -> None:
        p.frod_lambda_l.copy_(p.frod_start)
        if not p.config.init_weights:
            p.frod_lambda_l.add_(torch.randn_like(p.frod_lambda_l), alpha=0.1)
        if p.has("frod_lambda_s_values"):
            values = p.frod_lambda_s_values
            nn.init.zeros_(values) if p.config.init_weights else nn.init.normal_(values, std=0.1)

    def update(self, p: Parts, host: Host) -> Update:
        basis, size, others = p.frod_V[p.frod_kind], host.in_features, p.frod_s_indices[p.frod_kind]
        values = p.frod_lambda_l - p.frod_start
        if p.has("frod_lambda_s_values"):  # a (1, 1) matrix has no place off its diagonal
            values = torch.cat((values, p.frod_lambda_s_values))
        index = kept("with diagonal", (size, size), lambda: with_diagonal(others, size), others)
        middle = LoneSparse(index, values, size, size)
        return Add(Bilinear(basis.mT, middle, p.frod_U), None, p.dropout)
