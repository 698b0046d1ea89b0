"""What "the same" means between two libraries: tensors, files, descriptions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.reference.actions import Case
from tests.reference.sides import Ours, Pair, Reference

#: Fields of adapter_config.json that say who wrote it.
AUTHORSHIP = {"peft_version"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the largest value."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)).item()


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    distances = {key: distance(got[key], expected[key]) for key in expected}
    assert max(distances.values()) <= tolerance, f"relative differences {distances}"


def tensors_in(directory: Path) -> dict[str, tuple[list[int], str]]:
    """Key -> (shape, dtype) of the weights file in `directory`."""
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}


def metadata_in(directory: Path) -> dict[str, str]:
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        return file.metadata() or {}


def config_in(directory: Path) -> dict[str, Any]:
    """The config file without authorship; lists that come from sets are sorted."""
    loaded = json.loads((directory / CONFIG).read_text())
    unordered = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters")
    plain = {k: sorted(set(v)) if k in unordered and isinstance(v, list) else v for k, v in loaded.items()}
    return {k: v for k, v in plain.items() if k not in AUTHORSHIP}


def without_placeholders(entries: dict[str, Any]) -> dict[str, Any]:
    """State entries, less the zeros that the reference keeps for supports of GLoRA that are not there."""
    return {key: entry for key, entry in entries.items() if not ("glora_" in key and ".zeros" in key)}


def without_networks(entries: dict[str, Any]) -> dict[str, Any]:
    """State entries, less the weights of prompt encoders that only we keep, to go on training."""
    return {key: entry for key, entry in entries.items() if not key.startswith("prompt_encoder.")}


def check_birth(pair: Pair, case: Case, twice: Iterable[str] = (), start: bool = True) -> None:
    """Freshly adapted, both libraries show the same class, trainable names, shapes, dtypes, scaling, state keys.

    With `start`, both or neither are the base model at the start.
    """
    ours, reference = pair.birth(case)
    for key in twice:
        del reference["state_dict"][key]
    ours["state_dict"] = without_networks(ours["state_dict"])
    reference["state_dict"] = without_placeholders(reference["state_dict"])
    for aspect in ("class", "trainable", "scaling", "state_dict", "parameters"):
        assert ours[aspect] == reference[aspect], aspect
    moves = {side: (report["change"] or 0) > 1e-5 for side, report in (("ours", ours), ("reference", reference))}
    assert not start or moves["ours"] == moves["reference"], "only one of the two is the identity at the start"


def check_files(pair: Pair, case: Case, ignore: Iterable[str] = (), twice: Iterable[str] = ()) -> None:
    """Both libraries write the same files, keys, shapes, dtypes and config fields.

    Args:
        pair: The two libraries.
        case: The adapter.
        ignore: Config fields that may differ.
        twice: Keys that only the reference has, for tensors that it writes under another key as well.
    """
    ours, _ = pair.written(pair.ours, case)
    reference, _ = pair.written(pair.reference, case)
    assert {p.name for p in ours.iterdir()} == {p.name for p in reference.iterdir()}
    expected = {k: form for k, form in without_placeholders(tensors_in(reference)).items() if k not in set(twice)}
    assert without_networks(tensors_in(ours)) == expected
    assert metadata_in(reference).items() <= metadata_in(ours).items()
    our_config, their_config = config_in(ours), config_in(reference)
    for field in ignore:
        del our_config[field], their_config[field]
    assert our_config == their_config


def check_transfer(
    pair: Pair,
    case: Case,
    writer: Ours | Reference,
    reader: Ours | Reference,
    tolerance: float,
    outputs: Iterable[str] = ("output", "merged"),
) -> None:
    """What one library saves, another loads: the same outputs, before and after merging."""
    place, expected = pair.written(writer, case)
    got = reader.ask("read", case, str(place))
    wanted = set(outputs) & set(expected)
    assert_close({k: got[k] for k in wanted}, {k: expected[k] for k in wanted}, tolerance)
