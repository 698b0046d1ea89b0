"""Prefixes from text or from a cache, and cartridges joined as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft.checkpoint import files, tensors
from peft.config import PeftConfig, PeftType
from peft.errors import AdapterNameError, ConfigError, PeftError, UnsupportedError, nearest
from peft.prompts._encoder import EMBEDDINGS_KEY, KeyValues
from peft.prompts.cartridge import CartridgeConfig

TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}
"""Changes to prefixes by model type, read by nobody here: the cache says what a model needs. Kept for importers."""


class CacheError(PeftError, ValueError):
    """A cache that no prefix can be made of."""


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Begin a prefix or cartridge at the keys and values of a text, read by the base model without adapters.

    The first `num_virtual_tokens` tokens are kept; the text must have as many.

    Args:
        model: A PeftModel with a PREFIX_TUNING (without projection) or CARTRIDGE adapter.
        tokenizer: Of the base model.
        text: What to begin with, a system message for instance.
        adapter_name: Default: the active adapter.
        num_virtual_tokens: Default, and only possible value: that of the adapter's config.
        use_chat_template: Wrap the text as a system message of the tokenizer's chat template.
        max_length: Read no more tokens than this.

    Returns:
        The prompt, shape (num_virtual_tokens, num_layers * 2 * token_dim).
    """
    base = model.get_base_model()
    if use_chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "system", "content": text}],
            tokenize=True,
            add_generation_prompt=False,
            return_dict=False,
            return_tensors="pt",
        )
    else:
        ids = tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)[
            "input_ids"
        ]
    ids = ids[:, :max_length].to(next(base.get_input_embeddings().parameters()).device)
    training = base.training
    base.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            cache = base(input_ids=ids, use_cache=True).past_key_values
    finally:
        base.train(training)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Begin a prefix or cartridge at the first keys and values of a cache.

    Args:
        model: A PeftModel with a PREFIX_TUNING (without projection) or CARTRIDGE adapter.
        adapter_name: Default: the active adapter.
        past_key_values: Cache of one sequence, of at least `num_virtual_tokens` tokens.
        num_virtual_tokens: Default, and only possible value: that of the adapter's config.

    Returns:
        The prompt, shape (num_virtual_tokens, num_layers * 2 * token_dim).
    """
    name = model.active_adapters[0] if adapter_name is None else adapter_name
    if name not in model.peft_config:
        known = list(model.peft_config)
        raise AdapterNameError(f"There is no adapter {name!r}.{nearest(name, known)} Adapters: {sorted(known)}.")
    config = model.peft_config[name]
    encoder = dict(model.prompt_encoder.items()).get(name)
    if not isinstance(encoder, KeyValues):
        raise ConfigError(
            f"Adapter {name!r} must be a CARTRIDGE or PREFIX_TUNING adapter (got {PeftType(config.peft_type).value})."
        )
    if encoder.reparametrised:
        raise UnsupportedError(
            "A prefix with prefix_projection=True is what its network makes, and can't begin at given keys and values. "
            "Use prefix_projection=False."
        )
    count = num_virtual_tokens or config.num_virtual_tokens
    rows = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    if rows.shape != encoder.rows().shape:
        raise ConfigError(
            f"The cache gives a prompt of shape {tuple(rows.shape)}, and adapter {name!r} has "
            f"{tuple(encoder.rows().shape)}. The number of virtual tokens is fixed by the adapter's config."
        )
    encoder.load_tensors({EMBEDDINGS_KEY: rows})
    return encoder.rows().detach()


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache in the layout of `prompt_embeddings`.

    Args:
        past_key_values: Cache of one sequence: a transformers cache, or a tuple of (keys, values) for each layer, each
            of shape (1, heads, length, head_dim).
        num_virtual_tokens: How many tokens to take.

    Returns:
        Shape (num_virtual_tokens, num_layers * 2 * heads * head_dim): keys, then values, of each layer in turn.

    Raises:
        ValueError: more than one sequence, or fewer tokens than asked for.
    """
    from peft.prompts._cache import layer_tensors

    columns = []
    for pair in layer_tensors(past_key_values):
        for part in pair:
            if part.shape[0] != 1:
                raise CacheError(
                    f"past_key_values must be of a single sequence, and holds {part.shape[0]}. Run the model "
                    "on one text."
                )
            if part.shape[2] < num_virtual_tokens:
                raise CacheError(
                    f"Need at least {num_virtual_tokens} cached tokens, got {part.shape[2]}. Give a longer text, or "
                    "fewer virtual tokens."
                )
            columns.append(part[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1))
    return torch.cat([column.to(columns[0].device) for column in columns], dim=1)


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike], *, output_path: str | os.PathLike, safe_serialization: bool = True
) -> None:
    """Join saved cartridges, one after another along their tokens, into a new adapter.

    The frozen tokens of the result are those of the first cartridge.

    Args:
        adapter_paths: Folders of two or more CARTRIDGE adapters for one base model.
        output_path: Folder to write.
        safe_serialization: `.safetensors`; False writes `.bin`.

    Raises:
        ConfigError: fewer than two, other methods, or cartridges for different models.
    """
    if len(adapter_paths) < 2:
        raise ConfigError("Need at least 2 adapters to compose.")
    configs = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    parts = []
    for path, config in zip(adapter_paths, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            kind = PeftType(config.peft_type).value if config.peft_type else None
            raise ConfigError(f"Adapter at {str(path)!r} is not a CARTRIDGE adapter (got {kind}).")
        name = next((name for name in files.WEIGHT_NAMES if files.exists(path, name)), files.SAFETENSORS_NAME)
        parts.append(tensors.read(Path(path) / name)[EMBEDDINGS_KEY])
        if parts[-1].shape[1:] != parts[0].shape[1:]:
            raise ConfigError(
                f"The cartridge at {str(path)!r} has {parts[-1].shape[1]} columns, and the first has "
                f"{parts[0].shape[1]}; they belong to different base models."
            )
    joined = torch.cat([part.to(parts[0].dtype) for part in parts])
    config: Any = configs[0]
    config.num_virtual_tokens = len(joined)
    name = files.SAFETENSORS_NAME if safe_serialization else files.BIN_NAME
    files.save(
        output_path,
        {
            files.CONFIG_NAME: config.to_json_string(),
            name: tensors.encode({EMBEDDINGS_KEY: joined}, pickled=not safe_serialization),
        },
    )


def bloom_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Rearrange a prefix to the layout that BLOOM had before transformers had caches. Nothing here needs it any more.

    Args:
        past_key_values: Tensors (2 * layers in all, batch, heads, tokens, head_dim), keys of all layers first.

    Returns:
        For each layer, keys (batch * heads, head_dim, tokens) and values (batch * heads, tokens, head_dim).
    """
    joined = torch.cat(tuple(past_key_values))
    layers = len(joined) // 2
    keys = joined[:layers].transpose(-2, -1).flatten(1, 2)
    values = joined[layers:].flatten(1, 2)
    return tuple(zip(keys, values, strict=True))
