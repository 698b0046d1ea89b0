"""The version, in one place; `importlib.metadata.version("peft")` agrees."""

__version__ = "1.0.0"
