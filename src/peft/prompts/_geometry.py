"""The sizes of a prompt, and the place where prompts attach, read off a base model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from peft.config import TaskType
from peft.errors import ConfigError, ShapeError, UnsupportedError
from peft.prompts._encoder import KeyValues

WIDTH = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")


def fill_sizes(config: Any, base_model: nn.Module, encoder: type) -> None:
    """Set the sizes that the config leaves open. What the user wrote stays.

    Raises:
        ConfigError: the number of virtual tokens is missing, or a size that the model does not tell.
    """
    if not config.num_virtual_tokens or config.num_virtual_tokens < 1:
        raise ConfigError(f"{type(config).__name__}.num_virtual_tokens is {config.num_virtual_tokens}; give 1 or more.")
    joined = issubclass(encoder, KeyValues)
    sizes = _key_value_sizes(base_model) if joined else _token_sizes(base_model)
    sizes["num_transformer_submodules"] = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    for name, value in sizes.items():
        if getattr(config, name) is None:
            if value is None and (joined or name == "token_dim"):
                raise ConfigError(
                    f"{type(base_model).__name__}.config does not tell the {name} of the prompt. Set "
                    f"{type(config).__name__}.{name}."
                )
            setattr(config, name, value)
    if config.num_transformer_submodules > 1 and not is_encoder_decoder(base_model):
        raise ConfigError(
            f"{type(config).__name__} has num_transformer_submodules={config.num_transformer_submodules} (2 is what "
            f"task_type='SEQ_2_SEQ_LM' sets), one prompt for an encoder and one for a decoder, and "
            f"{type(base_model).__name__} is one stack. Leave it out, and choose the task_type of the model."
        )
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = config.token_dim


def word_embeddings(base_model: nn.Module) -> nn.Module:
    """The layer that turns token ids into `inputs_embeds`."""
    lookup = getattr(base_model, "get_input_embeddings", None)
    found: Any = lookup() if callable(lookup) else None
    if found is None:
        raise UnsupportedError(
            f"{type(base_model).__name__} has no get_input_embeddings(), so prompts have nowhere to stand. Prompt "
            "methods need a model that reads tokens; use a weight method such as LoRA for others."
        )
    return found


def attention_stack(base_model: Any) -> nn.Module | None:
    """The module that owns the key/value cache of the text: builds masks and positions, and runs the layers.

    It is found by what it accepts: the innermost module that takes both `past_key_values` and `inputs_embeds`, outside
    of an encoder-decoder's encoder. None, if the model has no such cache.
    """
    inside_encoder: set[int] = set()
    if is_encoder_decoder(base_model):
        inside_encoder = {id(m) for m in base_model.get_encoder().modules()}
    stacks = [m for m in base_model.modules() if id(m) not in inside_encoder and _keeps_cache(m)]
    innermost = [m for m in stacks if not any(other is not m and other in stacks for other in m.modules())]
    return max(innermost, key=_attention_layers, default=None)


def cached_stack(base_model: nn.Module) -> nn.Module:
    """The attention stack of a model that must have one.

    Raises:
        UnsupportedError: the model has no key/value cache that a prompt could stand in.
    """
    stack = attention_stack(base_model)
    if stack is None:
        raise UnsupportedError(
            f"{type(base_model).__name__} has no module that takes past_key_values and inputs_embeds, so there are "
            "no keys and values to put a prefix before. Prompt tuning and P-tuning work on such models in forward; "
            "prefix tuning, cartridges, and generate() with virtual tokens need a key/value cache."
        )
    return stack


def is_encoder_decoder(base_model: nn.Module) -> bool:
    """Whether the input is read by an encoder of its own."""
    return bool(getattr(getattr(base_model, "config", None), "is_encoder_decoder", False))


_TABLES = "_peft_position_tables"
"""Under this name a module keeps the paths of its position embeddings: to look for them takes a walk through it."""


def position_embeddings(module: nn.Module) -> list[Any]:
    """The learnt tables of absolute positions inside a module."""
    paths = module.__dict__.get(_TABLES)
    if paths is not None:
        tables = [module.get_submodule(path) for path in paths]
        if all(isinstance(table, nn.Embedding) for table in tables):
            return tables
    found = {
        path: table
        for path, table in module.named_modules()
        if isinstance(table, nn.Embedding) and ("position" in path or path.endswith("wpe"))
    }
    module.__dict__[_TABLES] = tuple(found)
    return list(found.values())


def forget(base_model: nn.Module) -> None:
    """Leave nothing on a model of what was found out about it."""
    for module in base_model.modules():
        module.__dict__.pop(_TABLES, None)


def counts_positions_along_mask(module: nn.Module) -> bool:
    """Whether positions are derived from the mask of padding (OPT and its kin), so that they need not be given."""
    # BioGPT's table would count along the mask, but its model hands it positions that it counts by itself.
    tables = (m for m in position_embeddings(module) if not type(m).__name__.startswith("BioGpt"))
    return any("attention_mask" in parameters(m) for m in tables)


def first_position(module: nn.Module) -> int:
    """Where positions begin: after the one that stands for padding (RoBERTa and its kin), if there is one."""
    tables = [table for table in position_embeddings(module) if table.padding_idx is not None]
    return tables[0].padding_idx + 1 if tables else 0


def check_length(module: nn.Module, prompt: int, length: int, positions: Tensor | None, mask: Any) -> None:
    """Raise if a prompt and what follows it need more positions than the model's tables hold.

    Args:
        module: What reads the sequence.
        prompt: Number of virtual tokens.
        length: Number of tokens after them, padding included.
        positions: Positions of the last of them, if the caller gives them.
        mask: Of padding, (batch, keys); it matters where padding takes no position. Prepared masks are not looked at.

    Raises:
        ShapeError: the sequence is too long.
    """
    of_padding = isinstance(mask, Tensor) and mask.dim() == 2
    for table in position_embeddings(module):
        taken = 0 if table.padding_idx is None else table.padding_idx + 1
        room = table.num_embeddings - taken - getattr(table, "offset", 0)
        needed = prompt + length
        if needed > room and positions is not None:
            needed = int(positions.max()) + 1
        elif needed > room and of_padding and (taken or "attention_mask" in parameters(table)):
            needed = prompt + int(mask.sum(-1).max())
        if needed > room:
            raise ShapeError(
                f"{prompt} virtual tokens and {needed - prompt} tokens after them need {needed} positions, and "
                f"{type(module).__name__} has learnt {room}. Cut the input to {room - prompt} tokens (max_length of "
                "the tokenizer), or take fewer virtual tokens."
            )


def reader(base_model: Any) -> nn.Module:
    """The part of a model that reads its input: the encoder of an encoder-decoder."""
    return base_model.get_encoder() if is_encoder_decoder(base_model) else base_model


def parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a module's forward, in order."""
    return dict(inspect.signature(module.forward).parameters)


def _keeps_cache(module: nn.Module) -> bool:
    return {"past_key_values", "inputs_embeds"} <= parameters(module).keys()


def _attention_layers(module: nn.Module) -> int:
    return sum(hasattr(m, "layer_idx") for m in module.modules())


def _token_sizes(base_model: nn.Module) -> dict[str, Any]:
    text = _text_config(base_model)
    embeddings = word_embeddings(base_model)
    return {
        "token_dim": getattr(embeddings, "embedding_dim", None) or _first(text, WIDTH),
        "num_attention_heads": _first(text, HEADS),
        "num_layers": _first(text, LAYERS),
    }


def _key_value_sizes(base_model: nn.Module) -> dict[str, Any]:
    """Width and heads of the keys as the cache holds them: those of grouped or single key/value heads."""
    text = _text_config(base_model)
    heads = _first(text, HEADS)
    decoder = is_encoder_decoder(base_model)
    if decoder:
        heads = getattr(text, "decoder_attention_heads", None) or heads
    width = _first(text, WIDTH)
    head_dim = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or (heads and width and width // heads)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1
    heads = getattr(text, "num_key_value_heads", None) or heads
    layers = (_first(text, DECODER_LAYERS) if decoder else None) or _first(text, LAYERS)
    return {"token_dim": heads and head_dim and heads * head_dim, "num_attention_heads": heads, "num_layers": layers}


def _text_config(base_model: nn.Module) -> Any:
    config = getattr(base_model, "config", None)
    if config is None:
        raise UnsupportedError(
            f"{type(base_model).__name__} has no config, so its sizes are unknown. Prompt methods need a transformers "
            "model; use a weight method such as LoRA for others."
        )
    if is_encoder_decoder(base_model) or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config()


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
