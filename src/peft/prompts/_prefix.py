"""What one call puts before its inputs: which prompts, for which samples, how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.errors import AdapterNameError, StateError, UnsupportedError, nearest
from peft.prompts._encoder import BasePromptEncoder, KeyValues, VirtualTokens


@dataclass(frozen=True)
class Rows:
    """The prompts of the samples of a batch.

    Attributes:
        stacks: The different prompts in the batch, each a sequence of encoders whose prompts follow one another. Empty:
            no prompt.
        of_sample: Which stack each sample has; None if there is one for all.
        task_ids: Tasks of the samples, shape (batch,), for multitask prompts.
        known: Keys and values of layers (by layer and batch) that stay what they are while these rows are used, as in
            a `generate`; None: computed in each call, as training needs.
        stack_lengths: Virtual tokens of each stack.
        length: Virtual tokens before every sample; shorter prompts are padded on the left.
        ragged: Whether some prompts are shorter than others.
    """

    stacks: tuple[tuple[BasePromptEncoder, ...], ...]
    of_sample: tuple[int, ...] | None = None
    task_ids: Tensor | None = None
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None
    stack_lengths: list[int] = field(init=False)
    length: int = field(init=False)
    ragged: bool = field(init=False)

    def __post_init__(self) -> None:
        lengths = [sum(e.num_virtual_tokens for e in stack) for stack in self.stacks]
        self.__dict__.update(stack_lengths=lengths, length=max(lengths), ragged=len(set(lengths)) > 1)

    def per_sample(self, batch: int) -> list[int] | None:
        """Stack of each of `batch` samples. Beams and repeated samples follow their original."""
        return None if self.of_sample is None else list(repeated(self.of_sample, batch, "adapter_names"))

    def shifts(self, batch: int, device: torch.device) -> int | Tensor:
        """How far positions move: one number, or shape (batch, 1) if prompts differ in length."""
        if not self.ragged:
            return self.length
        lengths = self.stack_lengths
        return torch.tensor([[lengths[i]] for i in self.per_sample(batch) or ()], device=device)

    def visible(self, batch: int, device: torch.device) -> Tensor:
        """Which virtual positions hold a token and not padding, shape (batch, length), bool."""
        slots = torch.arange(self.length, device=device)
        shifts = self.shifts(batch, device)
        return (slots >= self.length - shifts).expand(batch, -1)

    @property
    def before_decoder(self) -> bool:
        """Whether some prompts go before the input of a decoder as well."""
        return any(isinstance(e, VirtualTokens) and e.before_decoder for stack in self.stacks for e in stack)

    def tokens(self, batch: int, like: Tensor, side: int = 0) -> Tensor:
        """Virtual tokens, shape (batch, length, token_dim), with the dtype and device of `like`."""
        task_ids = self.task_ids
        if task_ids is not None:
            task_ids = torch.as_tensor(repeated(tuple(task_ids.tolist()), batch, "task_ids"), device=like.device)
        made = [self._stack_tokens(stack, task_ids, like, side) for stack in self.stacks]
        index = self.per_sample(batch)
        if index is None:
            return made[0].expand(batch, -1, -1)
        return torch.stack([made[s][i if len(made[s]) > 1 else 0] for i, s in enumerate(index)])

    def _stack_tokens(
        self, stack: Sequence[BasePromptEncoder], task_ids: Tensor | None, like: Tensor, side: int
    ) -> Tensor:
        parts = [encoder.tokens(task_ids, side).to(like) for encoder in stack if isinstance(encoder, VirtualTokens)]
        batch = max([1, *[len(part) for part in parts]])
        return _pad(
            [part.expand(batch, -1, -1) for part in parts], like.new_empty(batch, 0, like.shape[-1]), self.length
        )

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before the given keys and values of a layer: each (batch, heads, length, head_dim)."""
        if self.known is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._keys_values(layer, keys, values)
        where = layer, len(keys)
        found = self.known.get(where)
        if found is None:
            found = self.known[where] = self._keys_values(layer, keys, values)
        return found

    def _keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, index = len(keys), self.per_sample(len(keys))
        if keys.shape[-1] != values.shape[-1]:
            raise UnsupportedError(
                f"Layer {layer} caches keys of width {keys.shape[-1]} and values of width {values.shape[-1]} (latent "
                "attention), and a prefix has one width for both. Use prompt tuning or P-tuning on this model."
            )
        made = [self._stack_keys_values(stack, layer, keys) for stack in self.stacks]
        if index is None:
            before = made[0]
            return before[0].expand(batch, -1, -1, -1), before[1].expand(batch, -1, -1, -1)
        order = torch.tensor(index, device=keys.device)
        return torch.stack([pair[0] for pair in made])[order], torch.stack([pair[1] for pair in made])[order]

    def _stack_keys_values(self, stack: Sequence[BasePromptEncoder], layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        parts = [encoder.layer(layer) for encoder in stack if isinstance(encoder, KeyValues)]
        for keys, _ in parts:
            if (keys.shape[0], keys.shape[2]) != (like.shape[1], like.shape[3]):
                raise UnsupportedError(
                    f"Layer {layer} has keys of {like.shape[1]} heads of {like.shape[3]}, and the prefix "
                    f"{keys.shape[0]} heads of {keys.shape[2]}. Set num_attention_heads={like.shape[1]} and token_dim="
                    f"{like.shape[1] * like.shape[3]} in the config of the prefix."
                )
        empty = like.new_empty(like.shape[1], 0, like.shape[3])
        keys, values = (_pad([pair[i].to(like) for pair in parts], empty, self.length) for i in (0, 1))
        return keys, values

    def fixed(self, layers: Sequence[tuple[Tensor, Tensor]]) -> FixedRows:
        """The same samples with keys and values that were computed before (each (batch, heads, length, head_dim))."""
        return FixedRows(self.stacks, self.of_sample, None, {}, tuple(layers))

    def kept(self) -> Rows:
        """The same prompts, for as long as nothing changes them."""
        return replace(self, known={})


@dataclass(frozen=True)
class FixedRows(Rows):
    """Prompts whose keys and values are known: what a whole `generate` needs of virtual tokens."""

    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def _keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(keys)
        first, second = (known.to(keys) for known in self.layers[layer])
        if len(first) == 1:
            return first.expand(batch, -1, -1, -1), second.expand(batch, -1, -1, -1)
        times = _times(len(first), batch, "the inputs")
        return first.repeat_interleave(times, 0), second.repeat_interleave(times, 0)


def rows_of(
    encoders: dict[str, BasePromptEncoder],
    active: Sequence[str],
    adapter_names: Sequence[str] | None,
    task_ids: Tensor | Sequence[int] | None,
    known: Sequence[str],
) -> Rows | None:
    """The prompts of a call, or None if no sample has one.

    Args:
        encoders: Prompt encoders by adapter name.
        active: Active adapters; those that are not prompts are not looked at.
        adapter_names: The adapter of each sample instead; "__base__" means none.
        task_ids: Tasks of the samples.
        known: Names of all adapters.
    """
    if task_ids is not None:
        task_ids = torch.as_tensor(task_ids)
    if adapter_names is None:
        stack = tuple(encoders[name] for name in active if name in encoders)
        rows = Rows((stack,), None, task_ids) if stack else None
    else:
        for name in adapter_names:
            if name != "__base__" and name not in known:
                raise AdapterNameError(
                    f"adapter_names asks for {name!r}, and there is no such adapter.{nearest(name, known)} "
                    f"Adapters: {sorted(known)}."
                )
        names = sorted(set(adapter_names))
        stacks = tuple((encoders[name],) if name in encoders else () for name in names)
        index = {name: i for i, name in enumerate(names)}
        rows = Rows(stacks, tuple(index[n] for n in adapter_names), task_ids) if any(stacks) else None
    return rows if rows is None else _one_kind(rows)


def kind(rows: Rows) -> type[BasePromptEncoder]:
    """`VirtualTokens` or `KeyValues`."""
    first = next(encoder for stack in rows.stacks for encoder in stack)
    return KeyValues if isinstance(first, KeyValues) else VirtualTokens


def repeated(values: Sequence, batch: int, what: str) -> Sequence:
    """`values` with each entry repeated, so that there is one for each of `batch` samples."""
    if len(values) == batch:
        return values
    times = _times(len(values), batch, what)
    return tuple(value for value in values for _ in range(times))


def _pad(parts: Sequence[Tensor], empty: Tensor, length: int) -> Tensor:
    """`parts` one after another along tokens (the last but one dimension), with zeros before them up to `length`."""
    joined = parts[0] if len(parts) == 1 else torch.cat([empty, *parts], dim=-2)
    missing = length - joined.shape[-2]
    return F.pad(joined, (0, 0, missing, 0)) if missing else joined


def _times(have: int, batch: int, what: str) -> int:
    if have == 0 or batch % have:
        raise StateError(f"{what} are given for {have} samples, but the batch has {batch}; there must be one for each.")
    return batch // have


def _one_kind(rows: Rows) -> Rows:
    kinds = {KeyValues if isinstance(e, KeyValues) else VirtualTokens for stack in rows.stacks for e in stack}
    if len(kinds) > 1:
        raise UnsupportedError(
            "One call mixes prompts of virtual tokens (prompt tuning, P-tuning, multitask, CPT) with prefixes of keys "
            "and values (prefix tuning, cartridge). The first lengthen the output and the second do not, so one batch "
            "can't hold both; run them in two calls."
        )
    return rows
