"""Any change of a weight as LoRA: exact where its rank is low by construction, elsewhere by SVD, the error measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft.checkpoint import files, fingerprint, keys, state, tensors
from peft.combine import lora
from peft.combine.changes import adapted, change, check_values, layout
from peft.combine.factored import Factors, check_rank, recompress, truncate, truncate_blocks
from peft.combine.terms import CombineReport
from peft.errors import ConfigError, UnsupportedError
from peft.layer import AdaptedLayer
from peft.methods.lora.config import LoraConfig
from peft.operators import Operator
from peft.slots import adapter_dtype

_SHARED = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "fan_in_fan_out",
)


class Conversion(tuple[LoraConfig, dict[str, Tensor]]):
    """The pair (config, tensors by their names in files), with the `report` of the errors beside it."""

    report: CombineReport

    def __new__(cls, config: LoraConfig, tensors: dict[str, Tensor], report: CombineReport) -> Conversion:
        self = super().__new__(cls, (config, tensors))
        self.report = report
        return self


def convert_to_lora(
    model: nn.Module,
    rank: int | float | None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Conversion:
    """Turn an adapter of any mergeable method into LoRA; the model is not changed.

    Args:
        model: A `PeftModel`, or any model with adapters.
        rank: The rank of the LoRA. A float in (0, 1] is the share of ‖ΔW‖² that each layer keeps; None keeps all of it,
            which for methods of full rank means factors larger than the weight.
        adapter_name: Which adapter.
        progressbar: Show one.
        compile_kwargs: Taken for compatibility; nothing is compiled, since decompositions don't gain from it.

    Returns:
        (config, tensors by their names in files). `.report` has the relative error ‖ΔW − sBA‖ / ‖ΔW‖ of each layer.
        What the adapter trains besides (`modules_to_save`, token rows) is handed on; changes of biases become the
        biases of `lora_bias`.

    Raises:
        UnsupportedError: The adapter is no change of the weights: it depends on the input.
        TypeError: Nothing in the model can be converted.

    Example:
        >>> from peft import LoraConfig, convert_to_lora, get_peft_model
        >>> config = LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
        >>> conversion = convert_to_lora(model, rank=5)
        >>> lora_config, tensors = conversion
        >>> lora_config.r, lora_config.use_dora, conversion.report.error < 1e-5
        (5, False, True)
    """
    check_rank(rank)
    check_values(model)
    layers = [found for found in adapted(model) if adapter_name in found[2].available_adapters and _is_change(found[2])]
    if not layers:
        state.config_of(model, adapter_name)
        raise NotConvertibleError(f"Nothing in the model can be converted: {adapter_name!r} changes no weight.")
    source = layers[0][2].parts(adapter_name).config
    if getattr(source, "bias", "none") != "none":
        raise ConfigError(
            f"{adapter_name!r} trains biases of the base model (bias={source.bias!r}), which a LoRA file can't hold "
            "as a change. Train with bias='none'."
        )
    converted = {
        path: (key, layer, *_convert(layer, adapter_name, rank)) for path, key, layer in _progress(layers, progressbar)
    }
    lora_bias = any(shift is not None for *_, shift in converted.values())
    found: dict[str, Tensor] = {}
    for path, (key, layer, factors, _, _, shift) in converted.items():
        if lora_bias and not layer.host.takes_bias:
            raise UnsupportedError(f"{adapter_name!r} changes biases, and LoRA has no place for one on {key!r}.")
        found |= {f"{path}.{slot}": tensor for slot, tensor in _tensors(layer, factors, shift, lora_bias).items()}
    others = {entry.disk for entry in keys.entries(model, adapter_name) if entry.layer is None}
    whole = state.get_peft_model_state_dict(model, adapter_name=adapter_name) if others else {}
    found = {keys.strip(name): tensor for name, tensor in found.items()}
    found |= {name: tensor for name, tensor in whole.items() if name in others}
    ranks = {key: layout(layer).rank_of(factors) for key, layer, factors, *_ in converted.values()}
    return Conversion(
        lora.result_config([_lora_config(source)], ranks, lora_bias),
        found,
        CombineReport(
            "convert",
            {key: error for key, _, _, error, _, _ in converted.values()},
            {key: norm for key, _, _, _, norm, _ in converted.values()},
            ranks,
        ),
    )


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float | None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> CombineReport:
    """`convert_to_lora`, written to a folder that any PEFT library loads; returns the report of the errors."""
    conversion = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config, found = conversion
    sketch = state.base_sketch(model, adapter_name)
    metadata = {} if sketch is None else {fingerprint.METADATA_KEY: fingerprint.encode(sketch)}
    payload = tensors.encode(found, metadata, checksum=True)
    files.save(path, {files.CONFIG_NAME: config.to_json_string(), files.SAFETENSORS_NAME: payload})
    return conversion.report


class NotConvertibleError(UnsupportedError, TypeError):
    """Nothing in the model is a change of a weight."""


def to_factors(
    change: Operator | Tensor,
    rank: int | float | None = None,
    dtype: torch.dtype | None = None,
    driver: str | None = None,
) -> tuple[Factors, float]:
    """ΔW as `B @ A` of the given rank, with the measured relative error (Frobenius).

    Args:
        change: an operator, or the dense ΔW (out, in). An operator that knows its thin factors is never made dense.
        rank: an integer; a float in (0, 1], the share of ‖ΔW‖² to keep; or None, the rank that holds ΔW.
        dtype: of the factors; default: that of the change.
        driver: of `torch.linalg.svd`, on CUDA only.

    >>> from peft.operators import LowRank
    >>> factors, error = to_factors(LowRank(down=torch.randn(3, 16), up=torch.randn(12, 3), scale=2.0), rank=0.999999)
    >>> factors.rank, error < 1e-5
    (3, True)
    """
    if isinstance(change, Tensor):
        return truncate(change, rank, dtype, driver=driver)
    thin = change.factors()
    if thin is not None:
        up, down = thin
        return recompress([Factors(down.detach(), up.detach())], rank, dtype)
    return truncate(change.dense(), rank, dtype, driver=driver)


def _is_change(layer: AdaptedLayer) -> bool:
    """Whether the layer's adapter is a change of its weight; trained rows of an embedding replace what is there."""
    return layer.methods != ("TRAINABLE_TOKENS",)


def _convert(
    layer: AdaptedLayer, adapter: str, rank: int | float | None
) -> tuple[Factors, float, float, Tensor | None]:
    """Factors of scaling 1, their relative error, the norm it refers to, and the change of the bias."""
    changed, shift = change(layer, adapter)
    dtype = adapter_dtype(layer.host.dtype)
    if isinstance(changed, Factors):
        factors, error = recompress([changed], rank, dtype)
        return factors, error, changed.norm(), shift
    factors, error, norm = truncate_blocks(changed, rank, dtype)
    return _wide(layer, factors), error, norm, shift


def _wide(layer: AdaptedLayer, factors: Factors) -> Factors:
    """LoRA on a grouped convolution sees all input channels: put the columns of each group in their place."""
    channels = layer.host.layout.get("channels", 0) * layer.host.layout.get("taps", 0)
    blocks, _, n = factors.shape
    if not channels or n == channels:
        return factors
    A = factors.A.new_zeros(blocks, factors.rank, channels)
    for group in range(blocks):
        A[group, :, group * n : (group + 1) * n] = factors.A[group]
    return Factors(A, factors.B)


def _tensors(layer: AdaptedLayer, factors: Factors, shift: Tensor | None, lora_bias: bool) -> dict[str, Tensor]:
    """LoRA's tensors of one layer by the end of their names in files."""
    A, B = layout(layer).unpack(factors)
    if layer.host.one_hot:
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    kernel = layer.host.raw.shape[2:] if "taps" in layer.host.layout else ()
    if kernel:
        A, B = A.unflatten(1, (-1, *kernel)), B[(...,) + (None,) * len(kernel)]
    found = {"lora_A.weight": A.contiguous(), "lora_B.weight": B.contiguous()}
    if lora_bias:
        found["lora_B.bias"] = (B.new_zeros(B.shape[0]) if shift is None else shift.detach().to(B)).contiguous()
    return found


def _lora_config(source: Any) -> LoraConfig:
    """A LoRA config with the targets of another method's."""
    return LoraConfig(**{name: getattr(source, name) for name in _SHARED if hasattr(source, name)})


def _progress(items: list[Any], shown: bool) -> Iterable[Any]:
    if not shown:
        return items
    from tqdm import tqdm

    return tqdm(items, desc="Converting to LoRA")
