"""Cartridges: a long context, distilled into a short cache of keys and values (arXiv 2506.06266)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PromptLearningConfig
from peft.errors import ConfigError
from peft.prompts._encoder import KeyValues, check_shapes, put


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Cartridge (arXiv 2506.06266): like prefix tuning, usually begun from a real cache, with its first tokens frozen.

    Begin from a text with `initialize_kv_prefix_from_text`, from a cache with
    `initialize_kv_prefix_from_past_key_values`; join several with `compose_cartridge_adapters`.

    Example:
        >>> from peft import CartridgeConfig
        >>> CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=64).num_frozen_tokens
        1

    Raises:
        ConfigError: a negative num_frozen_tokens.
    """

    num_frozen_tokens: int = field(
        default=1, metadata={"help": "First tokens that stay as they are (an attention sink)."}
    )

    def __post_init__(self) -> None:
        self.peft_type = "CARTRIDGE"
        super().__post_init__()
        if self.num_frozen_tokens < 0:
            raise ConfigError(f"num_frozen_tokens must be >= 0, got {self.num_frozen_tokens}.")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens is {self.num_frozen_tokens}, more than the {self.num_virtual_tokens} tokens "
                "there are."
            )


class CartridgeEncoder(KeyValues, name="cartridge", config=CartridgeConfig):
    """Frozen rows, then trained rows; columns as in `KeyValues`."""

    frozen: ClassVar[tuple[str, ...]] = ("frozen_embedding",)

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        columns = config.num_layers * 2 * config.token_dim
        frozen = min(config.num_frozen_tokens, config.num_virtual_tokens)
        trained = torch.empty(config.num_virtual_tokens - frozen, columns)
        self.frozen_embedding = nn.Parameter(torch.empty(frozen, columns), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(trained)
        for part in self._parts():
            if not part.is_meta:
                nn.init.normal_(part)

    def _parts(self) -> list[Tensor]:
        return [part for part in (self.frozen_embedding, self.trainable_embedding) if part is not None]

    def rows(self) -> Tensor:
        return torch.cat(self._parts())

    def columns(self, start: int, stop: int) -> Tensor:
        return torch.cat([part[:, start:stop] for part in self._parts()])

    def _load_rows(self, rows: Tensor) -> None:
        check_shapes({"prompt_embeddings": rows}, {"prompt_embeddings": self.rows()}, self)
        cut = len(rows) - len(self.trainable_embedding)
        put(self, "trainable_embedding", rows[cut:])
        if cut:
            put(self, "frozen_embedding", rows[:cut])
