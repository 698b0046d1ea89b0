"""A training run saved and resumed in one call: adapters, optimizer, scheduler, random numbers. No pickle.

Everything goes by the names of parameters, so it does not matter in which order an optimizer holds them. Two files that
are replaced together: `training_state.json` says what there is, `training_state.safetensors` holds the tensors.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft import registry, whole
from peft.checkpoint import files, keys, tensors
from peft.checkpoint.header import corrupt
from peft.checkpoint.report import LoadReport
from peft.errors import LoadError, PeftError, PeftWarning, SaveError
from peft.method import WeightMethod

JSON_NAME = "training_state.json"
TENSORS_NAME = "training_state.safetensors"
_FORMAT = 1


def save_training_state(
    directory: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    step: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Save all that a run needs to go on as if it had never stopped.

    That is: the tensors of all adapters and whatever else trains, the optimizer's state by parameter names, the
    scheduler's state, and the random number generators of Python, NumPy and PyTorch. It is for resuming;
    `model.save_pretrained` writes the adapter that others load. A save that fails or is killed leaves the previous
    state whole.

    With several processes (`torch.distributed`) all of them call this, and rank 0 writes, with the random numbers of
    each. Every process must hold the whole model, as under DDP: states that FSDP or DeepSpeed have sharded are for
    `accelerator.save_state`.

    Args:
        directory: Made if missing.
        model: A `PeftModel`, or any model with adapters.
        optimizer: One over parameters of the model.
        scheduler: Anything with `state_dict()`, such as a learning rate scheduler.
        step: A number to get back.
        extra: More to get back: JSON types and tensors.

    Returns:
        Bytes written, by file name (rank 0).

    Raises:
        SaveError: nothing was written; something is sharded, or has a state that JSON and safetensors can't hold.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model, load_training_state, save_training_state
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> _ = save_training_state("/tmp/peft-doc-state", model, optimizer, step=7)
        >>> load_training_state("/tmp/peft-doc-state", model, optimizer)["step"]
        7
    """
    model = _whole(model, optimizer, SaveError)
    states = _gathered(_random_states())
    if states is None:
        return {}
    packer = _Packer()
    names = _names(model)
    document = {
        "format": _FORMAT,
        "step": step,
        "adapters": list(getattr(model, "peft_config", None) or {}),
        "optimizer": _of_optimizer(packer, optimizer, names),
        "scheduler": None if scheduler is None else packer.pack(scheduler.state_dict(), "scheduler"),
        "methods": packer.pack(_of_methods(model), "methods"),
        "random": packer.pack(states, "random"),
        "extra": packer.pack(dict(extra or {}), "extra"),
    }
    values = {f"model.{name}": tensor.detach() for name, tensor in _kept(model).items()}
    empty = [name for name, tensor in {**values, **packer.tensors}.items() if not tensor.numel()]
    payload = tensors.encode(
        {**values, **packer.tensors}, allow_empty=[n for n in empty if n not in values], checksum=True
    )
    return files.save(directory, {JSON_NAME: json.dumps(document, indent=1) + "\n", TENSORS_NAME: payload})


def load_training_state(
    directory: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None
) -> dict[str, Any]:
    """Go on with a run that `save_training_state` saved.

    Make model, adapters, optimizer and scheduler as at the beginning of the run, then call this. Nothing is changed
    unless everything fits.

    Args:
        directory: Where the state was saved.
        model: With adapters of the same names and configs.
        optimizer: Of the same type, over the same parameters in the same groups; their order does not matter.
        scheduler: Likewise; None ignores the saved one.

    Returns:
        `step`, `extra` and `adapters`, as they were saved.

    Raises:
        LoadError: the parameters differ; the message lists which. Or something is sharded.
    """
    model = _whole(model, optimizer, LoadError)
    where = files.locate(directory, JSON_NAME)
    with files.reading(Path(directory)):
        document = files.read_config(where)
        stored = tensors.read(files.locate(directory, TENSORS_NAME))
    if document.get("format") != _FORMAT:
        raise corrupt(where, f"it has format {document.get('format')!r}, and {_FORMAT} is read")
    if lost := {"step", "adapters", "optimizer", "scheduler", "methods", "random", "extra"} - document.keys():
        raise corrupt(where, f"it lacks {sorted(lost)}")
    unpacker = _Unpacker(stored, where)
    kept = _kept(model)
    found = {name.removeprefix("model."): t for name, t in stored.items() if name.startswith("model.")}
    LoadReport.between(
        {n: t.shape for n, t in kept.items()}, {n: t.shape for n, t in found.items()}, str(where)
    ).raise_if_bad()
    wanted = _optimizer_state(unpacker, document["optimizer"], optimizer, _names(model), where)
    if scheduler is not None and document["scheduler"] is None:
        raise LoadError(f"{str(where)!r} holds no scheduler, and one is to be resumed; pass scheduler=None.")
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(found[name])
    optimizer.load_state_dict(wanted)
    if scheduler is not None:
        scheduler.load_state_dict(unpacker.unpack(document["scheduler"]))
    _set_methods(model, unpacker.unpack(document["methods"]))
    _set_random_states(unpacker.unpack(document["random"]), where)
    return {
        "step": document["step"],
        "extra": unpacker.unpack(document["extra"]),
        "adapters": document["adapters"],
    }


# ---------------------------------------------------------------- processes


def _whole(model: nn.Module, optimizer: torch.optim.Optimizer, error: type[PeftError]) -> nn.Module:
    """The model without what DDP wraps around it. Raises if this process does not hold all of each tensor."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for tensor in (*model.parameters(), *held):
        if hasattr(tensor, "ds_id") or hasattr(tensor, "_is_flat_param") or hasattr(tensor, "placements"):
            raise error(
                "A training state is of whole tensors, and here FSDP, DeepSpeed ZeRO or tensor parallelism has sharded "
                "them. Use accelerate's accelerator.save_state(directory) and load_state(directory)."
            )
    return model


def _processes() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _gathered(states: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The random states of all processes, on rank 0; None elsewhere."""
    rank, count = _processes()
    if count == 1:
        return [states]
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, states)
    return found if rank == 0 else None


# ---------------------------------------------------------------- the model


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): keys.strip(name) for name, p in model.named_parameters()}


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training may have changed: what trains, and the tensors of all adapters."""
    parameters = {keys.strip(name): p for name, p in model.named_parameters()}
    every = parameters | {keys.strip(name): b for name, b in model.named_buffers()}
    adapters = list(getattr(model, "peft_config", None) or {})
    names = {entry.memory for adapter in adapters for entry in keys.entries(model, adapter)}
    names |= {name for name, p in parameters.items() if p.requires_grad}
    names |= {name for name in parameters if name.startswith("prompt_encoder.")}
    owned = {id(t) for layer in whole.layers(model) for adapter in adapters for t in _adapter_tensors(layer, adapter)}
    return {name: t for name, t in every.items() if name in names or id(t) in owned}


def _adapter_tensors(layer: Any, adapter: str) -> list[Tensor]:
    if adapter not in layer.available_adapters:
        return []
    found: list[Tensor] = []
    for _, value in layer.slots(adapter):
        found += value.parameters() if isinstance(value, nn.Module) else [value]
    for bank in layer._banks.values():
        if adapter in bank:
            held = bank[adapter]
            found += held.parameters() if isinstance(held, nn.Module) else [held]
    return found


def _of_methods(model: nn.Module) -> dict[str, Any]:
    tuner, found = getattr(model, "base_model", model), {}
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        method = registry.method(config.peft_type.value)
        if isinstance(method, WeightMethod) and (state := method.run_state(tuner, name)):
            found[name] = state
    return found


def _set_methods(model: nn.Module, states: Mapping[str, Any]) -> None:
    tuner = getattr(model, "base_model", model)
    for name, state in states.items():
        registry.method(model.peft_config[name].peft_type.value).load_run_state(tuner, name, state)  # type: ignore[index,union-attr]


# ---------------------------------------------------------------- the optimizer


def _of_optimizer(packer: _Packer, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    state = optimizer.state_dict()
    groups, by_index = [], {}
    for group, plain in zip(optimizer.param_groups, state["param_groups"], strict=True):
        unknown = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if unknown:
            raise SaveError(
                f"The training state was not saved: the optimizer holds a parameter of shape {unknown[0]} that is not "
                "the model's. Was an adapter deleted or the model wrapped after the optimizer was made?"
            )
        members = [names[id(p)] for p in group["params"]]
        by_index.update(zip(plain["params"], members, strict=True))
        options = {key: value for key, value in plain.items() if key not in ("params", "param_names")}
        groups.append({"params": members, "options": packer.pack(options, f"group.{len(groups)}")})
    held = {by_index[i]: packer.pack(value, f"optimizer.{by_index[i]}") for i, value in state["state"].items()}
    return {"type": type(optimizer).__name__, "groups": groups, "state": held}


def _optimizer_state(
    unpacker: _Unpacker,
    document: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    where: Path,
) -> dict[str, Any]:
    """The saved state as `optimizer.load_state_dict` takes it, after checking that it is one of this optimizer."""
    if document["type"] != type(optimizer).__name__:
        raise LoadError(f"{str(where)!r} holds the state of {document['type']}, not of {type(optimizer).__name__}.")
    shapes = {names.get(id(p), "?"): tuple(p.shape) for group in optimizer.param_groups for p in group["params"]}
    saved = [name for group in document["groups"] for name in group["params"]]
    report = LoadReport.between(shapes, {name: shapes.get(name, ()) for name in saved}, str(where))
    if not report.ok:
        raise LoadError(
            "The optimizer does not hold the parameters that it held when the state was saved. Are the same adapters "
            f"active, and were they loaded with is_trainable=True?\n{report}"
        )
    by_members = {frozenset(group["params"]): group for group in document["groups"]}
    plain = optimizer.state_dict()
    groups, state = [], {}
    for group, old in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        members = [names[id(p)] for p in group["params"]]
        match = by_members.get(frozenset(members))
        if match is None:
            raise LoadError(
                f"The optimizer's groups are divided otherwise than in {str(where)!r}: there is no saved group of "
                f"{members[:3]}{' …' if len(members) > 3 else ''}."
            )
        groups.append({**old, **unpacker.unpack(match["options"])})
        for index, name in zip(old["params"], members, strict=True):
            if name in document["state"]:
                state[index] = unpacker.unpack(document["state"][name])
    return {"state": state, "param_groups": groups}


# ---------------------------------------------------------------- random numbers


def _random_states() -> dict[str, Any]:
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        import numpy

        state: Any = numpy.random.get_state(legacy=True)
        name, key, *rest = state
        found["numpy"] = [name, torch.from_numpy(key.astype("int64")), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def _set_random_states(every: list[dict[str, Any]], where: Path) -> None:
    rank, count = _processes()
    if len(every) != count:
        warnings.warn(
            f"{str(where)!r} was saved by {len(every)} processes, and {count} go on: random numbers (dropout, "
            "shuffling) are not those of the run that never stopped.",
            PeftWarning,
            stacklevel=3,
        )
        return
    states = every[rank]
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy

        name, key, *rest = states["numpy"]
        numpy.random.set_state((name, key.numpy().astype("uint32"), *rest))
    if "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


# ---------------------------------------------------------------- plain data to JSON and safetensors, and back


class _Packer:
    """Turns nested plain data into JSON; tensors are taken out and put into `tensors`."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def pack(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if value - value == 0 else {"$float": str(value)}
        if isinstance(value, Tensor):
            self.tensors[path] = value.detach()
            return {"$tensor": path}
        if isinstance(value, (list, tuple)):
            items = [self.pack(item, f"{path}.{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, Mapping):
            kind = "$counter" if isinstance(value, Counter) else "$items"
            pairs = [
                [self.pack(k, f"{path}.key"), self.pack(v, f"{path}.{i}")] for i, (k, v) in enumerate(value.items())
            ]
            return {kind: pairs}
        if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy scalar
            return self.pack(value.item(), path)
        raise SaveError(
            f"The training state was not saved: {path!r} is a {type(value).__name__}. Numbers, strings, tensors, "
            "lists, tuples and dicts can be saved."
        )


class _Unpacker:
    """The inverse of `_Packer.pack`."""

    def __init__(self, stored: Mapping[str, Tensor], where: Path) -> None:
        self.stored = stored
        self.where = where

    def unpack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        (kind, held), *rest = value.items() or [("", None)]
        read = _READERS.get(kind)
        if rest or read is None or (kind == "$tensor" and held not in self.stored):
            raise corrupt(self.where, f"{str(value)[:80]} is no value of a training state")
        try:
            return read(self, held)
        except (TypeError, ValueError) as error:
            raise corrupt(self.where, f"{str(value)[:80]} is no value of a training state ({error})") from None


_READERS: dict[str, Callable[[_Unpacker, Any], Any]] = {
    # Cloned: the stored tensor is mapped from a file that the next save replaces.
    "$tensor": lambda unpacker, name: unpacker.stored[name].clone(),
    "$tuple": lambda unpacker, items: tuple(unpacker.unpack(items)),
    "$float": lambda unpacker, text: float(text),
    "$counter": lambda unpacker, pairs: Counter(dict(unpacker.unpack(pairs))),
    "$items": lambda unpacker, pairs: dict(unpacker.unpack(pairs)),
}
