"""The path of HF PEFT for the enums, and its way to register a method."""

from peft.config import PeftType as PeftType
from peft.config import TaskType as TaskType
