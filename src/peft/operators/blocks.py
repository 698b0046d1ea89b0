"""Matrices made of blocks: BlockDiagonal, LowRankGrid, BlockCirculant, Fold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.operators.base import Operator, Scale, chunk, eager, expect, gemm, rfft_flops, scaled, unrecorded, widened

_GROUP = 64
"""Blocks are multiplied in groups of about this size: smaller products cost more than the zeros in these (measured)."""


class _Turn(torch.autograd.Function):
    """x (n, k b) times the transposes of square blocks (k, b, b), written where the result is to lie.

    A batched product puts one block's tokens after another's, and putting them side by side again costs more than
    the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x, blocks)
        blocks = _grouped(blocks)
        count = blocks.shape[0]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.bmm(_by_block(x, count), blocks.mT, out=_by_block(y, count))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, blocks = ctx.saved_tensors
        grad_x = _Turn.apply(grad, blocks.mT) if ctx.needs_input_grad[0] else None
        return grad_x, _block_grads(x, grad, blocks) if ctx.needs_input_grad[1] else None


def _block_grads(x: Tensor, grad: Tensor, blocks: Tensor) -> Tensor:
    """The gradient of the blocks (k, b, b) in `_Turn`."""
    count, size, _ = blocks.shape
    many = _group(count, size)
    into, out = _by_block(x, count // many), _by_block(grad, count // many)
    if x.element_size() == 2 and x.device.type == "cpu":  # oneDNN's batched product copies what is not contiguous
        found = _in_chunks(out, into)
    else:
        found = torch.bmm(out.mT, into)
    if many == 1:
        return found
    found = found.unflatten(2, (many, size)).unflatten(1, (many, size))
    return found.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


def _in_chunks(out: Tensor, into: Tensor) -> Tensor:
    """out.mT @ into, both (k, n, b): copies of few tokens stay in the cache, and their sums in float32."""
    found: Tensor | None = None
    for o, i in zip(out.split(256, dim=1), into.split(256, dim=1), strict=True):
        part = torch.bmm(o.contiguous().mT, i.contiguous())
        found = part.float() if found is None else found.add_(part)
    assert found is not None
    return found.to(out.dtype)


def _by_block(x: Tensor, count: int) -> Tensor:
    """x (n, k b) seen as (k, n, b)."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def _group(count: int, size: int) -> int:
    """How many blocks are multiplied as one: a power of two that divides their number."""
    return math.gcd(count, 1 << (_GROUP // size).bit_length() - 1) if 2 * size < _GROUP else 1


def _grouped(blocks: Tensor) -> Tensor:
    """Small blocks (k, b, b) as fewer, larger ones, with zeros beside the diagonal."""
    count, size, _ = blocks.shape
    many = _group(count, size)
    if many == 1:
        return blocks
    wide = blocks.new_zeros(count // many, many, size, many, size)
    wide.diagonal(dim1=1, dim2=3).copy_(blocks.unflatten(0, (-1, many)).movedim(1, -1))
    return wide.flatten(3).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Operator):
    """Blocks along the diagonal, zeros elsewhere (OFT, BD-LoRA): `blocks` (k, o, i), the shape is (k o, k i)."""

    blocks: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        count, out, inner = self.blocks.shape
        return count * out, count * inner

    def apply(self, x: Tensor) -> Tensor:
        count, out, inner = self.blocks.shape
        if out == inner and eager() and x.dim() == 2:
            return _Turn.apply(x, self.blocks)
        return torch.einsum("...ki,koi->...ko", x.unflatten(-1, (count, inner)), self.blocks).flatten(-2)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        if self.blocks.shape[1] != self.blocks.shape[2]:
            return None
        with torch.no_grad():
            back = _Turn.apply(grad, self.blocks.mT) if need_x else None
            return back, self.blocks, _block_grads(x, grad, self.blocks)

    def dense(self) -> Tensor:
        count, out, inner = self.blocks.shape
        grid = torch.diag_embed(self.blocks.permute(1, 2, 0))  # (o, i, k, k)
        return grid.permute(2, 0, 3, 1).reshape(count * out, count * inner)

    @property
    def T(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT)

    def flops(self, tokens: int) -> float:
        count, out, inner = self.blocks.shape
        return gemm(tokens * count, out, inner)


@dataclass(frozen=True, eq=False)
class LowRankGrid(Operator):
    """A k x k grid of blocks, each of rank r / k: GraLoRA (arXiv 2505.20355), at the cost of one LowRank of rank r.

    Input block i is projected to r numbers, chunk j of which goes to output block j: the block in row j and column i
    is `scale * (down[i][:, chunk j] @ up[j][chunk i, :]).T`.

    Shapes: `down` (k, in / k, r); `up` (k, r, out / k); k divides r.
    """

    down: Tensor
    up: Tensor
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        count, rank = self.down.shape[0], self.down.shape[2]
        fits = tuple(self.up.shape[:2]) == (count, rank) and rank % count == 0
        expect(fits, self, "down (k, in / k, r) and up (k, r, out / k) share k and r, and k divides r")

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0] * self.up.shape[2], self.down.shape[0] * self.down.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        count, inner, _ = self.down.shape
        h = torch.einsum("...kn,knr->...kr", x.unflatten(-1, (count, inner)), self.down)
        return self._exchange(h)

    def keeps(self, x: Tensor) -> bool:
        return True

    def _exchange(self, h: Tensor) -> Tensor:
        """Projections (..., i, r) of the input blocks -> (..., out)."""
        count, _, rank = self.down.shape
        h = scaled(h, self.scale).unflatten(-1, (count, rank // count)).transpose(-3, -2).flatten(-2)
        return torch.einsum("...kr,krm->...km", h, self.up).flatten(-2)

    def dense(self) -> Tensor:
        count, _, rank = self.down.shape
        down = scaled(self.down, self.scale).unflatten(-1, (count, rank // count))  # (i, n, j, c)
        up = self.up.unflatten(1, (count, rank // count))  # (j, i, c, m)
        return torch.einsum("injc,jicm->jmin", down, up).reshape(self.shape)

    def columns(self, index: Tensor) -> Tensor:
        count, inner, _ = self.down.shape
        row = F.embedding(index, self.down.flatten(0, 1))
        block = F.one_hot(index // inner, count).to(row.dtype)
        return self._exchange(block[..., None] * row[..., None, :])

    @property
    def T(self) -> LowRankGrid:
        return LowRankGrid(self.up.mT, self.down.mT, self.scale)

    def flops(self, tokens: int) -> float:
        return gemm(tokens, self.down.shape[2], sum(self.shape))

    def flops_dense(self, tokens: int) -> float:
        count, _, rank = self.down.shape
        return gemm(self.shape[0], self.shape[1], rank // count) + gemm(tokens, *self.shape)


def _spectra(x: Tensor, count: int) -> Tensor:
    """x (n, count b) -> Fourier coefficients of each block of each token (b / 2 + 1, count, n)."""
    half = torch.fft.rfft(widened(x).unflatten(1, (count, -1)))
    return half.flatten(1).mT.contiguous().unflatten(0, (count, -1)).transpose(0, 1)


def _signals(spectra: Tensor, size: int) -> Tensor:
    """The inverse of `_spectra`, for blocks of `size`."""
    frequencies, count, _ = spectra.shape
    half = spectra.transpose(0, 1).flatten(0, 1).mT.contiguous().unflatten(1, (count, frequencies))
    return torch.fft.irfft(half, n=size).flatten(1)


@dataclass(frozen=True, eq=False)
class BlockCirculant(Operator):
    """Circulant blocks over the number of inputs: C3A (arXiv 2407.19342), applied by real FFTs.

    Entry (r, c) of block (p, q) is `kernel[p, q, (c - r) mod b] / in`.
    Shapes: `kernel` (out / b, in / b, b), any b.
    """

    kernel: Tensor
    by_adjoint = True
    brief = True

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols, size = self.kernel.shape
        return rows * size, cols * size

    def apply(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # FFTs refuse an empty batch
            return F.linear(x, self.dense())
        rows, cols, size = self.kernel.shape
        if x.dim() == 2 and unrecorded(x, self.kernel):
            y = torch.empty(x.shape[0], rows * size, dtype=x.dtype, device=x.device)
            kernel, tokens = self._spectrum().conj_physical(), chunk(x, max(self.shape))
            for part, into in zip(x.split(tokens), y.split(tokens), strict=True):
                into.copy_(_signals(kernel @ _spectra(part, cols), size))
            return y
        spectrum = torch.fft.rfft(widened(x).unflatten(-1, (cols, size)))
        kernel = torch.fft.rfft(widened(self.kernel) / (cols * size)).conj()
        y = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", spectrum, kernel), n=size)
        return y.flatten(-2).to(x.dtype)

    def _spectrum(self) -> Tensor:
        """Fourier coefficients of the blocks (b / 2 + 1, out / b, in / b)."""
        return torch.fft.rfft(widened(self.kernel.detach()) / self.shape[1]).permute(2, 0, 1).contiguous()

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        rows, cols, size = self.kernel.shape
        kernel, found, tokens = self._spectrum(), 0.0, chunk(x, max(self.shape))
        back = torch.empty_like(x) if need_x else None
        with torch.no_grad():
            for start in range(0, x.shape[0], tokens):
                part = slice(start, start + tokens)
                seen, pulled = _spectra(x[part], cols), _spectra(grad[part], rows)
                found = pulled.conj() @ seen.mT + found
                if back is not None:
                    back[part] = _signals(kernel.mT @ pulled, size)
            total = torch.fft.irfft(found.permute(1, 2, 0), n=size) / self.shape[1]  # type: ignore[union-attr]
        return back, self.kernel, total.to(self.kernel.dtype)

    def dense(self) -> Tensor:
        size = self.kernel.shape[2]
        i = torch.arange(size, device=self.kernel.device)
        blocks = (self.kernel / self.shape[1])[:, :, (i - i[:, None]) % size]  # (p, q, r, c)
        return blocks.transpose(1, 2).reshape(self.shape)

    def columns(self, index: Tensor) -> Tensor:
        rows, _, size = self.kernel.shape
        kernel = (self.kernel / self.shape[1]).transpose(0, 1)[index // size]  # (..., p, b)
        offset = (index[..., None] - torch.arange(size, device=index.device)) % size
        return kernel.gather(-1, offset[..., None, :].expand(*index.shape, rows, size)).flatten(-2)

    @property
    def T(self) -> BlockCirculant:
        out, inner = self.shape
        mirrored = self.kernel.transpose(0, 1).flip(-1).roll(1, -1)
        return BlockCirculant(mirrored * (out / inner))

    def flops(self, tokens: int) -> float:
        rows, cols, size = self.kernel.shape
        transforms = rfft_flops(size) * (tokens * (rows + cols) + rows * cols)
        return transforms + 8.0 * tokens * rows * cols * (size // 2 + 1)

    def flops_dense(self, tokens: int) -> float:
        out, inner = self.shape
        return out * inner + gemm(tokens, out, inner)


@dataclass(frozen=True, eq=False)
class Fold(Operator):
    """A small block repeated over the whole matrix: MiSS (arXiv 2409.15371) sums chunks of the input, then projects.

    Entry (o, i) is `block[i mod r, o mod c]`; the last tile is cut where r does not divide `inner`.
    Shapes: `block` (r, c); the matrix is (`out`, `inner`).
    """

    block: Tensor
    out: int
    inner: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.inner

    def apply(self, x: Tensor) -> Tensor:
        rank = self.block.shape[0]
        tiles = -(-self.inner // rank)
        if tiles * rank != self.inner:
            x = F.pad(x, (0, tiles * rank - self.inner))
        if tiles > 1:
            x = x.unflatten(-1, (tiles, rank)).sum(-2)
        return self._tile(x @ self.block)

    def keeps(self, x: Tensor) -> bool:
        return True

    def _tile(self, y: Tensor) -> Tensor:
        width = self.block.shape[1]
        if width == self.out:
            return y
        repeats = [1] * (y.dim() - 1) + [-(-self.out // width)]
        return y.repeat(repeats)[..., : self.out]

    def dense(self) -> Tensor:
        return self.columns(torch.arange(self.inner, device=self.block.device)).mT

    def columns(self, index: Tensor) -> Tensor:
        return self._tile(F.embedding(index % self.block.shape[0], self.block))

    @property
    def T(self) -> Fold:
        return Fold(self.block.mT, self.inner, self.out)

    def factors(self) -> tuple[Tensor, Tensor]:
        rank = self.block.shape[0]
        eye = torch.eye(rank, dtype=self.block.dtype, device=self.block.device)
        return self._tile(self.block).mT, eye.repeat(1, -(-self.inner // rank))[:, : self.inner]

    def flops(self, tokens: int) -> float:
        return tokens * self.inner + gemm(tokens, *self.block.shape)
