"""The path of HF PEFT for LoRA on bitsandbytes' layers."""

from peft.hosts.bitsandbytes import Linear4bitHost, Linear8bitHost
from peft.layer import layer_class

Linear4bit = layer_class(("LORA",), Linear4bitHost)
Linear8bitLt = layer_class(("LORA",), Linear8bitHost)
