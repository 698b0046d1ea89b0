"""Getting a frozen model ready to train adapters: gradients through embeddings, checkpointing, stable norms."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from peft.hosts import host_class
from peft.hosts.opaque import is_packed

_TAKE_ANY_FLOAT = {"bnb 4bit", "bnb 8bit", "torchao", "quanto"}


def require_input_gradients(model: Any) -> None:
    """Make the output of the input embedding require a gradient, so that reentrant checkpoints have something to
    pass on."""
    if hasattr(model, "enable_input_require_grads"):
        try:
            model.enable_input_require_grads()
            return
        except (NotImplementedError, AttributeError):
            pass  # a model without one input embedding
    if hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None:
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a quantised model, raise its small half precision tensors (norms, biases) to float32, set up
    checkpointing.

    Large half precision matrices stay as they are unless they belong to a quantised model's own unquantised layers, in
    which case they are raised as well (embeddings and head, 4 bytes per element). Nothing is raised beside layers whose
    kernels read one dtype (GPTQ, AWQ, HQQ, ...): the float32 that norms would then give is refused there.

    Args:
        model: The model; changed in place.
        use_gradient_checkpointing: Recompute activations in backward.
        gradient_checkpointing_kwargs: Options for it, e.g. `{"use_reentrant": False}`.
        auto_clear_cache: Give freed GPU memory back.

    Returns:
        `model`.
    """
    quantised = bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))
    quantised = quantised or getattr(model, "quantization_method", None) is not None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    hosts = {module: host(module) for module in model.modules() if (host := host_class(module)) is not None}
    backends = {host.backend for host in hosts.values()} - {None}
    # Other kernels refuse the float32 that would reach them; those layers' own floats (scales) are for the kernel.
    for module in model.modules() if backends <= _TAKE_ANY_FLOAT else ():
        keeps = module in hosts and hosts[module].opaque
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in (torch.float16, torch.bfloat16) or is_packed(parameter):
                continue
            if not keeps or name == "bias":
                parameter.data = parameter.data.float()
    if use_gradient_checkpointing and (quantised or hasattr(model, "gradient_checkpointing_enable")):
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            require_input_gradients(model)
        takes = "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters
        model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if takes and options else {}))
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


__all__ = ["prepare_model_for_kbit_training", "require_input_gradients"]
