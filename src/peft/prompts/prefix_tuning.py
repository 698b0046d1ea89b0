"""Prefix tuning: trained keys and values before those of the input, in every layer (arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import PromptLearningConfig, choice
from peft.prompts._encoder import KeyValues
from peft.prompts.p_tuning import warn_of_lost_network


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (arXiv 2101.00190): every attention layer sees `num_virtual_tokens` trained keys and values first.

    The output keeps the length of the input. Encoder-decoder models get the prefix in the decoder's self-attention.

    Example:
        >>> from peft import PrefixTuningConfig
        >>> PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, init_weights="zero").prefix_projection
        False
    """

    init_weights: Literal["zero"] | None = field(
        default=None,
        metadata={"help": "'zero' starts with keys and values of 0; None with standard normal noise."},
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden width of the projection; None means token_dim."}
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "Make the prefix by a two-layer network over a narrow table."}
    )

    def __post_init__(self) -> None:
        self.peft_type = "PREFIX_TUNING"
        super().__post_init__()
        choice(self, "init_weights", (None, "zero"))


class PrefixEncoder(KeyValues, name="prefix_tuning", config=PrefixTuningConfig):
    """The table of keys and values, or a narrow table and the network that widens it."""

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        tokens, width, hidden = config.num_virtual_tokens, config.token_dim, config.encoder_hidden_size
        columns = config.num_layers * 2 * width
        self.transform: nn.Sequential | None = None
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(tokens, width)
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, columns))
        else:
            self.embedding = nn.Embedding(tokens, columns)
        if config.init_weights == "zero":
            last = self.embedding if self.transform is None else self.transform[2]
            with torch.no_grad():
                for parameter in last.parameters():
                    parameter.zero_()

    @property
    def reparametrised(self) -> bool:
        return self.transform is not None

    def rows(self) -> Tensor:
        table = self.embedding.weight
        return table if self.transform is None else self.transform(table)

    def columns(self, start: int, stop: int) -> Tensor:
        if self.transform is None:
            return self.embedding.weight[:, start:stop]
        layers: Any = self.transform
        inner, tanh, outer = layers
        return F.linear(tanh(inner(self.embedding.weight)), outer.weight[start:stop], outer.bias[start:stop])

    def _drop_network(self, rows: Tensor) -> None:
        self.transform = None
        self.embedding = nn.Embedding(rows.shape[0], rows.shape[1], device=self.embedding.weight.device)
        warn_of_lost_network(self)
