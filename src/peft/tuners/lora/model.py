"""The path of HF PEFT for `LoraModel`."""

from peft.tuner import tuner_class

LoraModel = tuner_class("LORA")
