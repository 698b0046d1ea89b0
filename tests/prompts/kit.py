"""Tiny random models of many architectures, and models with prompts made of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from peft import PeftConfig, PeftModel, get_peft_model

VOCABULARY, WIDTH, LAYERS, HEADS, TOKENS = 64, 32, 2, 4, 3

_LLAMA = {"intermediate_size": 32, "num_key_value_heads": 2}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "forced_eos_token_id": None,
}
_ALIBI = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
_FALCON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CAUSAL = {
    "llama": ("Llama", _COMMON | _LLAMA),
    "mistral": ("Mistral", _COMMON | _LLAMA | {"sliding_window": 16}),
    "qwen2": ("Qwen2", _COMMON | _LLAMA),
    "gemma": ("Gemma", _COMMON | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen3": ("Qwen3", _COMMON | _LLAMA | {"head_dim": 16}),
    "gemma2": ("Gemma2", _COMMON | _LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}),
    "gemma3": ("Gemma3", _COMMON | _LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}),
    "gpt2": ("GPT2", _GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": ("OPT", _COMMON | {"ffn_dim": 32, "word_embed_proj_dim": WIDTH, "dropout": 0.0}),
    "opt_narrow": ("OPT", _COMMON | {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "biogpt": ("BioGpt", _COMMON | _NO_DROPOUT | {"intermediate_size": 32, "layerdrop": 0.0}),
    "gpt_neox": ("GPTNeoX", _COMMON | {"intermediate_size": 32}),
    "falcon": ("Falcon", _FALCON | {"multi_query": True, "new_decoder_architecture": False, "alibi": False}),
    "falcon_grouped": ("Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_alibi": ("Falcon", _FALCON | {"multi_query": False, "new_decoder_architecture": False, "alibi": True}),
    "bloom": ("Bloom", _ALIBI | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
}
SEQ2SEQ = {"t5": ("T5", _T5), "bart": ("Bart", _BART), "mbart": ("MBart", _BART), "pegasus": ("Pegasus", _BART)}
ENCODERS = {
    "bert": ("Bert", _COMMON | _NO_DROPOUT | {"intermediate_size": 32}),
    "roberta": ("Roberta", _COMMON | _NO_DROPOUT | {"intermediate_size": 32}),
    "electra": ("Electra", _COMMON | _NO_DROPOUT | {"intermediate_size": 32, "embedding_size": 16}),
    "deberta": ("DebertaV2", _COMMON | _NO_DROPOUT | {"intermediate_size": 32, "type_vocab_size": 2}),
}


def make(name: str, head: str = "", **changes) -> nn.Module:
    """A model in eval mode, the same each time. `head` is the end of the class name."""
    table, default = (
        (CAUSAL, "ForCausalLM")
        if name in CAUSAL
        else (SEQ2SEQ, "ForConditionalGeneration")
        if name in SEQ2SEQ
        else (ENCODERS, "Model")
    )
    family, sizes = table[name]
    kind = "Gemma3TextConfig" if family == "Gemma3" else family + "Config"
    config = getattr(transformers, kind)(**(sizes | changes))
    torch.manual_seed(0)
    head = head or ("LMHeadModel" if family == "GPT2" else default)
    return getattr(transformers, family + head)(config).eval()


def adapted(base: nn.Module, **configs: PeftConfig) -> PeftModel:
    """A model with prompt adapters, the first one active, in eval mode."""
    (name, config), *others = configs.items()
    model = get_peft_model(base, config, adapter_name=name)
    for name, config in others:
        model.add_adapter(name, config)
    return model.eval()


def encoder(model: PeftModel) -> nn.Module:
    return model.prompt_encoder[model.active_adapters[0]]


def batch(rows: int = 2, length: int = 6, padded: str | None = "left") -> dict[str, torch.Tensor]:
    """Token ids and their mask; the first row is shorter if padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded == "left":
        mask[0, :2] = 0
    elif padded == "right":
        mask[0, -2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
