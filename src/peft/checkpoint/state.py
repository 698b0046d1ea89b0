"""The state of one adapter: out of a model, into a model, and to and from files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft import inject, targets, whole
from peft.checkpoint import files, fingerprint, keys, renames, tensors
from peft.checkpoint.report import LoadReport
from peft.config import PeftConfig
from peft.errors import AdapterNameError, CorruptFileError, LoadError, PeftWarning, StateError, nearest
from peft.layer import AdaptedLayer
from peft.method import method_of

_TOKENS = ".token_adapter.base_layer."
_EMBEDDINGS = ("embed_tokens", "lm_head")


def config_of(model: nn.Module, adapter_name: str) -> Any:
    """The config of an adapter of a model, wrapped or not."""
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise AdapterNameError(
            f"There is no adapter {adapter_name!r}.{nearest(adapter_name, configs)} Adapters: {list(configs)}."
        )
    return configs[adapter_name]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter, by their names in files.

    Args:
        model: A `PeftModel`, or any model with adapters. Names begin with `base_model.model.` for the former only.
        state_dict: Take tensors from here (a gathered state dict, say) and not from the model.
        adapter_name: Which adapter.
        unwrap_compiled: Look into a compiled model.
        save_embedding_layers: True adds the base model's embeddings; `"auto"` only those that are trained, or that were
            resized: the vocabulary is not that of the base model's folder, if it lies on this machine.

    Returns:
        Tensors that share memory with the model's.

    Raises:
        AdapterNameError: there is no such adapter.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(get_peft_model_state_dict(model))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = config_of(model, adapter_name)
    if config.is_prompt_learning:
        prompted: Any = model
        return prompted.prompt_state_dict(adapter_name)
    source = _tensors(model, adapter_name) if state_dict is None else {keys.strip(k): v for k, v in state_dict.items()}
    result = keys.to_file(model, keys.entries(model, adapter_name), adapter_name, source)
    result.update({name: t.contiguous() for name, t in keys.mirrored(model, adapter_name, result).items()})
    for disk, (memory, tensor) in keys.bank_entries(model, adapter_name).items():
        result[_bank_name(model, disk)] = source.get(memory, tensor.detach())
    for name, _ in inject.bias_parameters(model, config.bias, adapter_name):
        result[keys.strip(name)] = source[keys.strip(name)]
    if save_embedding_layers == "auto" and _resized(model, config):
        save_embedding_layers = True
    for name in _embedding_names(model, save_embedding_layers, source):
        result.setdefault(name, source[name])
    return result


def _tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Tensors of the model by name, those of other adapters left out."""
    found = {}
    for path, owner in keys.owners(model, adapter):
        dot = keys.strip(f"{path}.") if path else ""
        for held in (owner._parameters, owner._buffers):
            found.update((dot + name, tensor.detach()) for name, tensor in held.items() if tensor is not None)
    return found


def _bank_name(model: nn.Module, name: str) -> str:
    return f"base_model.{name}" if hasattr(model, "base_model") and hasattr(model, "peft_type") else name


def _resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the vocabulary is not that of the base model's own folder. No network: a repository is not asked."""
    base = whole.base_of(model)
    name = config.base_model_name_or_path or getattr(getattr(base, "config", None), "_name_or_path", None)
    place = os.path.join(os.path.expanduser(name), "config.json") if isinstance(name, str) and name else ""
    if not os.path.isfile(place) or (embedding := inject.input_embedding_name(base)) is None:
        return False
    saved = files.read_config(place)
    nested = saved.get("text_config")
    size = saved.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    now = inject._inner(dict(targets._adaptable(base))[embedding])._parameters.get("weight")
    return isinstance(size, int) and now is not None and now.shape[0] != size


def _embedding_names(model: nn.Module, wanted: bool | str, known: Mapping[str, Tensor]) -> list[str]:
    if wanted is False:
        return []
    candidates = []
    for name, module in whole.walk(model):
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            continue
        plain = name.removesuffix(".base_layer").rpartition(".")[2]
        is_one = isinstance(module, nn.Embedding) or plain in _EMBEDDINGS
        if is_one and (wanted is True or module.weight.requires_grad):
            candidates.append((name, module))
    if not candidates:
        return []
    base = whole.base_of(model)
    own = {id(inject._inner(module)) for _, module in targets._adaptable(base)}
    found = [
        keys.strip(f"{name}.weight").replace("original_module.", "") for name, module in candidates if id(module) in own
    ]
    return [n for n in found if n in known] if wanted is True else found


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = False,
) -> LoadReport:
    """Put the tensors of an adapter into a model that has the adapter.

    Args:
        model: A `PeftModel`, or any model with adapters.
        peft_model_state_dict: Tensors by their names in files.
        adapter_name: The adapter to fill.
        ignore_mismatched_sizes: Leave out tensors of another shape.
        low_cpu_mem_usage: Adapter tensors on the meta device are replaced either way; kept for callers that say so.
        strict: Raise for missing and unexpected tensors.

    Returns:
        A report with `missing_keys` and `unexpected_keys`, by names in memory.

    Raises:
        LoadError: shapes differ, or `strict` and names do.
    """
    config = config_of(model, adapter_name)
    if config.is_prompt_learning:
        prompted: Any = model
        return prompted.load_prompt_state_dict(adapter_name, peft_model_state_dict, strict=strict)
    return load_tensors(model, config, adapter_name, peft_model_state_dict, ignore_mismatched_sizes, strict)


def load_tensors(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
    source: str = "",
    device: Any = None,
) -> LoadReport:
    """`set_peft_model_state_dict` for weight methods, checked before anything is written."""
    if any(adapter_name in layer.merged_adapters for layer in whole.layers(model)):
        raise StateError(
            f"Adapter {adapter_name!r} is merged into the base weights, which would stay as they are. Call "
            "unmerge_adapter() before you load other tensors into it."
        )
    found = keys.entries(model, adapter_name)
    given = _relative(model, adapter_name, found, state_dict)
    given = _renamed(model, found, adapter_name, given, source)
    placed, rest = keys.from_file(model, found, adapter_name, given)
    placed.update(_take_banks(model, adapter_name, rest, given))
    rest = [name for name in rest if not _repeats(name, given)]
    _check_mirrored(keys.mirrored(model, adapter_name, given), rest, given, source)
    biases = inject.bias_parameters(model, config.bias, adapter_name)  # type: ignore[attr-defined]
    extra = {keys.strip(name): p for name, p in biases}
    current = {**_tensors(model, adapter_name), **{k: v.detach() for k, v in extra.items()}}
    for name in [n for n in rest if n in extra or _is_embedding(n, current)]:
        placed[name] = given[name]
        rest.remove(name)
    expected = {e.memory: current[e.memory].shape for e in found}
    expected.update({name: p.shape for name, p in extra.items()})
    shapes = {name: t.shape for name, t in placed.items()} | {
        _in_memory(n, found, adapter_name): given[n].shape for n in rest
    }
    report = LoadReport.between({**expected, **{n: current[n].shape for n in placed if n in current}}, shapes, source)
    report.raise_if_bad(strict, ignore_mismatched_sizes=ignore_mismatched_sizes)
    wrong = {m.name for m in report.mismatched}
    real = {e.memory: e for e in found}
    replaced: list[tuple[Tensor, Tensor]] = []
    for name, tensor in placed.items():
        if name in wrong:
            continue
        _assign(model, name, tensor, current.get(name), real.get(name), device, replaced)
    keys.share(model, adapter_name, replaced)
    _fill_missing(model, config, adapter_name, [n for n in (*report.missing_keys, *wrong) if n in real], real)
    with torch.no_grad():
        for layer in whole.layers(model):
            if adapter_name in layer.available_adapters and adapter_name not in layer._leaders:
                parts = layer.parts(adapter_name)
                parts.method.loaded(parts, layer.frozen)
    return report


_NO_SIZE = re.compile("seed|key|step|init|final|delta|alpha|every|interval|lambda|layers")


def check_sizes(config: PeftConfig, model: nn.Module, given: Mapping[str, Tensor], source: str = "") -> None:
    """Raise for sizes in a file's config that neither its tensors nor the base model bear out, before memory is taken.

    Raises:
        CorruptFileError: says which field.
    """
    held = (p for _, m in whole.walk(model) for p in m._parameters.values() if p is not None)
    sides = max((side for p in held for side in p.shape), default=0)
    most = max(1 << 16, sides, sum(t.numel() for t in given.values()))
    for name, value in vars(config).items():
        numbers = value.values() if name.endswith("_pattern") and isinstance(value, Mapping) else (value,)
        for number in numbers:
            if isinstance(number, int) and number > most and not _NO_SIZE.search(name):
                raise CorruptFileError(
                    f"The config of {source!r} says {name} = {number:,}; the longest side in the base model is "
                    f"{sides:,}, and the file holds {sum(t.numel() for t in given.values()):,} numbers. They can't "
                    "belong together."
                )


def _renamed(
    model: nn.Module, found: list[keys.Entry], adapter: str, given: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The file's tensors by the model's names, where all that differs is how modules are called."""
    ours, mirrored = {e.disk: e.memory for e in found}, keys.mirrored(model, adapter, given)
    theirs = {n: tuple(t.shape) for n, t in given.items() if n not in ours and n not in mirrored}
    lost = [disk for disk in ours if disk not in given]
    if not lost or not theirs:
        return given
    current = _tensors(model, adapter)
    pairs = renames.renamed({disk: tuple(current[ours[disk]].shape) for disk in lost}, theirs)
    if pairs is None:
        return given
    old, new = next(iter(pairs.items()))
    warnings.warn(
        f"The adapter{f' in {source!r}' if source else ''} names {len(pairs)} tensors otherwise than this model does, "
        f"as other releases of its code do; they were paired by structure ({old!r} is {new!r} here).",
        PeftWarning,
        stacklevel=5,
    )
    return {pairs.get(name, name): tensor for name, tensor in given.items()}


def _relative(
    model: nn.Module, adapter: str, found: list[keys.Entry], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Names of a file, with the prefix of a `PeftModel` added or taken away as the model needs it."""
    wrapped = any(e.disk.startswith(keys.BASE_PREFIX) for e in found)
    # Another adapter's token rows may have stood around a layer when the file was written, or stand there now.
    places = {e.disk.replace(_TOKENS, "."): e.disk for e in found}
    tied = [keys.strip(f"{p}.") for p, m in whole.walk(model) if isinstance(m, AdaptedLayer) and adapter in m._leaders]
    starts = {start.replace(_TOKENS, "."): start for start in tied}
    result = {}
    for name, tensor in state_dict.items():
        name = keys.strip(name)
        if wrapped and not name.startswith("base_model."):
            name = keys.BASE_PREFIX + name
        elif not wrapped:
            name = name.removeprefix(keys.BASE_PREFIX)
        plain = name.replace(_TOKENS, ".")
        start = next((start for start in starts if plain.startswith(start)), None)
        place = name if start is None else starts[start] + plain[len(start) :]
        result[places.get(plain, place)] = tensor
    return result


def _take_banks(model: nn.Module, adapter: str, rest: list[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shared tensors in the file; those that the config regenerates may be there as well, and win."""
    placed = {}
    for disk, (memory, _) in keys.bank_entries(model, adapter, saved=False).items():
        name = _bank_name(model, disk)
        if name in rest:
            rest.remove(name)
            placed[memory] = given[name]
    return placed


def _is_embedding(name: str, current: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensor is a base embedding that was saved along (`save_embedding_layers`)."""
    plain = name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
    return name in current and (plain in _EMBEDDINGS or "embed" in plain)


def _check_mirrored(mirrored: Mapping[str, Tensor], rest: list[str], given: Mapping[str, Tensor], source: str) -> None:
    """Take what a file says again of tied layers out of `rest`, if it says the same."""
    for name, tensor in mirrored.items():
        if name not in rest:
            continue
        if not torch.equal(tensor, given[name]):
            raise LoadError(
                f"The adapter{f' in {source!r}' if source else ''} says that tied weights stay tied, but {name!r} is "
                "not the transpose of its partner: they were trained apart. Set ensure_weight_tying=false in its "
                "config."
            )
        rest.remove(name)


def _repeats(name: str, given: Mapping[str, Tensor]) -> bool:
    """Whether a file holds a tensor of `modules_to_save` under a second name: HF PEFT writes biases so, with
    bias="all"."""
    plain = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return plain != name and plain in given


def _in_memory(name: str, found: list[keys.Entry], adapter: str) -> str:
    """A name of a file as it would be in memory: with the adapter's name, where tensors of that kind have it."""
    head, _, tail = name.rpartition(".")
    if tail in ("weight", "bias") and (
        "lora_" in head or any(e.disk.endswith(f"{head.rpartition('.')[2]}.{tail}") for e in found)
    ):
        return f"{head}.{adapter}.{tail}"
    return name


def _assign(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    old: Tensor | None,
    entry: keys.Entry | None,
    device: Any,
    replaced: list[tuple[Tensor, Tensor]],
) -> None:
    if old is None:
        return
    place = old.device
    if place.type == "meta":
        place = (
            torch.device(device)
            if device is not None
            else (entry.layer.host.device if entry and entry.layer else tensor.device)
        )
        place = torch.device("cpu") if place.type == "meta" else place
    value = tensor.to(device=place, dtype=old.dtype)
    # A file's tensor may be mapped from disk; an adapter owns its memory, since the file may be replaced.
    owned = value.clone() if value.data_ptr() == tensor.data_ptr() and old.device.type == "meta" else value
    keys.assign(_unwrapped(model), name, owned, replaced)


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _fill_missing(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    missing: list[str],
    real: Mapping[str, keys.Entry],
) -> None:
    """Give layers whose tensors a file lacks the neutral start of their method, so that nothing random is left."""
    layers = {id(real[n].layer): real[n].layer for n in missing if real[n].layer is not None}
    if not layers:
        return
    neutral = config
    if getattr(config, "init_lora_weights", True) is not True:
        neutral = replace(neutral, init_lora_weights=True)
    if getattr(config, "init_weights", True) is False:
        neutral = replace(neutral, init_weights=True)
    replaced: list[tuple[Tensor, Tensor]] = []
    current = _tensors(model, adapter)
    for name in missing:
        old, layer = current[name], real[name].layer
        if old.device.type == "meta" and layer is not None:
            keys.assign(_unwrapped(model), name, torch.empty_like(old, device=layer.frozen.device), replaced)
    keys.share(model, adapter, replaced)
    for layer in layers.values():
        assert isinstance(layer, AdaptedLayer)
        layer._adapters[adapter] = neutral
        with torch.no_grad():
            method_of(config).reset(layer.parts(adapter), layer.frozen)
        layer._adapters[adapter] = config


def describe(state: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take in a file."""
    return sum(t.numel() * t.element_size() for t in state.values())


def base_sketch(model: nn.Module, adapter: str, only: list[str] | None = None) -> dict[str, Any] | None:
    """The fingerprint of the base weights that an adapter changes; None if there are none."""
    adapted = [(path, module) for path, module in whole.walk(model) if isinstance(module, AdaptedLayer)]
    frozen = {}  # of layers around one weight, the innermost that is merged has kept it
    for _, layer in adapted:
        name = layer.host.parameter
        if (kept := layer._originals.get("parameters", {}).get(name)) is not None:
            frozen[id(layer.get_base_layer()), name] = kept
    found, shapes = {}, {}
    for path, layer in adapted:
        if adapter in layer.available_adapters:
            parts = keys.strip(path).removeprefix(keys.BASE_PREFIX).split(".")
            plain = ".".join(part for part in parts if part not in ("token_adapter", "base_layer"))
            host, name = layer.host, layer.host.parameter
            tensor = frozen.get((id(layer.get_base_layer()), name), layer.get_param())
            if host.opaque:  # by the name and shape that the tensor has where nothing is packed
                name = "weight"
                shapes[f"{plain}.{name}"] = host.unpacked_shape
            found[f"{plain}.{name}"] = tensor.detach()
    return fingerprint.sketch(found, shapes, only=only) if found else None


def sketch_here(model: nn.Module, adapter: str, saved: Mapping[str, Any], current: dict[str, Any]) -> Mapping[str, Any]:
    """A fingerprint by the names of this model; what it knows beyond `current` is added there."""
    lost = {name: tuple(entry[0]) for name, entry in saved["tensors"].items() if name not in current["tensors"]}
    every = (base_sketch(model, adapter) if lost else None) or current
    new = {name: tuple(entry[0]) for name, entry in every["tensors"].items() if name not in saved["tensors"]}
    pairs = renames.renamed(new, lost) or {}
    current["tensors"].update({name: every["tensors"][name] for name in pairs.values()})
    return {**saved, "tensors": {pairs.get(name, name): entry for name, entry in saved["tensors"].items()}}


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Read the tensors of a saved adapter, by their names in the file.

    Args:
        model_id: A folder, or a repository on the hub.
        device: Where to put them (default: the CPU, mapped from the file).
        key_mapping: `{regex: replacement}` for names, as in transformers.
        **hf_hub_download_kwargs: `subfolder`, `revision`, `token`, `cache_dir`, …

    Raises:
        LoadError: nothing is there, or the file is damaged.
    """
    options = {k: v for k, v in hf_hub_download_kwargs.items() if k in (*files.HUB_OPTIONS, "subfolder")}
    path = files.locate(model_id, **options)
    return rename(tensors.read(path, device=device), key_mapping)


def rename(state_dict: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Names after `{regex: replacement}`; the first pattern that matches a name changes it. The PEFT prefix stays."""
    result = {}
    for name, tensor in state_dict.items():
        prefix = keys.BASE_PREFIX if name.startswith(keys.BASE_PREFIX) else ""
        plain = name[len(prefix) :]
        for pattern, replacement in (key_mapping or {}).items():
            changed, times = re.subn(pattern, replacement, plain)
            if times:
                plain = changed
                break
        result[prefix + plain] = tensor
    return result
