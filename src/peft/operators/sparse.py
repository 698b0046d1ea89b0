"""Matrices with few coefficients: at places of the matrix (Sparse), of its Fourier or of its wavelet transform."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.operators.base import Operator, Scale, chunk, eager, expect, gemm, rfft_flops, scaled, unrecorded, widened

GATHERED = 512.0
"""What gathering, scaling and scattering one element costs, in floating point operations of a GEMM.

Between the 170 measured on a CPU and the 2000 that memory bandwidth allows an accelerator.
"""

_MOVED = 175.0
"""What a byte costs that narrow convolutions read and write (measured on a CPU)."""

_FEW, _LITTLE = 16, 1 << 16
"""Tokens, and elements to gather for them, up to which that costs a CPU less than sorting places and multiplying by
compressed rows."""


@cache
def _compresses() -> bool:
    """Whether torch was built to multiply by compressed sparse rows on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first matrix in this layout says that it is in beta
        try:
            place = torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1)
            matrix = torch.sparse_csr_tensor(*place)
            torch.sparse.sampled_addmm(matrix, _product(matrix, torch.ones(1, 1)), torch.ones(1, 1))
        except RuntimeError:
            return False
    return True


def rows_and_columns(index: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """Places given as (2, k) or flat, row by row, as (k,) -> rows (k,) and columns (k,), int64."""
    index = index.long()
    return (index // inner, index % inner) if index.dim() == 1 else (index[0], index[1])


Kept = TypeVar("Kept")

_KEPT: dict[int, tuple[ref[Tensor], dict[Any, Any]]] = {}


def kept(name: str, sizes: tuple[int, int], make: Callable[[], Kept], places: Tensor, *more: Tensor) -> Kept:
    """What `make` makes of constant tensors, kept as long as `places` lives and all of them stay what they are."""
    tensors = (places, *more)
    if not eager() or any(type(t) is not Tensor or t.is_inference() for t in tensors):
        return make()
    key = id(places)
    held = _KEPT.get(key)
    if held is None or held[0]() is not places:
        held = _KEPT[key] = ref(places, lambda _: _KEPT.pop(key, None)), {}
    now = [(t._version, t.data_ptr()) for t in tensors]
    found = held[1].get((name, sizes))
    if found is None or found[0] != now:
        found = held[1][name, sizes] = now, make()
    return found[1]


@dataclass(frozen=True, eq=False)
class Sparse(Operator):
    """`values` (k,) at the places `index` and zeros elsewhere (SHiRA, Super-Tuning, FRoD).

    `index` holds rows and columns, (2, k), or places counted row by row, (k,), of any integer type. Values at one
    place add up. The matrix is (`out`, `inner`).
    """

    index: Tensor
    values: Tensor
    out: int
    inner: int
    brief = True
    rounds = True

    def __post_init__(self) -> None:
        expect(self.index.shape[-1] == self.values.shape[0], self, "index (2, k) or (k,) and values (k,) share k")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.inner

    def _pairs(self) -> tuple[Tensor, Tensor]:
        return rows_and_columns(self.index, self.inner)

    def _places(self) -> Tensor:
        """Places counted row by row (k,), int64 or int32."""
        index = self.index
        if index.dim() == 1:
            return index if index.dtype in (torch.int32, torch.int64) else index.long()
        rows, cols = index.long()
        return rows * self.inner + cols

    def apply(self, x: Tensor) -> Tensor:
        if self._sorts(x) and unrecorded(x, self.values):
            matrix, _ = self._compressed(self.values)
            y = _product(matrix, _by_feature(x.reshape(-1, self.inner)))
            return y.mT.to(x.dtype).reshape(*x.shape[:-1], self.out)
        rows, cols = kept("places", self.shape, self._pairs, self.index)
        y = x.new_zeros(*x.shape[:-1], self.out)
        return y.index_add(-1, rows, x.index_select(-1, cols) * self.values)

    def _sorts(self, x: Tensor) -> bool:
        plain = type(x) is Tensor and x.device.type == "cpu"
        return plain and not self._gathers(x.numel() // self.inner) and eager() and _compresses()

    def _gathers(self, tokens: int) -> bool:
        return tokens <= _FEW or tokens * self.values.shape[0] <= _LITTLE

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order (k,) of places row by row; where rows start in it (out + 1,), and columns in it (k,)."""
        places, size = self._places(), self.out * self.inner
        if size < 2**31:  # which sorts in half the time
            places = places.int()
        places, order = places.sort()
        starts = torch.arange(0, size + 1, self.inner, dtype=places.dtype)
        rows = torch.searchsorted(places, starts, out_int32=places.dtype == torch.int32)
        return order, rows, places % self.inner

    def _compressed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix of compressed rows that holds `values` (k,), and the order in which it does."""
        order, rows, cols = kept("sorted", self.shape, self._sorted, self.index)
        held = widened(values.detach()).index_select(0, order)
        return torch.sparse_csr_tensor(rows, cols, held, self.shape, check_invariants=False), order

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        if not self._sorts(x):
            return None
        with torch.no_grad():
            matrix, order = self._compressed(self.values)
            out, seen, turned = _by_feature(grad), _by_feature(x), self.T
            found = torch.sparse.sampled_addmm(matrix, out, seen.mT, beta=0.0).values()
            pulled = torch.empty_like(found).index_copy_(0, order, found)
            back = _product(turned._compressed(self.values)[0], out).mT.to(x.dtype) if need_x else None
            return back, self.values, pulled.to(self.values.dtype)

    def dense(self) -> Tensor:
        zeros = self.values.new_zeros(self.out * self.inner)
        return zeros.index_add(0, self._places(), self.values).view(self.out, self.inner)

    def onto(self, weight: Tensor) -> Tensor:
        return weight.flatten().index_add(0, self._places(), self.values).view(self.out, self.inner)

    def pull_dense(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return self.values, grad.flatten().index_select(0, self._places())

    def columns(self, index: Tensor) -> Tensor:
        # Static shapes whatever the places are: every wanted column gets one slot (the last of its duplicates), the
        # entries of all other columns land in a slot that nobody reads.
        rows, cols = rows_and_columns(self.index, self.inner)
        flat = index.reshape(-1)
        wanted = flat.shape[0]
        nobody = torch.full((self.inner,), wanted, dtype=torch.long, device=flat.device)
        slot = nobody.scatter(0, flat, torch.arange(wanted, device=flat.device))
        found = self.values.new_zeros((wanted + 1) * self.out)
        found = found.index_add(0, slot[cols] * self.out + rows, self.values).view(wanted + 1, self.out)
        return found[slot[flat]].reshape(*index.shape, self.out)

    def _turned(self) -> Tensor:
        return torch.stack(self._pairs()[::-1])

    @property
    def T(self) -> Sparse:
        index = kept("turned", self.shape, self._turned, self.index)
        return type(self)(index, self.values, self.inner, self.out)

    def flops(self, tokens: int) -> float:
        count = self.values.shape[0]
        if self.values.device.type != "cpu" or not eager() or not _compresses():
            return GATHERED * tokens * count
        # Measured: of a gather; of a product by compressed rows, and of copies by feature for it.
        return tokens * (100.0 * count if self._gathers(tokens) else 28.0 * count + 424.0 * sum(self.shape))

    def flops_dense(self, tokens: int) -> float:
        return GATHERED * self.values.shape[0] + self.out * self.inner + gemm(tokens, self.out, self.inner)


def _by_feature(x: Tensor) -> Tensor:
    """x (n, k) -> (k, n), wide and in this order in memory: so a product by compressed rows copies nothing more."""
    return x.mT.to(widened(x[:0]).dtype, memory_format=torch.contiguous_format)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix of compressed rows (m, k) times x (k, n)."""
    y = x.new_empty(matrix.shape[0], x.shape[1])
    return torch.addmm(y, matrix, x, beta=0, out=y)  # `@` would fill the result with zeros, and copy it


class LoneSparse(Sparse):
    """`Sparse` that stands beside no weight to add it to, so that a product of its own is worth its cost (FRoD)."""

    rounds = False

    def flops(self, tokens: int) -> float:
        if self.values.device.type != "cpu":
            return super().flops(tokens)
        # Measured, beside a matrix that is built and multiplied on its own.
        return (100.0 if self._gathers(tokens) else 16.0) * tokens * self.values.shape[0]


def _spectrum(x: Tensor) -> Tensor:
    """x (n, k) -> its Fourier coefficients over k (k / 2 + 1, 2 n), real parts before imaginary ones."""
    half = torch.view_as_real(torch.fft.rfft(widened(x), norm="forward"))
    return half.flatten(1).mT.contiguous().unflatten(0, (-1, 2)).flatten(1)


@dataclass(frozen=True, eq=False)
class Fourier(Operator):
    """`scale * Re(ifft2(S))`, S holding `values` (k,) at `index` (2, k): FourierFT (arXiv 2405.03003).

    A token needs one real FFT of its own, the k frequencies that S has, and one inverse real FFT.
    The matrix is (`out`, `inner`).
    """

    index: Tensor
    values: Tensor
    out: int
    inner: int
    scale: Scale = 1.0
    by_adjoint = True
    brief = True

    def __post_init__(self) -> None:
        expect(self.index.shape[-1] == self.values.shape[0], self, "index (2, k) or (k,) and values (k,) share k")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.inner

    def apply(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # FFTs refuse an empty batch
            return F.linear(x, self.dense())
        if x.dim() == 2 and unrecorded(x, self.values):
            y = torch.empty(x.shape[0], self.out, dtype=x.dtype, device=x.device)
            for part, into in zip(x.split(self._chunk), y.split(self._chunk), strict=True):
                into.copy_(self._synthesis(_spectrum(part)))
            return y
        _, cols = rows_and_columns(self.index, self.inner)
        mirrored = cols > self.inner // 2
        spectrum = torch.fft.rfft(widened(x).reshape(-1, self.inner), norm="forward").mT
        places = torch.where(mirrored, self.inner - cols, cols)
        waves = torch.stack((spectrum.real, spectrum.imag)).index_select(1, places)
        return self._rows(waves, ~mirrored).to(x.dtype).view(*x.shape[:-1], self.out)

    def _rows(self, waves: Tensor, conjugate: Tensor) -> Tensor:
        """Amplitudes (2, k, tokens) of the columns of S, some still to be conjugated -> (tokens, out).

        Real and imaginary parts lie apart and tokens come last, so that rows of memory move whole, and conjugating is a
        sign in the factor.
        """
        rows, _ = rows_and_columns(self.index, self.inner)
        mirrored = rows > self.out // 2
        place = torch.where(mirrored, self.out - rows, rows)
        # irfft counts a frequency and its mirror image, but 0 and out / 2 once
        weight = torch.where((place == 0) | (2 * place == self.out), 1.0, 0.5)
        sign = torch.where(mirrored ^ conjugate, -1.0, 1.0)
        factor = torch.stack((weight, weight * sign)).to(waves.dtype) * widened(self.values)
        half = waves.new_zeros(2, self.out // 2 + 1, waves.shape[2]).index_add(1, place, waves * factor[..., None])
        return scaled(torch.fft.irfft(torch.complex(half[0].mT, half[1].mT), n=self.out), self.scale)

    # In chunks of tokens, frequencies first: what is gathered and scattered are rows of memory, and stays in the cache.

    @property
    def _chunk(self) -> int:
        return chunk(self.values, max(self.out, self.inner))

    @property
    def _folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return kept("halves", self.shape, self._fold, self.index)

    def _fold(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Places (k,) of rows and of columns in half spectra; weights (k,) that irfft makes of 1; signs (k,) of
        imaginary parts."""
        rows, cols = rows_and_columns(self.index, self.inner)
        below, right = 2 * rows > self.out, 2 * cols > self.inner
        place = torch.where(below, self.out - rows, rows)
        once = (place == 0) | (2 * place == self.out)  # irfft counts the other frequencies with their mirror images
        dtype = widened(self.values).dtype
        weight = torch.where(once, 1.0, 0.5).to(dtype)
        sign = torch.where(below == right, -1.0, 1.0).to(dtype)
        return place, torch.where(right, self.inner - cols, cols), weight, sign

    def _synthesis(self, spectrum: Tensor) -> Tensor:
        """`_spectrum` (inner / 2 + 1, 2 n) of the input -> output (n, out)."""
        rows, cols, weight, sign = self._folded
        factor = scaled(widened(self.values).detach() * weight, self.scale)
        waves = spectrum.index_select(0, cols).unflatten(1, (2, -1))
        waves = waves.mul_(torch.stack((factor, factor * sign), dim=1)[:, :, None])
        half = waves.new_zeros(self.out // 2 + 1, spectrum.shape[1]).index_add_(0, rows, waves.flatten(1))
        signal = half.unflatten(1, (2, -1)).flatten(0, 1).mT.contiguous().unflatten(1, (-1, 2))
        return torch.fft.irfft(torch.view_as_complex(signal), n=self.out)

    def pull(self, x: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        if isinstance(self.scale, Tensor) or not len(x):
            return None
        rows, cols, _, sign = self._folded
        adjoint, found = self.T, torch.zeros((), device=x.device)
        back = torch.empty_like(x) if need_x else None
        with torch.no_grad():
            for start in range(0, x.shape[0], self._chunk):
                part = slice(start, start + self._chunk)
                seen, pulled = _spectrum(x[part]), _spectrum(grad[part])
                pairs = seen.index_select(0, cols).mul_(pulled.index_select(0, rows))
                found = pairs.unflatten(1, (2, -1)).sum(2) + found
                if back is not None:
                    back[part] = adjoint._synthesis(pulled)
            # Spectra are means, as `ifft2` has it, but that of the gradient stands for a sum.
            total = (found[:, 0] + sign * found[:, 1]) * (self.scale)
        return back, self.values, total.to(self.values.dtype)

    @property
    def _places(self) -> Tensor:
        def make() -> Tensor:
            rows, cols = rows_and_columns(self.index, self.inner)
            return rows * self.inner + cols

        return kept("flat", self.shape, make, self.index)

    def dense(self) -> Tensor:
        places, values = self._places if eager() else self.index, scaled(widened(self.values), self.scale)
        grid = Sparse(places, values, self.out, self.inner).dense()
        return torch.fft.ifft2(grid).real.to(self.values.dtype)

    def pull_dense(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.scale, Tensor):
            return super().pull_dense(grad)
        with torch.no_grad():
            # The matrix is a sum of cosines, so its transpose is the transform itself.
            found = torch.fft.ifft2(widened(grad)).real.flatten().index_select(0, self._places)
            return self.values, scaled(found, self.scale).to(self.values.dtype)

    def columns(self, index: Tensor) -> Tensor:
        if index.numel() == 0:
            return F.embedding(index, self.dense().mT)
        _, cols = rows_and_columns(self.index, self.inner)
        turn = (cols[:, None] * index.reshape(-1) % self.inner).to(widened(self.values).dtype)
        turn = turn * (2 * math.pi / self.inner)
        waves = torch.stack((turn.cos(), turn.sin())) / self.inner
        found = self._rows(waves, torch.zeros_like(cols, dtype=torch.bool))
        return found.to(self.values.dtype).view(*index.shape, self.out)

    @property
    def T(self) -> Fourier:
        rows, cols = rows_and_columns(self.index, self.inner)
        return Fourier(torch.stack((cols, rows)), self.values, self.inner, self.out, self.scale)

    def flops(self, tokens: int) -> float:
        complexes = 2 * GATHERED * self.values.shape[0]
        return tokens * (rfft_flops(self.out) + rfft_flops(self.inner) + complexes)

    def flops_dense(self, tokens: int) -> float:
        build = 2 * (self.out * rfft_flops(self.inner) + self.inner * rfft_flops(self.out))
        return GATHERED * self.values.shape[0] + build + gemm(tokens, self.out, self.inner)


@dataclass(frozen=True, eq=False)
class WaveletSynthesis(Operator):
    """One level of the inverse wavelet transform, from coefficients to a signal of length `out`.

    The coefficients are the approximation and the detail, one after the other, each of length
    `(out + out mod 2 + L - 2) / 2`. Shapes: `low` and `high` (L,), the reconstruction filters, L even.
    """

    low: Tensor
    high: Tensor
    out: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.out + self.out % 2 + self.low.shape[0] - 2

    def _filters(self) -> tuple[Tensor, int]:
        return torch.stack((self.low, self.high))[:, None], self.low.shape[0] - 2

    def apply(self, x: Tensor) -> Tensor:
        filters, padding = self._filters()
        bands = x.reshape(-1, 2, self.shape[1] // 2)
        signal = F.conv_transpose1d(bands, filters, stride=2, padding=padding)
        return signal[:, 0, : self.out].reshape(*x.shape[:-1], self.out)

    def analyse(self, x: Tensor) -> Tensor:
        """Signals (..., out) -> (..., in): the transpose."""
        filters, padding = self._filters()
        signal = F.pad(x.reshape(-1, 1, self.out), (0, self.out % 2))
        return F.conv1d(signal, filters, stride=2, padding=padding).reshape(*x.shape[:-1], self.shape[1])

    def flops(self, tokens: int) -> float:
        return gemm(tokens, self.shape[1], self.low.shape[0])


@dataclass(frozen=True, eq=False)
class Wavelet(Operator):
    """`scale` times the 2-D inverse wavelet transform of few coefficients: WaveFT (arXiv 2505.12532).

    `values` (k,) lie at `index`, (2, k) or flat (k,), of an (`out`, `inner`) matrix that is padded to even sizes, and
    by the length L of the filters less two, half of it before. Its quadrants are the approximation, the details
    along the rows' axis (right) and the columns' axis (below), and those of both.

    Shapes: `filters` (2, L), those of reconstruction, low-pass and high-pass.
    """

    index: Tensor
    values: Tensor
    filters: Tensor
    out: int
    inner: int
    scale: Scale = 1.0
    brief = True

    def __post_init__(self) -> None:
        even = self.filters.shape[0] == 2 and self.filters.shape[1] % 2 == 0
        expect(even, self, "filters (2, L) are two of one even length")
        expect(self.index.shape[-1] == self.values.shape[0], self, "index (2, k) or (k,) and values (k,) share k")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.inner

    @property
    def _length(self) -> int:
        return self.filters.shape[1]

    def _coefficients(self) -> tuple[tuple[int, Tensor, Tensor], tuple[int, Tensor, Tensor]]:
        """For rows and for columns: how many coefficients a band has, and the band and place in it (k,) of each."""
        (rows, cols), before = rows_and_columns(self.index, self.inner), self._length // 2 - 1
        rows, cols = rows + before, cols + before
        tall, wide = ((size + size % 2 + self._length - 2) // 2 for size in self.shape)
        # The quadrant on the right holds the detail along the rows' axis: in a separable transform it lies below.
        return (tall, cols // wide, rows % tall), (wide, rows // tall, cols % wide)

    def _parts(self) -> tuple[WaveletSynthesis, Sparse, WaveletSynthesis]:
        """Left synthesis, coefficients, right synthesis: the matrix is `left @ coefficients @ right.T`."""
        low, high = self.filters
        left, right = (WaveletSynthesis(low, high, size) for size in self.shape)
        (tall, row_band, rows), (wide, col_band, cols) = self._coefficients()
        place = torch.stack((rows + row_band * tall, cols + col_band * wide))
        return left, Sparse(place, scaled(self.values, self.scale), 2 * tall, 2 * wide), right

    @property
    def _few(self) -> bool:
        """Whether the entries that coefficients reach, L² each, are few, or few beside those of the matrix."""
        few = self.values.shape[0] * self._length**2 <= max(1 << 14, self.out * self.inner // 128)
        return few and eager() and not self.filters.requires_grad  # they are kept, which compilers don't follow

    @property
    def _reached(self) -> tuple[Tensor, Tensor]:
        return kept("spread", self.shape, self._reach, self.index, self.filters)

    def _reach(self) -> tuple[Tensor, Tensor]:
        """The entries (k L²,) that coefficients reach, counted row by row, and what ones make there (k, L²)."""
        spans = []
        for size, (_, band, place) in zip(self.shape, self._coefficients(), strict=True):
            at = 2 * place[:, None] + torch.arange(2 - self._length, 2, device=place.device)
            inside = (at >= 0) & (at < size)
            spans.append((at.clamp(0, size - 1), self.filters[band] * inside))
        (rows, tall), (cols, wide) = spans
        places = rows[:, :, None] * self.inner + cols[:, None, :]
        return places.flatten(), (tall[:, :, None] * wide[:, None, :]).flatten(1)

    def _entries(self) -> Sparse:
        places, waves = self._reached
        values = scaled(self.values, self.scale)[:, None] * waves
        return Sparse(places, values.flatten(), self.out, self.inner)

    def apply(self, x: Tensor) -> Tensor:
        left, middle, right = self._parts()
        return left.apply(middle.apply(right.analyse(x)))

    def dense(self) -> Tensor:
        if self._few:
            return self._entries().dense()
        left, middle, right = self._parts()
        return left.apply(right.apply(middle.dense()).mT).mT

    def onto(self, weight: Tensor) -> Tensor:
        return self._entries().onto(weight) if self._few else weight + self.dense()

    def pull_dense(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if not self._few or isinstance(self.scale, Tensor):
            return super().pull_dense(grad)
        places, waves = self._reached
        found = (grad.flatten().index_select(0, places).view(waves.shape) * waves).sum(1)
        return self.values, scaled(found, self.scale)

    def flops(self, tokens: int) -> float:
        moved = _MOVED * self.values.element_size() * sum(self.shape)
        return tokens * (GATHERED * self.values.shape[0] + moved + self._flops_bands(1, 1))

    def flops_dense(self, tokens: int) -> float:
        if self._few:
            build = GATHERED * self.values.shape[0] * self._length**2 + self.out * self.inner
        else:
            build = GATHERED * self.values.shape[0] + self._flops_bands(self.out + self._length, self.inner)
        return build + gemm(tokens, self.out, self.inner)

    def _flops_bands(self, rows: int, cols: int) -> float:
        """Operations of `rows` transforms of the length of a row, and `cols` of the length of a column."""
        length = self._length
        return gemm(rows, self.inner + length, length) + gemm(cols, self.out + length, length)
