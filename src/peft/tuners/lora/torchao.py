"""The path of HF PEFT for LoRA on `nn.Linear` with a weight of torchao's."""

from peft.hosts.tensors import PackedLinearHost
from peft.layer import layer_class

TorchaoLoraLinear = layer_class(("LORA",), PackedLinearHost)
