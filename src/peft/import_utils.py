"""Whether optional libraries are installed. Asking imports none of them."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec

from packaging.version import parse


@cache
def _installed(module: str, distribution: str | None = None, at_least: str | None = None) -> bool:
    if find_spec(module) is None:
        return False
    if at_least is None:
        return True
    try:
        return parse(metadata.version(distribution or module)) >= parse(at_least)
    except metadata.PackageNotFoundError:
        return False


def is_bnb_available() -> bool:
    """bitsandbytes."""
    return _installed("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """bitsandbytes with 4-bit layers."""
    return _installed("bitsandbytes", at_least="0.39.0")


def is_gptqmodel_available() -> bool:
    """GPTQModel."""
    return _installed("gptqmodel")


def is_optimum_available() -> bool:
    """optimum."""
    return _installed("optimum")


def is_aqlm_available() -> bool:
    """AQLM."""
    return _installed("aqlm")


def is_eetq_available() -> bool:
    """EETQ."""
    return _installed("eetq")


def is_hqq_available() -> bool:
    """HQQ."""
    return _installed("hqq")


def is_inc_available() -> bool:
    """Intel Neural Compressor."""
    return _installed("neural_compressor")


def is_torchao_available() -> bool:
    """torchao."""
    return _installed("torchao")


def is_torchao_ge_v0_18_0() -> bool:
    """torchao 0.18 or newer."""
    return _installed("torchao", at_least="0.18.0")


def is_te_available() -> bool:
    """Transformer Engine."""
    return _installed("transformer_engine")


def is_te_pytorch_available() -> bool:
    """Transformer Engine's PyTorch part."""
    return is_te_available() and _installed("transformer_engine.pytorch")


def is_diffusers_available() -> bool:
    """diffusers."""
    return _installed("diffusers")


def is_xpu_available() -> bool:
    """An Intel GPU."""
    import torch

    return hasattr(torch, "xpu") and torch.xpu.is_available()


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """torch_xla, with a device unless `check_device` is False."""
    if not _installed("torch_xla"):
        return False
    if not check_device:
        return True
    import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]

    try:
        xm.xla_device()
    except RuntimeError:
        return False
    return True
