"""Folders that answer to the hub names in the documents, once the working directory is the one that holds them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2LMHeadModel, MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast
from transformers import T5ForConditionalGeneration as T5

from tests import models


def tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of `texts`, one token each."""
    pieces = [word for text in texts for word, _ in Whitespace().pre_tokenize_str(text)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *pieces]))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def gpt2(root: Path, *texts: str) -> None:
    """`gpt2`, narrow and shallow, with the vocabulary size of the real one."""
    model = GPT2LMHeadModel(models.gpt2_config(n_embd=16, n_head=2, vocab_size=50257))
    _put(root / "gpt2", model, tokenizer(*texts))


def mt0(root: Path, *texts: str) -> None:
    """`bigscience/mt0-large`, which is an mT5, in two narrow layers."""
    sizes = models.t5_config(feed_forward_proj="gated-gelu").to_diff_dict()
    sizes.pop("model_type")
    _put(root / "bigscience/mt0-large", MT5ForConditionalGeneration(MT5Config(**sizes)), tokenizer(*texts))


def t0(root: Path, *texts: str) -> None:
    """`bigscience/T0_3B`, which is a T5, in two narrow layers."""
    _put(root / "bigscience/T0_3B", T5(models.t5_config()), tokenizer(*texts))


def _put(place: Path, model, words: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(place)
    words.save_pretrained(place)
