"""Tiny models with fixed weights, the same in every process: `build("llama")`, `example("llama")`.

Each name gives the same weights and inputs whenever and wherever it is built, so that two libraries in two processes
can be compared on them. None is larger than a few hundred kilobytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

BATCH, TOKENS, VOCAB = 2, 8, 128


class MLP(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, x):
        return self.lin1(self.relu(self.lin0(x)))


class ConvLin(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv2d = nn.Conv2d(5, 10, 3)
        self.lin0 = nn.Linear(640, 2)

    def forward(self, x):
        return self.lin0(torch.relu(self.conv2d(x)).flatten(1))


class EmbConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(1, 5)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, ids):
        return self.lin0(torch.relu(self.conv1d(self.emb(ids))).flatten(1))


class ScaledEmbedding(nn.Embedding):
    """An embedding with a factor on its output, as in Gemma."""

    def __init__(self, num: int, dim: int, embed_scale: float):
        super().__init__(num, dim)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Single(nn.Module):
    """One layer to adapt, `tgt`, and a linear head on what it returns."""

    def __init__(self, tgt: nn.Module, channels: int):
        super().__init__()
        self.tgt = tgt
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        return self.head(self.tgt(x))


class SingleConv(Single):
    """`Single` for channels-first layers: the head sees the mean over positions."""

    def forward(self, x):
        return self.head(self.tgt(x).flatten(2).mean(-1))


class SingleAttention(Single):
    """`Single` for multi-head self-attention."""

    def forward(self, x):
        return self.head(self.tgt(x, x, x)[0])


class Experts(nn.Module):
    """Two stacks of expert matrices as bare parameters, `(experts, out, in)` as most models have them."""

    def __init__(self, experts: int = 3, width: int = 6, inner: int = 8):
        super().__init__()
        self.w1 = nn.Parameter(0.2 * torch.randn(experts, inner, width))
        self.w2 = nn.Parameter(0.2 * torch.randn(experts, width, inner))

    def forward(self, x):
        hidden = torch.relu(torch.einsum("bi,eoi->beo", x, self.w1))
        return torch.einsum("beo,eio->bi", hidden, self.w2)


class MixtureOfExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 6)
        self.experts = Experts()
        self.lin1 = nn.Linear(6, 2)

    def forward(self, x):
        return self.lin1(self.experts(self.lin0(x)))


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            **changes,
        }
    )


def gpt2_config(**changes: Any) -> GPT2Config:
    return GPT2Config(
        **{
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCAB,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )


def t5_config(**changes: Any) -> T5Config:
    return T5Config(
        **{
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "decoder_start_token_id": 0,
            **changes,
        }
    )


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "num_labels": 3,
            **changes,
        }
    )


def mixtral_config(**changes: Any) -> MixtralConfig:
    return MixtralConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 3,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            **changes,
        }
    )


def _conv(kind: type[nn.Module], kernel: int = 3, **options: Any) -> Callable[[], nn.Module]:
    return lambda: SingleConv(kind(4, 8, kernel, **{"padding": kernel // 2, **options}), 8)


def _bitsandbytes(bits: int) -> nn.Module:
    import bitsandbytes as bnb

    plain, options = nn.Linear(64, 64), {"has_fp16_weights": False} if bits == 8 else {"quant_type": "nf4"}
    layer = (bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit)(64, 64, **options)
    layer.load_state_dict(plain.state_dict())
    model = Single(layer.to("cpu"), 64)
    setattr(model, f"is_loaded_in_{bits}bit", True)  # what transformers' loaders set
    return model


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "mlp_no_bias": lambda: MLP(bias=False),
    "convlin": ConvLin,
    "embconv1d": EmbConv1D,
    "experts": MixtureOfExperts,
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "llama_tied": lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)),
    "llama_seqcls": lambda: LlamaForSequenceClassification(llama_config(num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config()),
    "t5": lambda: T5ForConditionalGeneration(t5_config()),
    "bert": lambda: BertForSequenceClassification(bert_config()),
    "bert_tokens": lambda: BertForTokenClassification(bert_config()),
    "bert_qa": lambda: BertForQuestionAnswering(bert_config(num_labels=2)),
    "bert_features": lambda: BertModel(bert_config()),
    "mixtral": lambda: MixtralForCausalLM(mixtral_config()),
    "L.Linear": lambda: Single(nn.Linear(16, 16), 16),
    "L.Linear_wide": lambda: Single(nn.Linear(16, 24, bias=False), 24),
    "L.Linear_tall": lambda: Single(nn.Linear(16, 8), 8),
    "L.Conv1D": lambda: Single(Conv1D(16, 16), 16),
    "L.Conv1D_wide": lambda: Single(Conv1D(24, 16), 24),
    "L.Conv1d": _conv(nn.Conv1d),
    "L.Conv1d_grouped": _conv(nn.Conv1d, groups=2),
    "L.Conv2d": _conv(nn.Conv2d),
    "L.Conv2d_1x1": _conv(nn.Conv2d, 1),
    "L.Conv2d_strided": _conv(nn.Conv2d, stride=2),
    "L.Conv2d_grouped": _conv(nn.Conv2d, groups=2),
    "L.Conv2d_depthwise": _conv(nn.Conv2d, groups=4),
    "L.Conv2d_dilated": _conv(nn.Conv2d, dilation=2, padding=2),
    "L.Conv2d_no_bias": _conv(nn.Conv2d, bias=False),
    "L.Conv3d": _conv(nn.Conv3d),
    "L.Embedding": lambda: Single(nn.Embedding(32, 16), 16),
    "L.Embedding_scaled": lambda: Single(ScaledEmbedding(32, 16, 4.0), 16),
    "L.MultiheadAttention": lambda: SingleAttention(nn.MultiheadAttention(16, 2), 16),
    "L.MultiheadAttention_batch_first": lambda: SingleAttention(nn.MultiheadAttention(16, 2, batch_first=True), 16),
    "L.LayerNorm": lambda: Single(nn.LayerNorm(16), 16),
    "L.BatchNorm1d": lambda: Single(nn.BatchNorm1d(16), 16),
}

NAMES = tuple(_BUILDERS)

_BUILDERS |= {"L.bnb8": lambda: _bitsandbytes(8), "L.bnb4": lambda: _bitsandbytes(4)}


def build(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model of that name in eval mode, always with the same weights; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        with torch.device(device):
            model = _BUILDERS[name]()
    return model.to(dtype).eval()


def example(name: str, dtype: torch.dtype = torch.float32, batch: int = BATCH, seed: int = 0) -> dict[str, Any]:
    """Keyword inputs that the model of that name accepts, with `x` as the only key for the plain modules."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    def tokens(length: int, high: int) -> torch.Tensor:
        return torch.randint(3, high, (batch, length), generator=generator)

    plain = {
        "mlp": lambda: numbers(10),
        "mlp_no_bias": lambda: numbers(10),
        "experts": lambda: numbers(10),
        "convlin": lambda: numbers(5, 10, 10),
        "embconv1d": lambda: tokens(10, 100),
    }
    if name in plain:
        return {"x": plain[name]()}
    if name.startswith("L."):
        kind = name[2:].split("_")[0]
        space = {
            "Conv1d": (4, 6),
            "Conv2d": (4, 6, 6),
            "Conv3d": (4, 3, 3, 3),
            "BatchNorm1d": (16,),
            "bnb8": (5, 64),
            "bnb4": (5, 64),
        }
        if kind == "Embedding":
            return {"x": tokens(TOKENS, 32)}
        return {"x": numbers(*space.get(kind, (5, 16)))}
    ids = tokens(TOKENS, VOCAB)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": tokens(5, VOCAB)} if name == "t5" else inputs


def run(model: nn.Module, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    """The model's main output tensor on `inputs` (`more` adds to them or replaces some), without gradients."""
    with torch.no_grad():
        return main_output(model(inputs["x"], **more) if "x" in inputs else model(**{**inputs, **more}))


def main_output(result: Any) -> torch.Tensor:
    """Logits, start logits, hidden states or the tensor itself, whichever the model returned."""
    if isinstance(result, torch.Tensor):
        return result
    for field in ("logits", "start_logits", "last_hidden_state"):
        if getattr(result, field, None) is not None:
            return getattr(result, field)
    raise TypeError(f"no main output in {type(result).__name__}")
