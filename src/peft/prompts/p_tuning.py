"""P-tuning: virtual tokens that a small network makes out of a table (arXiv 2103.10385)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.errors import PeftWarning
from peft.prompts._encoder import VirtualTokens
from peft.prompts.prompt_tuning import member


class PromptEncoderReparameterizationType(str, Enum):
    """The network of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (arXiv 2103.10385): the virtual tokens are the output of an MLP or a bidirectional LSTM over a table.

    Example:
        >>> from peft import PromptEncoderConfig
        >>> config = PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=128)
        >>> config.encoder_reparameterization_type.value
        'MLP'
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = field(
        default=PromptEncoderReparameterizationType.MLP, metadata={"help": "MLP or LSTM."}
    )
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "Hidden width; None means token_dim."})
    encoder_num_layers: int = field(default=2, metadata={"help": "Layers of the LSTM. The MLP always has three."})
    encoder_dropout: float = field(default=0.0, metadata={"help": "Dropout between the layers of the LSTM."})

    def __post_init__(self) -> None:
        self.peft_type = "P_TUNING"
        super().__post_init__()
        self.encoder_reparameterization_type = member(
            PromptEncoderReparameterizationType, self.encoder_reparameterization_type, "encoder_reparameterization_type"
        )


class PromptEncoder(VirtualTokens, name="p_tuning", config=PromptEncoderConfig):
    """The table and its network. In inference mode only the table is there, holding what the network gave."""

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        width, hidden = config.token_dim, config.encoder_hidden_size
        self.embedding = nn.Embedding(config.num_virtual_tokens * config.num_transformer_submodules, width)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                input_size=width,
                hidden_size=hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    @property
    def reparametrised(self) -> bool:
        return self.mlp_head is not None

    def rows(self) -> Tensor:
        table = self.embedding.weight
        if self.lstm_head is not None:
            table = self.lstm_head(table[None])[0][0]
        return table if self.mlp_head is None else self.mlp_head(table)

    def _drop_network(self, rows: Tensor) -> None:
        self.lstm_head = self.mlp_head = None
        warn_of_lost_network(self)


def warn_of_lost_network(encoder: nn.Module) -> None:
    """The file was written without the encoder's weights (HF PEFT never writes them)."""
    warnings.warn(
        f"The file holds the prompt that a {type(encoder).__name__} made, but not the encoder's own weights. Training "
        "goes on from the same prompt, as a plain table without the encoder.",
        PeftWarning,
        stacklevel=2,
    )
