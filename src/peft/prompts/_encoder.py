"""What every prompt encoder is: a module that yields virtual tokens, or keys and values for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft import registry
from peft.config import PromptLearningConfig
from peft.errors import LoadError

EMBEDDINGS_KEY = "prompt_embeddings"
RESUME_PREFIX = "prompt_encoder."


class BasePromptEncoder(nn.Module):
    """Base of the encoders. A subclass names its method and its config, and is registered by being defined.

    What an encoder learns can be more than what it puts before the input: P-tuning and prefix tuning may run a small
    network over a table. The file always holds the result under `prompt_embeddings`, which is all that inference needs;
    the network's own weights lie beside it under `prompt_encoder.*`, so that training can go on from the file.

    Args:
        config: Sizes already filled in (see `build`).
        word_embeddings: Input embedding of the base model, for the encoders that start from real tokens. None leaves
            the start out, when tensors are going to be loaded anyway.
    """

    embedding: nn.Embedding
    frozen: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that never train."""
    needs_word_embeddings: ClassVar[bool] = False
    """Whether the base model's embeddings matter even if the prompt is about to be loaded."""

    def __init_subclass__(cls, name: str | None = None, config: type[PromptLearningConfig] | None = None) -> None:
        super().__init_subclass__()
        if name is not None and config is not None:
            registry.register(name.upper(), config, cls)

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        self.num_virtual_tokens: int = config.num_virtual_tokens

    def requires_grad_(self, requires_grad: bool = True) -> BasePromptEncoder:
        """Let the encoder train, except for what never does."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)
        return self

    @property
    def reparametrised(self) -> bool:
        """Whether a network stands between the parameters and the prompt."""
        return False

    def rows(self) -> Tensor:
        """The prompt as one table, shape (rows, columns): what `prompt_embeddings` holds in files."""
        return self.embedding.weight

    def saved_tensors(self) -> dict[str, Tensor]:
        """Tensors to write, by key."""
        saved = {EMBEDDINGS_KEY: self.rows().detach()}
        if self.reparametrised:
            saved |= {RESUME_PREFIX + name: value.detach() for name, value in self.state_dict().items()}
        return saved

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved_tensors` wrote, here or in HF PEFT.

        An encoder with a network needs the network's weights too; where the file lacks them, the network is dropped
        and training goes on with the table it produced.

        Raises:
            LoadError: a tensor is missing, or has another shape than the prompt of this config.
        """
        resume = {
            key.removeprefix(RESUME_PREFIX): value for key, value in tensors.items() if key.startswith(RESUME_PREFIX)
        }
        if self.reparametrised and resume:
            check_shapes(resume, self.state_dict(), self)
            self.load_state_dict(resume, assign=_on_meta(self))
            return
        self._load_rows(taken(tensors, EMBEDDINGS_KEY, self))

    def _load_rows(self, rows: Tensor) -> None:
        if self.reparametrised:
            self._drop_network(rows)
        put(self.embedding, "weight", rows)

    def _drop_network(self, rows: Tensor) -> None:
        """Become a plain table of the size of `rows`."""
        raise NotImplementedError


class VirtualTokens(BasePromptEncoder):
    """Base of the encoders whose prompt goes before the input embeddings."""

    before_decoder: bool = False
    """Whether the second half of the table goes before the decoder's input. Encoder-decoder configs always have one, as
    in HF PEFT's files; multitask prompts use it."""

    def tokens(self, task_ids: Tensor | None = None, side: int = 0) -> Tensor:
        """The virtual tokens, shape (1 or batch, num_virtual_tokens, token_dim).

        Args:
            task_ids: Tasks of the samples, shape (batch,), for multitask prompts.
            side: 0 for the input of the model, 1 for that of the decoder of an encoder-decoder.
        """
        return self.rows()[None, self.side(side)]

    def side(self, side: int) -> slice:
        """The rows of one side."""
        return slice(side * self.num_virtual_tokens, (side + 1) * self.num_virtual_tokens)

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the prompt at `indices` (any shape), shape (*indices.shape, token_dim)."""
        return self.rows()[indices]


class KeyValues(BasePromptEncoder):
    """Base of the encoders whose prompt is joined to the keys and values of every attention layer.

    `rows()` has the shape (num_virtual_tokens, num_layers * 2 * token_dim): slot after slot its keys, then its values,
    heads outermost. Layer l reads slot l. In encoder-decoders it reads slot 2 l modulo the number of layers, since HF
    PEFT deals out the slots to self- and cross-attention in turn, and then begins cross-attention without a prefix.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        self.num_layers: int = config.num_layers
        self.token_dim: int = config.token_dim
        self.num_heads: int = config.num_attention_heads
        self.stride: int = config.num_transformer_submodules

    def columns(self, start: int, stop: int) -> Tensor:
        """`rows()[:, start:stop]`, computed from the parameters without the other columns."""
        return self.rows()[:, start:stop]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each of shape (num_heads, num_virtual_tokens, head_dim).

        Starts from the parameters at every call: a layer that is checkpointed then sends its gradients straight to
        them, and does not walk back through a graph that another layer has freed.
        """
        slot, width = index * self.stride % self.num_layers, 2 * self.token_dim
        both = self.columns(slot * width, (slot + 1) * width)
        keys, values = both.view(len(both), 2, self.num_heads, -1).permute(1, 2, 0, 3)
        return keys, values

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Rows of the prompt at `indices` (default: all)."""
        return self.rows() if indices is None else self.rows()[indices]


def taken(tensors: Mapping[str, Tensor], key: str, encoder: nn.Module) -> Tensor:
    """`tensors[key]`, or an error that lists what there is."""
    if key not in tensors:
        raise LoadError(
            f"A {type(encoder).__name__} needs the tensor {key!r}, and the file holds {sorted(tensors)}. "
            "Was it saved from an adapter of another method?"
        )
    return tensors[key]


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Copy `value` into a parameter of the same shape (or become it, on the meta device)."""
    old = getattr(module, name)
    check_shapes({name: value}, {name: old}, module)
    if old.is_meta:
        setattr(module, name, nn.Parameter(value.clone(), requires_grad=old.requires_grad))
    else:
        with torch.no_grad():
            old.copy_(value)


def check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], module: nn.Module) -> None:
    """Raise unless both hold the same names and shapes."""
    for name in sorted(set(found) | set(wanted)):
        if name not in found or name not in wanted:
            where = "the adapter" if name in wanted else "the file"
            raise LoadError(f"{name!r} of {type(module).__name__} stands only in {where}; their configs differ.")
        if found[name].shape != wanted[name].shape:
            raise LoadError(
                f"size mismatch for {name!r} of {type(module).__name__}: the file holds {tuple(found[name].shape)}, "
                f"the adapter {tuple(wanted[name].shape)}. Is num_virtual_tokens the same, and the base model?"
            )


def _on_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())
