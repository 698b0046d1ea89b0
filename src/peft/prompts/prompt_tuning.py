"""Prompt tuning: a table of virtual tokens before the input (arXiv 2104.08691)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.errors import ConfigError, nearest
from peft.prompts._encoder import VirtualTokens


class PromptTuningInit(str, Enum):
    """Where a prompt starts."""

    TEXT = "TEXT"
    """At the embeddings of a text, repeated or cut to the length of the prompt."""
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    """At the embeddings of tokens drawn from the vocabulary."""
    RANDOM = "RANDOM"
    """At standard normal noise."""


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (arXiv 2104.08691): `num_virtual_tokens` trained vectors stand before the input embeddings.

    Example:
        >>> from peft import PromptTuningConfig
        >>> PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8).prompt_tuning_init.value
        'RANDOM'

    Raises:
        ConfigError: an init from text without a text or a tokenizer.
    """

    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.RANDOM,
        metadata={"help": "RANDOM, SAMPLE_VOCAB (tokens drawn from the vocabulary) or TEXT."},
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "The text to start from, for TEXT."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer of that text, for TEXT."})
    tokenizer_kwargs: dict | None = field(
        default=None, metadata={"help": "Keywords of AutoTokenizer.from_pretrained, for TEXT."}
    )

    _inits: ClassVar[type[Enum]] = PromptTuningInit
    _type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        self.peft_type = self._type
        super().__post_init__()
        self.prompt_tuning_init = member(self._inits, self.prompt_tuning_init, "prompt_tuning_init")
        from_text = self.prompt_tuning_init == "TEXT"
        if from_text and not self.tokenizer_name_or_path:
            raise ConfigError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path, to turn the text into tokens.")
        if from_text and self.prompt_tuning_init_text is None:
            raise ConfigError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text.")
        if self.tokenizer_kwargs and not from_text:
            raise ConfigError("tokenizer_kwargs are used by prompt_tuning_init='TEXT' only.")


class PromptEmbedding(VirtualTokens, name="prompt_tuning", config=PromptTuningConfig):
    """The table. `embedding.weight` has the shape (num_virtual_tokens * num_transformer_submodules, token_dim)."""

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        rows = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(rows, config.token_dim)
        if config.inference_mode or self.embedding.weight.is_meta or word_embeddings is None:
            return
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, vocabulary_size(word_embeddings), (rows,))
        elif config.prompt_tuning_init == "TEXT":
            ids = repeated(text_ids(config), rows)
        else:
            return
        self.embedding.weight = nn.Parameter(embedded(word_embeddings, ids))


def member(inits: type[Enum], value: Any, name: str) -> Any:
    """`value` as a member of an enum."""
    try:
        return inits(value)
    except ValueError:
        known = [m.value for m in inits]
        raise ConfigError(f"{name} {value!r} is unknown.{nearest(str(value), known)} Known: {known}.") from None


def vocabulary_size(word_embeddings: Any) -> int:
    """Number of rows of an embedding layer."""
    size = getattr(word_embeddings, "num_embeddings", None)
    return size if size is not None else word_embeddings.weight.shape[0]


def embedded(word_embeddings: nn.Module, ids: Tensor) -> Tensor:
    """A float32 copy of the embeddings of `ids`, shape (len(ids), token_dim), as the model itself looks them up."""
    device = next(word_embeddings.parameters()).device
    with torch.no_grad():
        return word_embeddings(ids.to(device)).detach().clone().float()


def repeated(ids: list[int], length: int) -> Tensor:
    """`ids`, repeated and cut to `length`."""
    if not ids:
        raise ConfigError("prompt_tuning_init_text has no tokens; give a text that is not empty.")
    return torch.tensor((ids * math.ceil(length / len(ids)))[:length])


def text_ids(config: Any) -> list[int]:
    """Token ids of the initial text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    return tokenizer(config.prompt_tuning_init_text)["input_ids"]
