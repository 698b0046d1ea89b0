"""The path of HF PEFT for its Megatron layer. None is made here: Megatron's parallel layers can't be adapted yet."""

from peft.layer import BaseTunerLayer


class LoraParallelLinear(BaseTunerLayer):
    """For `isinstance` checks, which are always False."""
