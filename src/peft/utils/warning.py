"""The path of HF PEFT for warnings."""

from peft.errors import PeftWarning as PeftWarning
