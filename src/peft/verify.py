"""Does the merged model compute what the adapter computes, and does the saved adapter? Numbers, layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft import whole
from peft.errors import StateError
from peft.layer import AdaptedLayer
from peft.model import PeftModel

_PROBE = "peft-verify-reloaded"


@dataclass
class LayerCheck:
    """One layer: how much the adapter changes its output, and by how much merging misses that."""

    name: str
    change: float
    merge_error: float


@dataclass
class MergeReport:
    """What `verify_merge` measured; all numbers are relative to the norm of the output with the adapter.

    Attributes:
        change: How far the adapter moves the model's output from the base model's.
        merge_error: How far the merged model's output is from the adapter's.
        reload_error: How far the saved and reloaded adapter's is; None for methods that were not reloaded.
        restored: Whether unmerging gave every base weight back bit for bit.
        layers: The same by layer, on the inputs that the layers see.
    """

    change: float
    merge_error: float
    reload_error: float | None
    restored: bool
    layers: list[LayerCheck] = field(default_factory=list)

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda c: -c.merge_error)[:5]
        lines = [
            f"the adapter changes the output by {self.change:.3g}; merged differs by {self.merge_error:.3g}, "
            f"reloaded by {'—' if self.reload_error is None else format(self.reload_error, '.3g')}",
            f"unmerging restores the base weights: {'yes, every bit' if self.restored else 'NO'}",
        ]
        return "\n".join(
            [*lines, *(f"  {c.name}: change {c.change:.3g}, merged differs by {c.merge_error:.3g}" for c in worst)]
        )

    def raise_if_above(self, tolerance: float) -> MergeReport:
        """Raise if merging or reloading misses by more than `tolerance`, or the adapter changes nothing."""
        if self.change == 0:
            raise StateError(
                "The adapter changes nothing on these inputs: is it the one that was trained, and is it active?"
            )
        if max(self.merge_error, self.reload_error or 0.0) > tolerance or not self.restored:
            raise StateError(f"Merged and adapter outputs differ by more than {tolerance:g}:\n{self}")
        return self


@torch.no_grad()
def verify_merge(
    model: PeftModel, inputs: Mapping[str, Any] | Sequence[Any] | Tensor, reload: bool = True
) -> MergeReport:
    """Compare the active adapters, merged, and saved and reloaded, on probe inputs. The model is left as it was.

    Args:
        model: A model with active adapters, none merged.
        inputs: What the model is called with: keyword arguments, positional ones, or one tensor.
        reload: Save each active adapter to a temporary folder, load it back under another name, and compare.

    Raises:
        StateError: an adapter is merged already.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model, verify_merge
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
        >>> verify_merge(model, torch.ones(1, 4)).merge_error < 1e-6
        True
    """
    if any(layer.merged for layer in whole.layers(model)):
        raise StateError("An adapter is merged already; call unmerge_adapter() first.")
    training = model.training
    model.eval()
    try:
        with model.use():
            plain = _output(model, inputs)
        with _inputs_of_layers(model) as seen:
            adapted = _output(model, inputs)
        layers = [_check(name, layer, x) for name, layer, x in seen]
        before = {
            id(p): p.detach().clone() for layer in whole.layers(model) for p in layer.get_base_layer().parameters()
        }
        model.merge_adapter()
        merged = _output(model, inputs)
        model.unmerge_adapter()
        restored = all(
            torch.equal(before[id(p)], p)
            for layer in whole.layers(model)
            for p in layer.get_base_layer().parameters()
            if id(p) in before
        )
        again = _reloaded(model, inputs) if reload else None
    finally:
        model.train(training)
    return MergeReport(
        _distance(plain, adapted),
        _distance(merged, adapted),
        None if again is None else _distance(again, adapted),
        restored,
        layers,
    )


def _output(model: PeftModel, inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        y = model(**inputs)
    else:
        y = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    if isinstance(y, Tensor):
        return y
    return y.logits if hasattr(y, "logits") else y[0]


@contextmanager
def _inputs_of_layers(model: PeftModel) -> Iterator[list[tuple[str, AdaptedLayer, Tensor]]]:
    """The first input that each adapted layer sees during the body."""
    seen: list[tuple[str, AdaptedLayer, Tensor]] = []
    handles = []
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, AdaptedLayer) and layer.host.factored:

            def note(module: Any, args: tuple, name: str = name) -> None:
                if args and all(n != name for n, _, _ in seen):
                    seen.append((name, module, args[0].detach()))

            handles.append(layer.register_forward_pre_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check(name: str, layer: AdaptedLayer, x: Tensor) -> LayerCheck:
    adapted, plain = layer(x), layer._forward((), x, (), {})
    layer.merge()
    merged = layer(x)
    layer.unmerge()
    return LayerCheck(name, _distance(plain, adapted), _distance(merged, adapted))


def _reloaded(model: PeftModel, inputs: Any) -> Tensor:
    names = model.active_adapters
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=names)
        copies = []
        try:
            for position, name in enumerate(names):
                copies.append(f"{_PROBE}-{position}")
                where = folder if name == "default" else f"{folder}/{name}"
                model.load_adapter(where, copies[-1])
            with model.use(*copies):
                return _output(model, inputs)
        finally:
            for name in copies:
                if name in model.peft_config:
                    model.delete_adapter(name)


def _distance(a: Tensor, b: Tensor) -> float:
    scale = b.double().norm().item() or 1.0
    return (a.double() - b.double()).norm().item() / scale
