"""Multitask prompt tuning: one shared prompt, changed for each task by a matrix of low rank (arXiv 2303.02861)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.checkpoint import tensors
from peft.errors import ConfigError
from peft.prompts._encoder import EMBEDDINGS_KEY, put, taken
from peft.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig

TASK_KEYS = ("prefix_task_cols", "prefix_task_rows")


class MultitaskPromptTuningInit(str, Enum):
    """Where the prompts start. The last three read a prompt that was trained on source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    """At the source prompt; every task's matrix at the mean over the source tasks."""
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    """At the source prompt; every task's matrix at that of source task `prompt_tuning_init_task`."""
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"
    """At the shared source prompt; the tasks' matrices random."""


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (arXiv 2303.02861): the prompt of task t is P ⊙ (C_t R_t), with P shared by all tasks.

    `forward` and `generate` then need `task_ids`, one whole number for each sample.

    Example:
        >>> from peft import MultitaskPromptTuningConfig
        >>> MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, num_tasks=3, num_ranks=2).num_tasks
        3
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = field(
        default=MultitaskPromptTuningInit.RANDOM,
        metadata={"help": "RANDOM, TEXT, AVERAGE_SOURCE_TASKS, EXACT_SOURCE_TASK or ONLY_SOURCE_SHARED."},
    )
    prompt_tuning_init_state_dict_path: str | None = field(
        default=None, metadata={"help": "Tensors of the source prompt (.safetensors, or a torch file)."}
    )
    prompt_tuning_init_task: int | None = field(
        default=0, metadata={"help": "Source task to start from, for EXACT_SOURCE_TASK."}
    )
    num_ranks: int | None = field(default=1, metadata={"help": "Rank of each task's matrix."})
    num_tasks: int | None = field(default=1, metadata={"help": "Number of tasks."})

    _inits: ClassVar[type[Enum]] = MultitaskPromptTuningInit
    _type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if _has_source(self) and not self.inference_mode and self.prompt_tuning_init_state_dict_path is None:
            raise ConfigError(
                f"prompt_tuning_init={MultitaskPromptTuningInit(self.prompt_tuning_init).value!r} needs "
                "prompt_tuning_init_state_dict_path, the file of the source prompt."
            )


def _has_source(config: Any) -> bool:
    return "SOURCE" in config.prompt_tuning_init.value


class MultitaskPromptEmbedding(PromptEmbedding, name="multitask_prompt_tuning", config=MultitaskPromptTuningConfig):
    """The shared table, and C (tasks, rows, ranks) and R (tasks, ranks, token_dim) of the tasks.

    In encoder-decoders the first half of the rows goes before the encoder's input, the second before the decoder's.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        tasks, ranks = config.num_tasks, config.num_ranks
        rows = config.num_virtual_tokens * config.num_transformer_submodules
        self.num_tasks: int = tasks
        self.before_decoder = config.num_transformer_submodules == 2
        self.prefix_task_cols = nn.Parameter(torch.normal(0, 0.02, (tasks, rows, ranks)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0, 0.02, (tasks, ranks, config.token_dim)))
        if word_embeddings is not None and _has_source(config) and not config.inference_mode:
            self._start_from(config)

    def tokens(self, task_ids: Tensor | None = None, side: int = 0) -> Tensor:
        if task_ids is None:
            raise ConfigError(
                "Multitask prompt tuning needs to know the task of each sample: pass task_ids, a tensor of shape "
                f"(batch,) with values from 0 to {self.num_tasks - 1}."
            )
        task_ids = task_ids.to(self.prefix_task_cols.device)
        task = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        return (self.embedding.weight * task)[:, self.side(side)]

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Prompts of the tasks, shape (batch, num_virtual_tokens, token_dim). `indices` is there for symmetry."""
        return self.tokens(task_ids)

    def saved_tensors(self) -> dict[str, Tensor]:
        return super().saved_tensors() | {key: getattr(self, key).detach() for key in TASK_KEYS}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        super().load_tensors(saved)
        for key in TASK_KEYS:
            put(self, key, taken(saved, key, self))

    def _start_from(self, config: Any) -> None:
        source = tensors.read(config.prompt_tuning_init_state_dict_path)
        put(self.embedding, "weight", taken(source, EMBEDDINGS_KEY, self))
        if config.prompt_tuning_init == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            return
        for key in TASK_KEYS:
            trained = taken(source, key, self)
            if config.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                start = trained.mean(0, keepdim=True)
            elif 0 <= config.prompt_tuning_init_task < len(trained):
                start = trained[config.prompt_tuning_init_task, None]
            else:
                raise ConfigError(
                    f"prompt_tuning_init_task is {config.prompt_tuning_init_task}, and the source prompt has "
                    f"{len(trained)} tasks, counted from 0."
                )
            put(self, key, start.expand(self.num_tasks, *start.shape[1:]))
