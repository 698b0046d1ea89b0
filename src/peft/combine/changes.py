"""What one adapter changes on one adapted layer, as a term of a sum; and LoRA's tensors written back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from peft.checkpoint.keys import BASE_PREFIX
from peft.combine.factored import Factors
from peft.combine.layouts import Layout
from peft.combine.terms import Term
from peft.errors import StateError, UnsupportedError
from peft.layer import AdaptedLayer
from peft.method import method_of
from peft.updates import Add


def adapted(model: nn.Module) -> Iterator[tuple[str, str, AdaptedLayer]]:
    """(path in the model, name that configs use, layer) of every adapted layer.

    The two differ inside other adapted layers, and a parameter's name follows that of its module.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            key = ".".join(p for p in path.removeprefix(BASE_PREFIX).split(".") if p != "base_layer")
            parameter = layer.__dict__.get("parameter_name")
            yield path, f"{key}.{parameter}" if parameter else key, layer


def layout(layer: AdaptedLayer) -> Layout:
    """How LoRA's factors of this layer are laid out, as matrices."""
    experts = layer.host.layout.get("experts", 1)
    return Layout(groups=layer.host.groups, experts=experts if experts > 1 else 0)


def lora_term(layer: AdaptedLayer, adapter: str, how: Layout | None = None) -> Term | None:
    """A LoRA adapter of a layer, or None where it has none. DoRA comes as the change that merging makes."""
    if adapter not in layer.available_adapters:
        return None
    p = layer.parts(adapter)
    factors = (how or layout(layer)).pack(p.lora_A.detach(), p.lora_B.detach())
    bias = p.leaf("lora_B").bias.detach() if p.lora_bias else None  # type: ignore[union-attr]
    delta = partial(dense_change, layer, adapter) if p.use_dora else None
    return Term(factors, float(p.scaling), bias, delta)


def write_lora(layer: AdaptedLayer, adapter: str, factors: Factors, bias: Tensor | None) -> None:
    """Put factors of scaling 1 into a LoRA adapter of the layer that has their rank."""
    p = layer.parts(adapter)
    with torch.no_grad():
        for name, matrix in zip(("lora_A", "lora_B"), layout(layer).unpack(factors), strict=True):
            _fill(_weight(p.leaf(name)), matrix)
        if bias is not None:
            _fill(p.leaf("lora_B").bias, bias)  # type: ignore[union-attr,arg-type]


def _weight(leaf: nn.Module | Tensor) -> Tensor:
    return leaf.weight if isinstance(leaf, nn.Module) else leaf  # type: ignore[return-value]


def _fill(parameter: Tensor, values: Tensor) -> None:
    parameter.data = values.reshape(parameter.shape).to(parameter.device)


def change(layer: AdaptedLayer, adapter: str) -> tuple[Factors | Tensor, Tensor | None]:
    """What any mergeable adapter adds to W and b: W's part as factors if its rank is low by construction, else dense.

    Shapes: factors or (blocks, out / blocks, in); (out,) or None.
    """
    method = method_of(layer.parts(adapter).config)
    if not method.mergeable:
        raise UnsupportedError(f"{method.peft_type} depends on the input, so it is no change of the weight.")
    if method.peft_type == "LORA" and not layer.parts(adapter).use_dora:
        term = lora_term(layer, adapter)
        assert term is not None
        return term.factors.scaled(term.scale), None if term.bias is None else term.bias * term.scale
    with torch.no_grad():
        (update,) = layer.updates([adapter])
        if isinstance(update, Add) and layout(layer).blocks == 1 and (thin := update.op.factors()) is not None:
            up, down = thin
            return Factors(down.detach(), up.detach()), update.shift
        return dense_change(layer, adapter), _bias_change(layer, adapter)


@torch.no_grad()
def dense_change(layer: AdaptedLayer, adapter: str) -> Tensor:
    """ΔW as merging makes it, (blocks, out / blocks, in), in float32 or better."""
    call = layer.parts(adapter).call(layer.host)
    weight = _full(call.weight)
    (update,) = layer.updates([adapter])
    # a relative update is computed from the frozen weight alone, so that adding it to zero costs no digits
    delta = update.weight(torch.zeros_like(weight) if update.relative else weight, call)
    delta = delta if update.relative else call.plus(delta, -weight)
    return delta.unflatten(0, (layout(layer).blocks, -1))


def _bias_change(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    call = layer.parts(adapter).call(layer.host)
    (update,) = layer.updates([adapter])
    if update.relative:
        return update.add_bias(None, call)
    bias = None if call.bias is None else _full(call.bias)
    after = update.add_bias(bias, call)
    return after if bias is None or after is None else after - bias


def _full(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def check_values(model: nn.Module) -> None:
    """Refuse a model on the meta device: it has no numbers to combine."""
    if any(layer.host.device.type == "meta" for _, _, layer in adapted(model)):
        raise StateError("The model is on the meta device and has no values to combine; load its weights first.")
