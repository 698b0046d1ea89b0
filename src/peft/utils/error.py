"""The path of HF PEFT for errors."""

from peft.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from peft.errors import PeftError as PeftError
