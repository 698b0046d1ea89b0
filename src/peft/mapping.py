"""Tables of the methods, by `PeftType`, for libraries that look methods up in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import registry
from peft.config import PeftType
from peft.config import get_peft_config as get_peft_config
from peft.mapping_func import inject_adapter_in_model as inject_adapter_in_model
from peft.method import WeightMethod
from peft.tuner import tuner_class


class _Table(Mapping[PeftType, Any]):
    """A view of the registry: always complete, and nothing is imported until it is looked up."""

    def __init__(self, value: Callable[[str], Any], keys: Callable[[], list[str]] = registry.names) -> None:
        self._value, self._keys = value, keys

    def __getitem__(self, key: PeftType | str) -> Any:
        name = str(getattr(key, "value", key))
        if name not in self._keys():
            raise KeyError(key)
        return self._value(name)

    def __iter__(self) -> Iterator[PeftType]:
        return (PeftType(name) for name in self._keys())

    def __len__(self) -> int:
        return len(self._keys())


def _weight_methods() -> list[str]:
    return [name for name in registry.names() if isinstance(registry.method(name), WeightMethod)]


def _tuner(name: str) -> Any:
    method = registry.method(name)
    return tuner_class(name) if isinstance(method, WeightMethod) else method


PEFT_TYPE_TO_CONFIG_MAPPING = _Table(registry.config_class)
PEFT_TYPE_TO_TUNER_MAPPING = _Table(_tuner)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = _Table(_tuner, _weight_methods)
PEFT_TYPE_TO_PREFIX_MAPPING = _Table(lambda name: registry.method(name).prefix, _weight_methods)
