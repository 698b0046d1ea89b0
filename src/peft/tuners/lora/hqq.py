"""The path of HF PEFT for LoRA on HQQ's layer."""

from peft.hosts.hqq import HqqHost
from peft.layer import layer_class

HqqLoraLinear = layer_class(("LORA",), HqqHost)
