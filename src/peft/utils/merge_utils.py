"""The path of HF PEFT for functions that combine task tensors."""

from peft.combine.merge import *  # noqa: F403
from peft.combine.prune import *  # noqa: F403
