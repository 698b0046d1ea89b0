"""Caches that begin with a prompt: the keys and values of a prompt, joined to those of any transformers cache.

Attention layers hand their keys and values to a cache and go on with what it returns; masks and positions are built
from the length that it reports. A view that reports `prompt + real` and returns `[prompt, real]` is therefore all that
a prefix needs, whatever the real cache is, or if there is none at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from peft.prompts._prefix import Rows

_COUNTS_QUERIES = hasattr(Cache, "get_query_offset")  # transformers 5


class PrefixedCache(Cache):
    """A view of `real` (or of nothing) with a prompt before it. Holds no state of its own, so it can be replayed."""

    def __init__(self, rows: Rows | None, real: Cache | None) -> None:
        # Not Cache.__init__: the layers are those of the real cache.
        self.rows = rows
        self.real = real

    @property
    def layers(self) -> list:
        return [] if self.real is None else self.real.layers

    @property
    def length(self) -> int:
        return 0 if self.rows is None else self.rows.length

    def __len__(self) -> int:
        return len(self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        seen = self.in_sight(layer_idx)
        prompt = self.rows.keys_values(layer_idx, key_states, value_states) if self.rows is not None and seen else None
        if self.real is not None:
            args, kwargs = self._real_positions(args, kwargs)
            key_states, value_states = self.real.update(key_states, value_states, layer_idx, *args, **kwargs)
        if prompt is None:
            return key_states, value_states
        return torch.cat([prompt[0], key_states], dim=-2), torch.cat([prompt[1], value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length + (0 if self.real is None else self.real.get_seq_length(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length + (0 if self.real is None else self.real.get_query_offset(layer_idx))

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """(key length, position of the first key). transformers 4 gives the queries' positions, not their number."""
        if self.real is None:
            length, offset = (query_length if isinstance(query_length, int) else len(query_length)), 0
        else:
            length, offset = self.real.get_mask_sizes(query_length, layer_idx)
        return (length + self.length, 0) if self.in_sight(layer_idx) else (length, offset + self.length)

    def mask_length(self, queries: int, layer_idx: int) -> int:
        """Number of keys that `queries` more tokens will meet in a layer."""
        return self.get_mask_sizes(queries if _COUNTS_QUERIES else torch.arange(queries), layer_idx)[0]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        limit = -1 if self.real is None else self.real.get_max_length(layer_idx)
        return limit if limit < 0 else limit + self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:
        """The name that transformers 4 has for `get_max_length`."""
        real: Any = self.real
        limit = -1 if real is None else real.get_max_cache_shape(layer_idx)
        return limit if limit is None or limit < 0 else limit + self.length

    def in_sight(self, layer_idx: int) -> bool:
        """Whether a layer still sees the prompt: a sliding window that is full has left it behind."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is None or not getattr(layer, "is_sliding", False):
            return True
        return layer.get_seq_length() < (
            layer.sliding_window if hasattr(layer, "sliding_window") else layer.max_cache_len
        )

    def _real_positions(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """transformers 4 tells static caches where to write, counted with the prompt."""

        def unshifted(value: Any) -> Any:
            if isinstance(value, dict) and value.get("cache_position") is not None:
                return value | {"cache_position": value["cache_position"] - self.length}
            return value

        return tuple(map(unshifted, args)), {key: unshifted(value) for key, value in kwargs.items()}


class PrefixedEncoderDecoderCache(EncoderDecoderCache):
    """The view for decoders with cross-attention; the prompt stands before the decoder's own tokens."""

    def __init__(self, rows: Rows, real: EncoderDecoderCache | None) -> None:
        self.real = real
        self.rows = rows
        own = None if real is None else real.self_attention_cache
        self.self_attention_cache = PrefixedCache(rows, own)
        self.cross_attention_cache = PrefixedCache(None, None) if real is None else real.cross_attention_cache
        self.is_updated = _Forgetful() if real is None else real.is_updated

    def __len__(self) -> int:
        return len(self.self_attention_cache)

    def in_sight(self, layer_idx: int) -> bool:
        return self.self_attention_cache.in_sight(layer_idx)

    def mask_length(self, queries: int, layer_idx: int) -> int:
        return self.self_attention_cache.mask_length(queries, layer_idx)


class _Forgetful(dict):
    """Without a real cache, cross-attention must compute its keys at every call, also when a layer is replayed."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


View = PrefixedCache | PrefixedEncoderDecoderCache


def prefixed(rows: Rows, real: Any, cross_attention: bool) -> View:
    """The view of a cache (or None) with the prompts of `rows` before it."""
    if not cross_attention:
        return PrefixedCache(rows, real)
    if real is not None and not isinstance(real, EncoderDecoderCache):
        real = EncoderDecoderCache(real, DynamicCache())
    return PrefixedEncoderDecoderCache(rows, real)


def new_cache(config: Any, cross_attention: bool) -> Cache:
    """The cache that a model would make for itself."""
    own = _dynamic(config)
    return EncoderDecoderCache(own, _dynamic(config)) if cross_attention else own


def layer_tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, each (batch, heads, length, head_dim), of any cache or tuple of pairs."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if isinstance(cache, (tuple, list)):
        return [(layer[0], layer[1]) for layer in cache]
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


def _dynamic(config: Any) -> DynamicCache:
    try:
        return DynamicCache(config=config)
    except TypeError:  # transformers before 4.56
        return DynamicCache()
