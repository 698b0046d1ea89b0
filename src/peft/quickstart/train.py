"""The model, the adapter and the training loop: plain Transformers and PyTorch, plus two lines of peft."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from peft import LoraConfig, TaskType, get_peft_model
from peft.quickstart.data import LABELS, Message

Encode = Callable[[list[str]], dict[str, Tensor]]
"""Texts to the model's inputs: `input_ids` and `attention_mask`, both (texts, longest text)."""

HEAD = "classifier"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The head alone and LoRA differ in the learning rate only, each at its best on "dev".

    Attributes:
        lr: Peak learning rate of AdamW; it rises for a tenth of the steps, then falls linearly to 0.
        epochs: Passes over the 50 messages.
        batch_size: Messages per step.
    """

    lr: float
    epochs: int = 20
    batch_size: int = 10


@dataclass
class History:
    """What happened: losses per step, test accuracy over epochs, and seconds spent on training steps alone."""

    losses: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


def load_tokenizer(encoder: str) -> Encode:
    """The encoder's tokeniser; texts are cut after 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    return lambda texts: dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))


def head_alone(encoder: str) -> nn.Module:
    """The frozen encoder with a new linear classifier on top, which trains."""
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)}
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(HEAD)
    return model


def with_lora(encoder: str) -> nn.Module:
    """The same model with LoRA (arXiv 2106.09685) on all linear layers. `SEQ_CLS` trains the classifier, too."""
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
    return get_peft_model(head_alone(encoder), config)


@dataclass(frozen=True)
class Contestant:
    """A way to make a model for the task, and how to train it."""

    name: str
    build: Callable[[str], nn.Module]
    recipe: Recipe


HEAD_ALONE = Contestant("head alone", head_alone, Recipe(lr=1e-2))
LORA = Contestant("LoRA", with_lora, Recipe(lr=5e-4))


def train(
    model: nn.Module, encode: Encode, data: list[Message], recipe: Recipe, after_epoch: Callable[[int, History], None]
) -> History:
    """Train what is not frozen in `model`, in place.

    Args:
        model: Gives `.logits` of shape (messages, labels).
        encode: The tokeniser.
        data: What to learn from.
        recipe: For how long, and how fast.
        after_epoch: Called with the number of the epoch and what happened so far.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps_per_epoch = -(-len(data) // recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    history = History()
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        started = time.perf_counter()
        for inputs, labels in batches(data, encode, recipe.batch_size):
            loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.losses.append(loss.item())
        history.seconds += time.perf_counter() - started
        after_epoch(epoch, history)
    return history


def batches(data: list[Message], encode: Encode, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """One shuffled pass over the data: inputs and labels, shape (size,), of one batch after another."""
    for chosen in torch.randperm(len(data)).split(size):
        some = [data[i] for i in chosen.tolist()]
        yield encode([m.text for m in some]), torch.tensor([m.label for m in some])


@torch.no_grad()
def logits_of(model: nn.Module, encode: Encode, texts: list[str], batch_size: int = 32) -> Tensor:
    """Logits (texts, labels). Texts of like length share a batch, so that little of it is padding."""
    model.eval()
    order = torch.tensor(sorted(range(len(texts)), key=lambda i: len(texts[i])))
    out = torch.empty(len(texts), len(LABELS))
    for chosen in order.split(batch_size):
        out[chosen] = model(**encode([texts[i] for i in chosen.tolist()])).logits.float()
    return out
