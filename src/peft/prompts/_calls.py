"""What a model with prompts does when it is called: `forward` and `generate`, for every task."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from peft import registry, routing
from peft.config import PeftType, PromptLearningConfig, TaskType
from peft.errors import ConfigError, PeftWarning, UnsupportedError
from peft.prompts import _geometry
from peft.prompts._attach import RAGGED, is_checkpointed, no_scope, prompt_arguments, scope, site_of
from peft.prompts._encoder import BasePromptEncoder, KeyValues
from peft.prompts._prefix import Rows, kind, rows_of
from peft.prompts.cpt import CPTConfig, cpt_loss

IGNORED_LABEL = -100


def build(config: PromptLearningConfig, base_model: nn.Module, *, fresh: bool = True) -> BasePromptEncoder:
    """Make the encoder of a config, on the device of the model's embeddings. Fills in the sizes the config leaves open.

    Args:
        config: Of a prompt method.
        base_model: What the prompt is for.
        fresh: False leaves out the start from texts or files, since tensors will be loaded.

    Raises:
        ConfigError: a size is missing that the model does not tell.
        UnsupportedError: the model has no place for such a prompt.
    """
    made: type[BasePromptEncoder] = registry.method(PeftType(config.peft_type).value)
    if issubclass(made, KeyValues):
        _geometry.cached_stack(base_model)
    _geometry.fill_sizes(config, base_model, made)
    words = _geometry.word_embeddings(base_model)
    if issubclass(made, KeyValues):
        site_of(base_model)
    encoder = made(config, words if fresh or made.needs_word_embeddings else None)
    device = next(words.parameters()).device
    on_meta = device.type == "meta" or any(p.is_meta for p in encoder.parameters())
    return encoder if on_meta else encoder.to(device)


def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the base model of `model` with the prompts of its active adapters (or of `adapter_names`)."""
    base = model.get_base_model()
    accepts = tuple(_geometry.parameters(base))
    kwargs = dict(zip(accepts, args, strict=False)) | kwargs
    rows = _rows(model, kwargs)
    if rows is None:
        return base(**kwargs)
    if kind(rows) is KeyValues:
        with scope(site_of(base), rows):
            return base(**kwargs)
    if _pools_last_token(model, base, accepts, kwargs):
        with scope(site_of(base), rows, virtual=True):
            return base(**kwargs)
    return _forward_tokens(model, base, rows, accepts, kwargs)


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate with the base model of `model` and the prompts of its active adapters (or of `adapter_names`).

    All strategies of `GenerationMixin.generate` and all caches work: the prompt never is among the tokens.
    """
    base = model.get_base_model()
    rows = _rows(model, kwargs)
    if rows is None:
        return base.generate(*args, **kwargs)
    if kind(rows) is not KeyValues:
        _refuse_filled(kwargs.get("past_key_values"))
        if _geometry.is_encoder_decoder(base):
            kwargs = _encoder_inputs(base, rows, args, kwargs)
            if not rows.before_decoder:
                return base.generate(**kwargs)
            # What the decoder makes of its prompt depends on the input, so it goes through with every step.
            with scope(site_of(base), rows, virtual=True, side=1):
                return base.generate(**kwargs | {"use_cache": False})
        stack = base.get_submodule(site_of(base).path)
        if stack.training and is_checkpointed(stack):
            # Checkpointed layers are given no cache, so the virtual tokens go through them at every step.
            with scope(site_of(base), rows, virtual=True):
                return base.generate(*args, **kwargs | {"use_cache": False})
        rows = _computed(base, rows)
    with scope(site_of(base), rows.kept()):
        output = base.generate(*args, **kwargs)
    for cache in (kwargs.get("past_key_values"), getattr(output, "past_key_values", None)):
        if cache is not None:
            setattr(cache, _WITHOUT_PROMPT, True)
    return output


_WITHOUT_PROMPT = "_peft_without_prompt"
"""Marks caches of `generate`: the keys and values of virtual tokens stand before them, and not in them."""


def _refuse_filled(cache: Any) -> None:
    if cache is not None and not hasattr(cache, _WITHOUT_PROMPT) and cache.get_seq_length() > 0:
        raise UnsupportedError(
            "past_key_values was filled by forward(), so the virtual tokens are in it, and generate() would count them "
            "as tokens of the text. Give generate() the whole text and an empty cache, or one that generate() returned."
        )


def get_prompt(model: Any, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
    """The active prompt by itself: virtual tokens (batch, tokens, width), or a `DynamicCache` with the prefix.

    Args:
        model: A PeftModel with an active prompt adapter.
        batch_size: How many times.
        task_ids: Tasks, shape (batch,), for multitask prompts.
        max_cache_len: Not needed; there for callers that know HF PEFT's signature.
    """
    base = model.get_base_model()
    rows = _rows(model, {"task_ids": task_ids})
    if rows is None:
        raise ConfigError("No prompt adapter is active. Choose one with set_adapter(name).")
    like = next(_geometry.word_embeddings(base).parameters())
    if kind(rows) is not KeyValues:
        return rows.tokens(batch_size, like)
    from transformers import DynamicCache

    cache = DynamicCache()
    encoder: Any = rows.stacks[0][0]
    for layer in range(encoder.num_layers):
        empty = like.new_empty(batch_size, encoder.num_heads, 0, encoder.token_dim // encoder.num_heads)
        cache.update(*rows.keys_values(layer, empty, empty), layer)
    return cache


def _rows(model: Any, kwargs: dict) -> Rows | None:
    """The prompts of a call; takes the arguments that only choose them out of `kwargs`."""
    route = routing.current()
    names, active = kwargs.pop("adapter_names", None), model.active_adapters
    if route is not None:
        names, active = names or route.rows, route.names
    return rows_of(
        dict(model.prompt_encoder.items()),
        active,
        names,
        kwargs.pop("task_ids", None),
        list(model.peft_config),
    )


def _cpt_config(model: Any, rows: Rows) -> CPTConfig | None:
    """The config of the CPT adapter that all samples of a call have, which brings its own loss."""
    if rows.of_sample is None and len(rows.stacks[0]) == 1:
        for name, encoder in model.prompt_encoder.items():
            if encoder is rows.stacks[0][0] and isinstance(model.peft_config[name], CPTConfig):
                return model.peft_config[name]
    return None


def _pools_last_token(model: Any, base: nn.Module, accepts: tuple[str, ...], kwargs: dict) -> bool:
    """Whether this is a classifier over a causal stack, which looks for the last token among `input_ids`.

    It would not find padding in `inputs_embeds`, so the virtual tokens are put in further inside.
    """
    return (
        _task(model) == TaskType.SEQ_CLS
        and "past_key_values" in accepts
        and kwargs.get("input_ids") is not None
        and not _geometry.is_encoder_decoder(base)
    )


def _task(model: Any) -> TaskType | None:
    return next((c.task_type for c in model.peft_config.values() if c.task_type is not None), None)


def _forward_tokens(model: Any, base: nn.Module, rows: Rows, accepts: tuple[str, ...], kwargs: dict) -> Any:
    """Call a model with virtual tokens before the input embeddings, and with labels that are in step with them."""
    types, past = kwargs.pop("input_type_mask", None), kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        if hasattr(past, _WITHOUT_PROMPT):
            with scope(site_of(base), _computed(base, rows)):
                return base(**kwargs)
        return base(**_continued(rows, kwargs, past))
    first = rows.ragged and (_geometry.is_encoder_decoder(base) or _task(model) == TaskType.SEQ_CLS)
    shape = _put_before_input(base, rows, accepts, kwargs, first)
    labels, config = kwargs.get("labels"), _cpt_config(model, rows)
    if config is not None and labels is not None:
        del kwargs["labels"]
        output = base(**kwargs)
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = cpt_loss(config, logits, labels, types)
        return (loss, *output) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})
    if rows.before_decoder:
        return base(**_decoder_inputs(base, rows, kwargs))
    if labels is not None and _labels_tokens(model, base, labels, shape):
        kwargs["labels"] = _unlabelled_before(labels, rows)
    return base(**kwargs)


def _put_before_input(
    base: nn.Module, rows: Rows, accepts: tuple[str, ...], kwargs: dict, first: bool
) -> tuple[int, int]:
    """Put virtual tokens before the input, and move what counts along it; returns the shape (batch, length) it had.

    With `first` every sequence begins at the first place, and the padding of shorter prompts stands at the end.
    """
    embeds, ids = kwargs.pop("inputs_embeds", None), kwargs.pop("input_ids", None)
    if embeds is None:
        embeds = _embedded(base, ids)
    batch, length = embeds.shape[:2]
    for name in ("token_type_ids", "position_ids"):
        if kwargs.get(name) is not None and name not in accepts:
            warnings.warn(f"{type(base).__name__} takes no {name}; they are ignored.", PeftWarning, stacklevel=5)
            del kwargs[name]
    kwargs |= prompt_arguments(base, rows, (batch, length), embeds.device, kwargs, first)
    for name in ("start_positions", "end_positions"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name] + rows.length
    kwargs["inputs_embeds"] = torch.cat([rows.tokens(batch, embeds), embeds], dim=1)
    if first:
        _align_left(rows, kwargs)
    return batch, length


def _embedded(base: nn.Module, ids: Tensor | None) -> Tensor:
    """The input embeddings of token ids."""
    if ids is None:
        raise UnsupportedError(
            f"{type(base).__name__} was called without input_ids or inputs_embeds. Virtual tokens stand before tokens "
            "of text; on models that read something else, use prefix tuning or a weight method such as LoRA."
        )
    return _geometry.word_embeddings(base)(ids)


def _align_left(rows: Rows, kwargs: dict) -> None:
    """Move the padding of shorter prompts to the end: classifiers read what stands first, and positions begin there."""
    embeds = kwargs["inputs_embeds"]
    batch, length = embeds.shape[:2]
    missing = rows.length - rows.shifts(batch, embeds.device)
    order = (torch.arange(length, device=embeds.device) + missing) % length
    kwargs["inputs_embeds"] = embeds.gather(1, order[:, :, None].expand_as(embeds))
    for name in ("attention_mask", "position_ids", "token_type_ids"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name].gather(1, order)


def _continued(rows: Rows, kwargs: dict, past: Any) -> dict:
    """The virtual tokens are in the cache already; only a mask that leaves them out must grow."""
    mask = kwargs.get("attention_mask")
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    whole = int(past.get_seq_length()) + tokens.shape[1]
    if mask is not None and mask.shape[1] == whole - rows.length:
        kwargs["attention_mask"] = torch.cat([rows.visible(len(mask), mask.device).to(mask), mask], dim=1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + rows.shifts(len(mask), mask.device)
    return kwargs


def _labels_tokens(model: Any, base: nn.Module, labels: Tensor, shape: tuple[int, int]) -> bool:
    """Whether labels stand for the tokens of the sequence that the prompt is in, of shape (batch, length)."""
    if _geometry.is_encoder_decoder(base) or _task(model) == TaskType.SEQ_CLS:
        return False
    return labels.shape[:2] == shape


def _unlabelled_before(labels: Tensor, rows: Rows) -> Tensor:
    """Labels of a sequence that begins with virtual tokens, which have none."""
    return torch.cat([labels.new_full((len(labels), rows.length), IGNORED_LABEL), labels], dim=1)


def _decoder_inputs(base: Any, rows: Rows, kwargs: dict) -> dict:
    """Arguments of `forward` for a decoder that reads virtual tokens first, made from its ids or from the labels."""
    labels, ids, embeds = (kwargs.pop(name, None) for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds"))
    if embeds is None:
        if ids is None:
            ids = _shifted_right(base, labels)
        embeds = base.get_decoder().get_input_embeddings()(ids)
    batch = len(embeds)
    if rows.ragged and _geometry.position_embeddings(base.get_decoder()):
        raise UnsupportedError(RAGGED)
    kwargs["decoder_inputs_embeds"] = torch.cat([rows.tokens(batch, embeds, side=1), embeds], dim=1)
    mask = kwargs.get("decoder_attention_mask")
    if mask is None and rows.ragged:
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    if mask is not None:
        kwargs["decoder_attention_mask"] = torch.cat([rows.visible(batch, mask.device).to(mask), mask], dim=1)
    if labels is not None:
        kwargs["labels"] = _unlabelled_before(labels, rows)
    return kwargs


def _shifted_right(base: nn.Module, labels: Tensor | None) -> Tensor:
    """The decoder's input ids that belong to labels, both of shape (batch, length)."""
    kind = type(base).__name__
    if labels is None:
        raise ConfigError(f"{kind} needs labels, decoder_input_ids or decoder_inputs_embeds.")
    prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise UnsupportedError(
            f"{kind} takes no decoder_inputs_embeds beside labels, and multitask prompts stand before the decoder's "
            "input as well. Pass decoder_input_ids without labels, and take the loss from the logits: their first "
            "num_virtual_tokens positions are the prompt's."
        )
    return prepare(labels=labels)


def _encoder_inputs(base: nn.Module, rows: Rows, args: tuple, kwargs: dict) -> dict:
    """Arguments of `generate` for an encoder that reads the virtual tokens first."""
    kwargs = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    ids = kwargs.pop("input_ids", None)
    inputs = kwargs.pop("inputs", None)
    ids = inputs if ids is None else ids
    embeds = kwargs.pop("inputs_embeds", None)
    if embeds is None:
        embeds = _embedded(base, ids)
        if kwargs.get("attention_mask") is None:
            pad = getattr(base.config, "pad_token_id", None)
            if pad is not None and pad != getattr(base.config, "eos_token_id", None) and bool((ids == pad).any()):
                kwargs["attention_mask"] = (ids != pad).long()
    batch, length = embeds.shape[:2]
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
    kwargs |= prompt_arguments(base, rows, (batch, length), embeds.device, kwargs, first=rows.ragged)
    kwargs["inputs_embeds"] = torch.cat([rows.tokens(batch, embeds), embeds], dim=1)
    if rows.ragged:
        _align_left(rows, kwargs)
    return kwargs


def _computed(base: nn.Module, rows: Rows) -> Rows:
    """The keys and values that virtual tokens have in a causal model: nothing after them can change them."""
    from peft.prompts._cache import DynamicCache, layer_tensors

    stack: Any = base.get_submodule(site_of(base).path)
    embeddings = _geometry.word_embeddings(base)
    device = next(embeddings.parameters()).device
    batch = len(rows.of_sample or ()) or (1 if rows.task_ids is None else len(rows.task_ids))
    with torch.no_grad(), no_scope():
        like = embeddings(torch.zeros(1, 1, dtype=torch.long, device=device))
        tokens = rows.tokens(batch, like)
        arguments: dict[str, Any] = {"attention_mask": rows.visible(batch, device).long()}
        if rows.ragged:
            empty = torch.zeros(batch, 0, dtype=torch.long, device=device)
            given = {"attention_mask": empty, "position_ids": empty}
            arguments = prompt_arguments(stack, rows, (batch, 0), device, given)
        output = stack(inputs_embeds=tokens, past_key_values=DynamicCache(), use_cache=True, **arguments)
    return rows.fixed(layer_tensors(output.past_key_values))
