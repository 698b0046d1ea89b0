"""CPT, context-aware prompt tuning: few-shot examples as a prompt, refined within small balls (arXiv 2410.17222)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import PromptLearningConfig, TaskType, choice
from peft.errors import ConfigError
from peft.prompts._encoder import VirtualTokens
from peft.prompts.prompt_tuning import embedded


@dataclass
class CPTConfig(PromptLearningConfig):
    """CPT (arXiv 2410.17222): a context of labelled examples whose embeddings may each move a little.

    The types of tokens are counted per example: 1 marks the template before the input, 2 the input, 3 the template
    before the label, 4 the label; the next example goes on with 5 to 8, and so on. Label tokens never move, and all of
    them take part in the loss. Training passes `input_type_mask`, the types of the tokens of `input_ids`; 0 is padding.

    Example:
        >>> from peft import CPTConfig
        >>> CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4]).num_virtual_tokens
        3

    Raises:
        ConfigError: a task other than CAUSAL_LM, or masks of different lengths.
    """

    cpt_token_ids: list[int] | None = field(default=None, metadata={"help": "Token ids of the context."})
    cpt_mask: list[int] | None = field(
        default=None, metadata={"help": "Its attention mask, a note only: all of the context is attended to."}
    )
    cpt_tokens_type_mask: list[int] | None = field(default=None, metadata={"help": "Its token types; None: all 1."})
    opt_weighted_loss_type: Literal["none", "decay"] | None = field(
        default="none", metadata={"help": "'decay' weighs older examples down."}
    )
    opt_loss_decay_factor: float | None = field(
        default=1.0, metadata={"help": "Weight of an example, relative to the one after it, for 'decay'."}
    )
    opt_projection_epsilon: float | None = field(
        default=0.1, metadata={"help": "How far input tokens may move, times sqrt(token_dim / 2048)."}
    )
    opt_projection_format_epsilon: float | None = field(
        default=0.1, metadata={"help": "How far template tokens may move, times sqrt(token_dim / 2048)."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer of the ids; a note only."})

    def __post_init__(self) -> None:
        self.peft_type = "CPT"
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError("CPTConfig only supports task_type='CAUSAL_LM'.")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
            if len(getattr(self, name)) != self.num_virtual_tokens:
                raise ConfigError(
                    f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, but {name} has "
                    f"{len(getattr(self, name))} entries for {self.num_virtual_tokens} tokens."
                )
        choice(self, "opt_weighted_loss_type", ("none", "decay"))


class CPTEmbedding(VirtualTokens, name="cpt", config=CPTConfig):
    """The embeddings of the context (frozen) and how far each has moved (trained, kept inside its ball)."""

    radius: Tensor
    frozen: ClassVar[tuple[str, ...]] = ("embedding.weight",)
    needs_word_embeddings: ClassVar[bool] = True

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        shape = (config.num_virtual_tokens, config.token_dim)
        self.embedding = nn.Embedding(*shape)
        if word_embeddings is not None and not (config.inference_mode or self.embedding.weight.is_meta):
            self.embedding.weight = nn.Parameter(embedded(word_embeddings, torch.tensor(config.cpt_token_ids)))
        self.embedding.weight.requires_grad_(False)
        self.delta_embedding = nn.Embedding(*shape)
        if not self.delta_embedding.weight.is_meta:
            nn.init.zeros_(self.delta_embedding.weight)
        self.inference_mode: bool = config.inference_mode
        self.register_buffer("radius", _radius(config), persistent=False)

    def rows(self) -> Tensor:
        # Projected gradient descent: the parameter itself steps back into its ball, so that the next step starts there.
        delta = self.delta_embedding.weight
        if self.training and delta.requires_grad:
            with torch.no_grad():
                delta.copy_(self._projected(delta))
        moved = delta + (self._projected(delta) - delta).detach()
        return self.embedding.weight + moved * (self.radius > 0)

    def _projected(self, delta: Tensor) -> Tensor:
        norms = delta.norm(dim=-1, keepdim=True)
        return torch.where(norms > self.radius, delta * (self.radius / norms.clamp_min(1e-30)), delta)

    def _load_rows(self, rows: Tensor) -> None:
        if self.inference_mode or self.embedding.weight.is_meta:
            super()._load_rows(rows)
            rows = torch.zeros_like(rows)
        else:
            rows = (rows - self.embedding.weight.to(rows.device)).float()
        weight = self.delta_embedding.weight
        if weight.is_meta:
            self.delta_embedding.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
        else:
            with torch.no_grad():
                weight.copy_(rows)


def _radius(config: Any) -> Tensor:
    """How far each token may move, shape (tokens, 1): 0 for labels."""
    kinds = torch.tensor(config.cpt_tokens_type_mask) % 4
    scale = math.sqrt(config.token_dim / 2048)
    radius = torch.full((len(kinds), 1), config.opt_projection_format_epsilon * scale)
    radius[kinds == 2] = config.opt_projection_epsilon * scale
    radius[kinds == 0] = 0.0
    return radius


def cpt_loss(config: Any, logits: Tensor, labels: Tensor, types: Tensor | None) -> Tensor:
    """Mean cross-entropy of all label tokens, those of the context included.

    Args:
        config: The adapter's `CPTConfig`.
        logits: Shape (batch, context + length, vocabulary).
        labels: Shape (batch, length); -100 is ignored.
        types: Token types of the input, shape (batch, length), counted from 1 for each sample's own example; None takes
            every label as part of one example.
    """
    batch, device = len(labels), labels.device
    context = torch.tensor(config.cpt_token_ids, device=device).expand(batch, -1)
    context_types = torch.tensor(config.cpt_tokens_type_mask, device=device).expand(batch, -1)
    if types is None:
        types = torch.full_like(labels, 4)
    last = context_types.max()
    types = torch.where(types > 0, types.to(device) + last, 0)
    targets = torch.cat([context, labels], dim=1)[:, 1:]
    kinds = torch.cat([context_types, types], dim=1)[:, 1:]
    counted = (kinds > 0) & (kinds % 4 == 0) & (targets != -100)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), torch.where(counted, targets, 0).flatten(), reduction="none"
    ).view_as(targets)
    weights = counted.to(losses.dtype)
    if config.opt_weighted_loss_type == "decay":
        example = kinds // 4
        newest = (example * counted).amax(dim=1, keepdim=True)
        weights = weights * config.opt_loss_decay_factor ** (newest - example).to(losses.dtype)
    return (losses * weights).sum() / counted.sum()
