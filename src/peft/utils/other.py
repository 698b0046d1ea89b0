"""Helpers of HF PEFT that other libraries import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft.auxiliary import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from peft.auxiliary import ModulesToSaveWrapper as ModulesToSaveWrapper
from peft.auxiliary import TrainableTokensWrapper as TrainableTokensWrapper
from peft.config import CONFIG_NAME as CONFIG_NAME
from peft.config import PeftConfig as PeftConfig
from peft.inject import input_embedding_name
from peft.integrations import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from peft.integrations.fsdp import fsdp_auto_wrap_policy as fsdp_auto_wrap_policy
from peft.model import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peft.model import WEIGHTS_NAME as WEIGHTS_NAME
from peft.patterns import matching
from peft.whole import set_adapter as _set_adapter  # noqa: F401


def get_pattern_key(pattern_keys: Any, key_to_match: str) -> str:
    """The first pattern that matches the end of a module path, or the path itself."""
    return matching(pattern_keys, key_to_match) or key_to_match


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, transposed if it is stored as (in, out)."""
    return weight.T if fan_in_fan_out else weight


def infer_device() -> str:
    """The accelerator that is there, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Decoder inputs from labels: one place to the right, with the start token first and -100 as padding.

    Example:
        >>> shift_tokens_right(torch.tensor([[5, 6, -100]]), 0, 1)
        tensor([[1, 5, 6]])
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id must be given: labels of -100 become it.")
    shifted = input_ids.new_zeros(input_ids.shape)
    shifted[:, 1:] = input_ids[:, :-1]
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters to `dtype`, trainable ones to float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What two tensors have in common if they share memory."""
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The model's quantisation config if it is of that method, else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if config is not None and getattr(model, "quantization_method", None) == method else None


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name in the parent) of a module path."""
    parent_key, _, name = key.rpartition(".")
    return model.get_submodule(parent_key), model.get_submodule(key), name


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Name of the input embedding within its parent."""
    name = input_embedding_name(model)
    return default if name is None else name.rpartition(".")[2]


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Stop training the parameters that have the adapter's name."""
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Samples in a batch, from whichever input is given."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a path ends with a name, at a dot."""
    return key == target_key or key.endswith(f".{target_key}")
