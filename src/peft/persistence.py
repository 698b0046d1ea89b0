"""Adapters of a `PeftModel` in files: what is written, what is read, and whether it belongs here."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from peft import card, whole
from peft.checkpoint import files, fingerprint, keys, layouts, state, tensors
from peft.checkpoint.report import LoadReport
from peft.config import CONFIG_NAME, PeftConfig
from peft.errors import BaseMismatchError

if TYPE_CHECKING:
    from peft.model import PeftModel

_log = logging.getLogger(__name__)

_PROMPTED_PREFIX = "base_model."
"""Before the names of the base model in files of prompts; files of weight methods have one wrapper more."""


def save_one(
    model: PeftModel,
    name: str,
    folder: Path,
    given: Mapping[str, Tensor] | None,
    safe: bool,
    embeddings: str | bool,
    is_main_process: bool,
    original: bool = False,
) -> None:
    """Write one adapter: into the folder if it is named "default", else into one of its name."""
    config = model.peft_config[name]
    values = state.get_peft_model_state_dict(
        model, state_dict=given, adapter_name=name, save_embedding_layers=embeddings
    )
    if not is_main_process:
        return
    metadata = {}
    if not config.is_prompt_learning and (sketch := state.base_sketch(model, name)) is not None:
        metadata[fingerprint.METADATA_KEY] = fingerprint.encode(sketch)
    if original and not config.is_prompt_learning:
        config, values = layouts.to_original(model.get_base_model(), config, values)
    # Rows without columns are an adapter that has nothing to train (OFT with blocks of one); shards have no rows.
    empty = {key for key, tensor in values.items() if tensor.dim() > 1 and tensor.shape[0]}
    payload = tensors.encode(values, metadata, pickled=not safe, allow_empty=empty, checksum=True)
    weights = files.SAFETENSORS_NAME if safe else files.BIN_NAME
    target = folder if name == "default" else folder / name
    _log.info("Saving adapter %r: %d tensors, %s bytes, to %s", name, len(values), f"{payload.nbytes:,}", target)
    files.save(target, {CONFIG_NAME: _file_config(model.get_base_model(), config).to_json_string(), weights: payload})


def _file_config(base: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config as the file holds it: frozen, and with the base model's name."""
    written = copy.copy(config)
    written.inference_mode = True
    if written.base_model_name_or_path is None:
        written.base_model_name_or_path = name_of(base)
    if written.task_type is None:
        cls = type(base)
        written.auto_mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return written


def card_text(model: PeftModel, folder: Path) -> str:
    """The README of a folder of adapters."""
    config = next(iter(model.peft_config.values()))
    base = config.base_model_name_or_path or name_of(model.get_base_model())
    task = card.PIPELINES.get(str(getattr(config.task_type, "value", config.task_type)))
    return card.text(folder, dict(model.peft_config), base, task)


def load(
    model: PeftModel,
    model_id: str | os.PathLike,
    adapter_name: str,
    is_trainable: bool,
    device: str | None,
    autocast: bool,
    key_mapping: Mapping[str, str] | None,
    **kwargs: Any,
) -> LoadReport:
    """`PeftModel.load_adapter`."""
    strict, check = kwargs.pop("strict", True), kwargs.pop("check_base", True)
    mismatched, stated = kwargs.pop("ignore_mismatched_sizes", False), kwargs.pop("fused", None)
    config = kwargs.pop("_config", None)
    options = {k: v for k, v in kwargs.items() if k in (*files.HUB_OPTIONS, "subfolder")}
    fresh = adapter_name not in model._names()
    path = files.locate(model_id, **options)
    with files.reading(path.parent):
        values = state.rename(tensors.read(path), key_mapping)
        if fresh and config is None:
            config = PeftConfig.from_pretrained(model_id, **options)
            config.inference_mode = not is_trainable
        if fresh:
            state.check_sizes(config, model.get_base_model(), values, str(path))
        if fresh and not config.is_prompt_learning:
            config, values = layouts.fit(model.get_base_model(), config, values, stated, strict)
    if fresh:
        model._add_loaded(adapter_name, config, autocast)
    config = model.peft_config[adapter_name]
    try:
        if check:
            _check_base(model, path, adapter_name)
        if config.is_prompt_learning:
            report = model.load_prompt_state_dict(adapter_name, values, strict=strict)
        else:
            report = state.load_tensors(model, config, adapter_name, values, mismatched, strict, str(path), device)
    except BaseException:
        if fresh:
            model.delete_adapter(adapter_name)
        raise
    if not is_trainable:
        model.set_requires_grad(adapter_name, False)
        if any(m.training for _, m in whole.walk(model)):  # what was added is as the layers around it are
            model.eval()
    return report


def _check_base(model: PeftModel, path: Path, adapter_name: str) -> None:
    """Raise if the file says that it was trained on other base weights."""
    if path.suffix != ".safetensors" or model.peft_config[adapter_name].is_prompt_learning:
        return
    text = tensors.header(path).metadata.get(fingerprint.METADATA_KEY)
    saved = fingerprint.decode(text, str(path)) if text else None
    current = state.base_sketch(model, adapter_name, fingerprint.names(saved)) if saved else None
    if saved is None or current is None:
        return
    saved = state.sketch_here(model, adapter_name, saved, current)
    # What is not here at all, the tensors of the adapter will say better.
    found = [d for d in fingerprint.compare(saved, current) if not d.harmless and d.what != "missing"]
    if found:
        raise BaseMismatchError(
            f"The adapter in {str(path)!r} was trained on another base model: {fingerprint.explain(found)} Load "
            f"the base model that its config names ({model.peft_config[adapter_name].base_model_name_or_path!r}), "
            "or pass check_base=False to load it all the same."
        )


def prompt_tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """`PeftModel.prompt_state_dict`."""
    result = dict(model.prompt_encoder[adapter_name].saved_tensors())
    base, prefix = model.get_base_model(), _PROMPTED_PREFIX
    source = {k: v.detach() for k, v in base.state_dict(keep_vars=True).items()}
    for entry in keys.entries(base, adapter_name):
        result[prefix + entry.disk] = source[entry.memory]
    return result


def load_prompt(
    model: PeftModel, adapter_name: str, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadReport:
    """`PeftModel.load_prompt_state_dict`."""
    base = model.get_base_model()
    inside = {k: v for k, v in state_dict.items() if k.startswith(_PROMPTED_PREFIX)}
    encoder = model.prompt_encoder[adapter_name]
    encoder.load_tensors({k: v for k, v in state_dict.items() if k not in inside})
    report = LoadReport()
    if inside or keys.entries(base, adapter_name):
        config = model._peft_config[adapter_name]
        within = {k.removeprefix(_PROMPTED_PREFIX): v for k, v in inside.items()}
        found = state.load_tensors(base, cast(Any, _NoBias(config)), adapter_name, within, strict=strict)
        report.missing_keys += found.missing_keys
        report.unexpected_keys += found.unexpected_keys
    return report


class _NoBias:
    """A prompt config as `state.load_tensors` sees it: nothing of the base model's biases is in the file."""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config
        self.bias = "none"
        self.inference_mode = config.inference_mode


def name_of(model: nn.Module) -> str | None:
    """The folder or repository that a base model came from, if it knows."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
