"""The model card (README.md) of a saved adapter. Written from what is known; what people wrote in it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.version import __version__

_LIBRARY = "peft"


def text(folder: Path, configs: dict[str, Any], base_model: str | None, task: str | None) -> str:
    """The card of the adapters in `folder`, based on the one that is there."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    try:
        card = ModelCard(path.read_text(encoding="utf-8")) if path.exists() else ModelCard(_fresh(configs, base_model))
    except Exception:  # a card that nobody can parse is kept as text below a new head
        card = ModelCard(_fresh(configs, base_model) + "\n" + path.read_text(encoding="utf-8", errors="replace"))
    data: Any = card.data
    data.library_name = _LIBRARY
    if base_model:
        data.base_model = base_model
    if task and not data.get("pipeline_tag"):
        data.pipeline_tag = task
    kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)).lower() for c in configs.values()})
    tags = list(data.get("tags") or [])
    data.tags = [
        *tags,
        *(t for t in (*kinds, f"base_model:adapter:{base_model}" if base_model else "") if t and t not in tags),
    ]
    body = card.text.rstrip()
    version = f"- PEFT {__version__}"
    if version not in body:
        body += f"\n\n### Framework versions\n\n{version}" if "### Framework versions" not in body else f"\n{version}"
    card.text = body + "\n"
    return str(card)


def _fresh(configs: dict[str, Any], base_model: str | None) -> str:
    methods = ", ".join(sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()}))
    about = f" of `{base_model}`" if base_model else ""
    return (
        "---\nlibrary_name: peft\n---\n\n# Adapter\n\n"
        f"A {methods} adapter{about}. Load it on the base model:\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")\n```\n'
    )


PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": None,
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The hub's pipeline tag of a task."""
