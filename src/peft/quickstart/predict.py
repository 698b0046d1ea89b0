"""A process of its own that knows only where the adapter lies: `python -m peft.quickstart.predict DIR < texts.json`.

Reads a JSON list of texts and writes the list of their logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor

from peft import AutoPeftModelForSequenceClassification
from peft.quickstart.data import LABELS
from peft.quickstart.train import load_tokenizer, logits_of


def predict(adapter: Path, texts: list[str]) -> Tensor:
    """Logits (texts, labels) of the base model with a saved adapter. The adapter's config names the base."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(adapter), num_labels=len(LABELS))
    encode = load_tokenizer(model.peft_config["default"].base_model_name_or_path)
    return logits_of(model, encode, texts)


if __name__ == "__main__":
    json.dump(predict(Path(sys.argv[1]), json.load(sys.stdin)).tolist(), sys.stdout)
