"""Where prompts attach: the module that owns the cache, between the arguments it is given and the layers it runs.

A call opens a `Scope` on its own thread. The hooks of that model's attention stack see it, and hand the stack a view of
its cache that begins with the prompt (`_cache.PrefixedCache`). Masks, positions and attention then follow from
the model's own code, for every cache class and attention implementation. Without a scope the hooks return at once, so
nothing that a call did is left on the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft.errors import UnsupportedError
from peft.prompts import _geometry
from peft.prompts._prefix import Rows

_SITE = "_peft_prompt_site"
_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


@dataclass
class Scope:
    """One call of one model, with its prompts.

    Attributes:
        site: Of the model that is called.
        rows: The prompts.
        virtual: They are put before the embeddings inside the stack, and cut off its output; otherwise they are joined
            as keys and values.
        side: Which virtual tokens, see `VirtualTokens.tokens`.
        view: The cache view of the forward that is running, for layers that are checkpointed.
        checkpointed: Some layers are, in the forward that is running.
        reentrant: Some of them reentrantly: they give gradients only if an input asks for them, and prompts are not
            among the inputs.
    """

    site: Site
    rows: Rows
    virtual: bool = False
    side: int = 0
    view: Any = None
    checkpointed: bool = False
    reentrant: bool = False


class _Thread(threading.local):
    # Not a ContextVar: torch.compile traces thread locals, and a forward never changes threads (a checkpointed layer
    # that is recomputed by an autograd thread has the view among its arguments).
    scope: Scope | None = None


_THREAD = _Thread()


@contextmanager
def scope(site: Site, rows: Rows, *, virtual: bool = False, side: int = 0) -> Iterator[Scope]:
    """Give the prompts of `rows` to the calls of one model on this thread."""
    outer = _THREAD.scope
    _THREAD.scope = opened = Scope(site, rows, virtual, side)
    try:
        yield opened
    finally:
        _THREAD.scope = outer


@contextmanager
def no_scope() -> Iterator[None]:
    """Run without prompts, inside a scope."""
    outer, _THREAD.scope = _THREAD.scope, None
    try:
        yield
    finally:
        _THREAD.scope = outer


class Site:
    """The hooks on one base model's attention stack. Holds names and no module, so it can be copied.

    Attributes:
        path: Of the stack in the base model.
        accepts: Parameters of its forward, in order.
    """

    def __init__(self, base_model: nn.Module) -> None:
        stack: Any = _geometry.cached_stack(base_model)
        self.path = next(name for name, module in base_model.named_modules() if module is stack)
        self.accepts = tuple(_geometry.parameters(stack))
        self.handles = [
            stack.register_forward_pre_hook(self.before, with_kwargs=True),
            stack.register_forward_hook(self.after, with_kwargs=True),
            stack.get_input_embeddings().register_forward_hook(self.embedded),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put the prompt before the arguments of the stack."""
        opened = _THREAD.scope
        if opened is None or opened.site is not self:
            return None
        kwargs = dict(zip(self.accepts, args, strict=False)) | kwargs
        if opened.virtual:
            _prepend_tokens(stack, kwargs, opened)
        else:
            _prepend_cache(stack, kwargs, opened, self.accepts)
        return (), kwargs

    def after(self, stack: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Give back the cache that the caller knows, and the positions that are the caller's."""
        opened = _THREAD.scope
        if opened is None or opened.site is not self:
            return None
        if opened.virtual:
            return _map_output(output, partial(_cut_tokens, length=opened.rows.length, first=_first(output)))
        view, opened.view, opened.reentrant = kwargs["past_key_values"], None, False
        if isinstance(output, tuple) and view.real is None:
            return tuple(value for value in output if value is not view)
        return _map_output(output, lambda value: value.real if value is view else value)

    def embedded(self, words: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Let embeddings ask for a gradient where reentrant checkpoints would give none otherwise."""
        opened = _THREAD.scope
        if opened is None or opened.site is not self or not opened.reentrant:
            return None
        return _requiring_grad(output)


def site_of(base_model: nn.Module) -> Site:
    """The site of a base model; its hooks are placed at the first call.

    Raises:
        UnsupportedError: the model has no key/value cache that a prompt could stand in.
    """
    found = base_model.__dict__.get(_SITE)
    if found is None:
        found = base_model.__dict__[_SITE] = Site(base_model)
    return found


def detach(base_model: nn.Module) -> None:
    """Take the hooks off a base model again."""
    found = base_model.__dict__.pop(_SITE, None)
    if found is not None:
        found.remove()
    _geometry.forget(base_model)


def _prepend_cache(stack: nn.Module, kwargs: dict, opened: Scope, accepts: tuple[str, ...]) -> None:
    """Replace the cache of a call by a view that begins with the prompt, and lengthen mask and positions."""
    from peft.prompts import _cache, _masks

    rows = opened.rows
    inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    batch, queries, device = inputs.shape[0], inputs.shape[1], inputs.device
    crossing = kwargs.get("encoder_hidden_states") is not None
    real = _real_cache(stack, kwargs, opened, accepts, crossing)
    view = opened.view = kwargs["past_key_values"] = _cache.prefixed(rows, real, crossing)
    if "use_cache" in accepts and not opened.checkpointed:
        kwargs["use_cache"] = True  # without it, some stacks (Whisper) hand their layers no cache at all

    shifts = rows.shifts(batch, device)
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + shifts
    elif rows.ragged:
        kwargs |= _ragged_positions(stack, accepts, shifts, real, kwargs)
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = kwargs["cache_position"] + rows.length
    mask = kwargs.get("attention_mask")
    # The length of a cache that is compiled with is a tensor, and not worth breaking the graph for.
    past = 0 if real is None or getattr(real, "is_compileable", False) else real.get_seq_length()
    _geometry.check_length(stack, rows.length, past + queries, kwargs.get("position_ids"), mask)
    if mask is not None or rows.ragged:
        kwargs["attention_mask"] = _masks.widened(mask, rows, view, (batch, queries), device, stack.config)


def _real_cache(stack: nn.Module, kwargs: dict, opened: Scope, accepts: tuple[str, ...], crossing: bool) -> Any:
    """The cache that stands behind the prompt: the caller's, the one that the stack would make, or none."""
    from peft.prompts import _cache

    real = kwargs.get("past_key_values")
    if isinstance(real, (tuple, list)):
        raise UnsupportedError("past_key_values is a tuple; pass a transformers Cache, DynamicCache(...) for instance.")
    functions = _restore_in_checkpoints(stack) if stack.training and torch.is_grad_enabled() else []
    opened.checkpointed = bool(functions)
    if functions:
        opened.reentrant = any(_is_reentrant(function) for function in functions)
        if opened.reentrant and kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = _requiring_grad(kwargs["inputs_embeds"])
        return None
    if real is None and _uses_cache(stack, kwargs, accepts):
        return _cache.new_cache(stack.config, crossing)
    return real


def _prepend_tokens(stack: Any, kwargs: dict, opened: Scope) -> None:
    """Replace the inputs of a call without a past by embeddings that begin with the virtual tokens."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = stack.get_input_embeddings()(kwargs.pop("input_ids"))
    batch, length, _ = embeds.shape
    kwargs["inputs_embeds"] = torch.cat([opened.rows.tokens(batch, embeds, opened.side), embeds], dim=1)
    kwargs |= prompt_arguments(stack, opened.rows, (batch, length), embeds.device, kwargs)
    if kwargs.get("cache_position") is not None:  # transformers 4
        kwargs["cache_position"] = torch.arange(opened.rows.length + length, device=embeds.device)


def prompt_arguments(
    module: nn.Module, rows: Rows, shape: tuple[int, int], device: torch.device, given: dict, first: bool = False
) -> dict[str, Any]:
    """Mask, positions and token types of a sequence that begins with virtual tokens, as far as they are needed.

    Args:
        module: What reads the sequence.
        rows: The prompts.
        shape: (batch, length) of what follows them.
        device: Of the inputs.
        given: Arguments of the call.
        first: The padding of shorter prompts will be moved to the end, so that positions are what they are without it.
    """
    batch, length = shape
    accepts = _geometry.parameters(module)
    made: dict[str, Any] = {}
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask has the shape {tuple(mask.shape)}. Virtual tokens need the mask of padding, of shape "
            "(batch, length); the model derives the rest."
        )
    if mask is None and rows.ragged:
        mask = torch.ones(batch, length, dtype=torch.long, device=device)
    if mask is not None:
        made["attention_mask"] = torch.cat([rows.visible(batch, device).to(mask), mask], dim=1)
    positions = given.get("position_ids")
    ragged = rows.ragged and not first and not _geometry.counts_positions_along_mask(module)
    if "position_ids" in accepts and (positions is not None or ragged):
        start = _geometry.first_position(module)
        if positions is None:
            positions = torch.arange(start, start + length, device=device).expand(batch, -1)
        shifts = rows.shifts(batch, device)
        prompt = (torch.arange(rows.length, device=device) - rows.length + shifts).clamp_min(0) + start
        made["position_ids"] = torch.cat([prompt.expand(*positions.shape[:-1], -1), positions + shifts], dim=-1)
    elif ragged and _geometry.position_embeddings(module):
        raise UnsupportedError(RAGGED)
    counted = mask if _geometry.counts_positions_along_mask(module) else None
    _geometry.check_length(_geometry.reader(module), rows.length, length, made.get("position_ids"), counted)
    types = given.get("token_type_ids")
    if types is not None:
        made["token_type_ids"] = torch.cat([types.new_zeros(len(types), rows.length), types], dim=1)
    return made


RAGGED = (
    "adapter_names gives the samples prompts of different lengths, and this model does not let positions be given "
    "(no position_ids). Use prompts of one length in a batch, or one call for each length."
)


def _ragged_positions(
    stack: nn.Module, accepts: tuple[str, ...], shifts: Any, real: Any, kwargs: dict
) -> dict[str, Tensor]:
    """Positions of inputs whose prompts differ in length, for models that would count them from the length of all."""
    if _geometry.counts_positions_along_mask(stack):
        return {}
    if "position_ids" not in accepts:
        if _geometry.position_embeddings(stack):
            raise UnsupportedError(RAGGED)
        return {}
    ids, first = kwargs.get("input_ids"), _geometry.first_position(stack)
    inputs = kwargs["inputs_embeds"] if ids is None else ids
    taken = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    if first and ids is not None:  # padding takes no position
        taken = ids.ne(first - 1).long()
    past = 0 if real is None else real.get_seq_length()
    positions = taken.cumsum(1) - 1 + past + shifts + first
    return {"position_ids": positions.where(taken > 0, first - 1)}


def _uses_cache(stack: nn.Module, kwargs: dict, accepts: tuple[str, ...]) -> bool:
    """Whether the stack would make a cache for itself."""
    asked = kwargs.get("use_cache")
    return "use_cache" in accepts and bool(getattr(stack.config, "use_cache", False) if asked is None else asked)


class _Restoring:
    """A checkpoint function that hands checkpointed layers the prompt.

    transformers takes the cache away from a layer that is checkpointed, since replaying the layer would fill it twice.
    A view without a real cache holds nothing, so it may be replayed.
    """

    def __init__(self, function: Any, accepts: tuple[str, ...]) -> None:
        self.function = function
        self.accepts = accepts

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        opened = _THREAD.scope
        if opened is None or opened.view is None or not isinstance(layer, partial):
            return self.function(layer, *args, **kwargs)
        name = next((name for name in _CACHE_NAMES if name in self.accepts), None)
        if name is None:
            return self.function(layer, *args, **kwargs)
        place = self.accepts.index(name)
        if place < len(args):
            args = (*args[:place], opened.view, *args[place + 1 :])
        else:
            layer = partial(layer, **{name: opened.view})
        return self.function(layer, *args, **kwargs)


def _restore_in_checkpoints(stack: nn.Module) -> list[Any]:
    """The checkpoint functions of the stack's layers, each made to restore the prompt; empty if none is in use."""
    found = []
    for module in stack.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is None or not module.__dict__.get("gradient_checkpointing", False):
            continue
        if not isinstance(function, _Restoring):
            function = _Restoring(function, tuple(_geometry.parameters(module)))
            module.__dict__["_gradient_checkpointing_func"] = function
        found.append(function.function)
    return found


def is_checkpointed(stack: nn.Module) -> bool:
    """Whether some layer of a stack is checkpointed while it trains."""
    return any(module.__dict__.get("gradient_checkpointing", False) for module in stack.modules())


def _is_reentrant(function: Any) -> bool:
    return getattr(function, "keywords", {}).get("use_reentrant", True)


def _requiring_grad(embeds: Tensor) -> Tensor:
    return embeds if embeds.requires_grad else embeds.detach().requires_grad_()


def _map_output(output: Any, change: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(change(value) for value in output)
    if hasattr(output, "items"):
        return type(output)(**{key: change(value) for key, value in output.items()})
    return change(output)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) or hasattr(output, "items") else output


def _cut_tokens(value: Any, length: int, first: Any) -> Any:
    return value[:, length:] if value is first else value
