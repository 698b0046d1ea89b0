"""Adapters of one model combined into a new one: `model.add_weighted_adapter`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft import inject
from peft.combine import linear, lora
from peft.combine.changes import adapted, layout, lora_term, write_lora
from peft.combine.merge import SignMethod
from peft.combine.terms import CombinationType, CombineReport, Term, check_weights
from peft.combine.weighted import combine
from peft.errors import AdapterNameError, ConfigError, PeftWarning, UnsupportedError, nearest
from peft.slots import tensor_of

if TYPE_CHECKING:
    from peft.tuner import BaseTuner


def add_weighted_adapter(
    self: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: CombinationType = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    *,
    reference: bool = False,
    generator: torch.Generator | None = None,
) -> CombineReport:
    """Add a new adapter that is a combination of others. It is not activated.

    A weighted sum is the sum: of adapters of different ranks, scalings (rsLoRA, patterns, scalings changed by hand),
    biases and targets, with weights of any sign. A DoRA adapter takes part as the change that merging it makes, which
    has full rank; the report says what its cut loses.

    Args:
        adapters: Names of LoRA adapters, or of one method that is linear in its tensors ((IA)³, C3A, FourierFT, …).
        weights: One per adapter.
        adapter_name: A new name.
        combination_type: 'svd', 'linear' and 'cat' are the weighted sum; 'ties', 'dare_linear', 'dare_ties' and
            'magnitude_prune' merge sparsely, with '_svd' on ΔW itself; see `peft.combine.weighted`.
        svd_rank: Rank of the new adapter; None is the rank that holds the weighted sum, and loses nothing of it.
        svd_clamp: Clamp the new factors to ± this quantile of their entries.
        svd_full_matrices: Used by `reference=True` only.
        svd_driver: Of `torch.linalg.svd`, for dense layers on CUDA.
        density: Share of entries that pruning keeps; needed by all but the sums.
        majority_sign_method: Election of TIES: 'total' (by mass) or 'frequency' (by count).
        reference: Give the numbers of HF PEFT, which are not the sum for 'linear' and are cut to the largest rank for
            'svd'.
        generator: Where the draws of DARE come from.

    Returns:
        The relative error per layer, and over all.

    Raises:
        AdapterNameError: A name that does not exist, or one that is taken.
        ConfigError, UnsupportedError: There is no such combination; the model is as it was.
    """
    names = list(adapters)
    if len(names) != len(weights):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights: one weight per adapter is needed.")
    check_weights(weights)
    for name in names:
        if name not in self.peft_config:
            raise AdapterNameError(f"Adapter {name!r} does not exist.{nearest(name, self.peft_config)}")
    if adapter_name in self.peft_config:
        raise AdapterNameError(f"There is an adapter {adapter_name!r} already; delete it or choose another name.")
    options = {
        "svd_rank": svd_rank,
        "svd_clamp": svd_clamp,
        "svd_full_matrices": svd_full_matrices,
        "svd_driver": svd_driver,
        "density": density,
        "majority_sign_method": majority_sign_method,
        "reference": reference,
        "generator": generator,
    }
    if all(inject.peft_type_name(self.peft_config[name]) == "LORA" for name in names):
        return _add_lora(self, names, weights, adapter_name, combination_type, options)
    if combination_type not in ("svd", "linear") or svd_rank is not None or density is not None:
        raise UnsupportedError(
            f"combination_type={combination_type!r} is for LoRA; other methods only add, without rank and density. "
            "Convert the adapters with `convert_to_lora` to combine them in other ways."
        )
    return _add_linear(self, names, weights, adapter_name, combination_type)


def _add_lora(
    tuner: BaseTuner,
    names: list[str],
    weights: Sequence[float],
    new: str,
    combination_type: CombinationType,
    options: dict[str, Any],
) -> CombineReport:
    configs = {name: tuner.peft_config[name] for name in names}
    lora.check(configs)
    layers = {key: layer for _, key, layer in adapted(tuner.model) if set(names) & set(layer.available_adapters)}

    def terms() -> Iterator[tuple[str, list[Term | None]]]:
        for key, layer in layers.items():
            how = layout(layer)
            yield key, [lora_term(layer, name, how) for name in names]

    combined, report = combine(terms(), weights, combination_type, **options)
    if options["reference"] and any(config.lora_bias for config in configs.values()):
        warnings.warn(
            "reference=True leaves out the biases of the adapters (lora_bias), as the reference does.",
            PeftWarning,
            stacklevel=4,
        )
    ranks = {key: layout(layers[key]).rank_of(layer.factors) for key, layer in combined.items()}
    lora_bias = any(layer.bias is not None for layer in combined.values())
    if lora_bias:
        lora.check_bias(key for key, layer in layers.items() if not layer.host.takes_bias)
    parameters = {key for key, layer in layers.items() if "parameter_name" in layer.__dict__}
    modules = [key for key in layers if key not in parameters and key.rpartition(".")[0] not in layers]
    _create(tuner, new, lora.result_config(list(configs.values()), ranks, lora_bias, modules))
    for key, layer in layers.items():
        write_lora(layer, new, combined[key].factors, combined[key].bias)
    return report


def _add_linear(
    tuner: BaseTuner, names: list[str], weights: Sequence[float], new: str, combination_type: str
) -> CombineReport:
    configs = {name: tuner.peft_config[name] for name in names}
    linear.check(configs)
    sums = []
    for _, _, layer in adapted(tuner.model):
        if set(names) & set(layer.available_adapters):
            states = [
                {slot.name: tensor_of(value).detach() for slot, value in layer.slots(name) if not slot.derived}
                if name in layer.available_adapters
                else {}
                for name in names
            ]
            sums.append((layer, linear.add(states, weights)))
    _create(tuner, new, copy.deepcopy(configs[names[0]]))
    with torch.no_grad():
        for layer, state in sums:
            for slot, value in layer.slots(new):
                if not slot.derived:  # what follows from the config is there
                    tensor_of(value).copy_(state[slot.name])
    return CombineReport(combination_type, {}, {}, {})


def _create(tuner: BaseTuner, name: str, config: Any) -> None:
    """Add the adapter without changing what is active and what trains."""
    config.allow_unmatched = True  # its lists are a union, of which each adapter used a part
    before = {p: p.requires_grad for p in tuner.parameters()}
    tuner.peft_config[name] = config
    try:
        with torch.random.fork_rng(devices=[]):  # its initial values are thrown away, so they shall cost no draws
            tuner.inject_adapter(tuner.model, name)
    except BaseException:
        del tuner.peft_config[name]
        raise
    finally:
        for parameter, trains in before.items():
            parameter.requires_grad_(trains)
