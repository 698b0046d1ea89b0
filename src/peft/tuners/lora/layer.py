"""The path of HF PEFT for LoRA's layers: the adapted layer, by type of base layer."""

import torch

from peft.hosts.attention import MultiheadAttentionHost
from peft.hosts.conv import Conv1dHost, Conv2dHost, Conv3dHost
from peft.hosts.embedding import EmbeddingHost
from peft.hosts.linear import LinearHost
from peft.hosts.parameter import ParameterHost
from peft.layer import check_adapters_to_merge as check_adapters_to_merge
from peft.layer import layer_class, marker
from peft.utils.other import transpose as transpose

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VARIANT_KWARG_KEYS = ["alora_offsets"]

LoraLayer = marker("LORA")
Linear = layer_class(("LORA",), LinearHost)
Embedding = layer_class(("LORA",), EmbeddingHost)
Conv1d = layer_class(("LORA",), Conv1dHost)
Conv2d = layer_class(("LORA",), Conv2dHost)
Conv3d = layer_class(("LORA",), Conv3dHost)
MultiheadAttention = layer_class(("LORA",), MultiheadAttentionHost)
ParamWrapper = layer_class(("LORA",), ParameterHost)
