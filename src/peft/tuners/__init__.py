"""Import paths of HF PEFT: `peft.tuners.<method>`, with `.config`, `.layer` and `.model`. No logic lives here."""

from typing import Any

from peft._names import submodule
from peft.tuners import _paths

_paths.install()


def __getattr__(name: str) -> Any:
    import peft

    if name.startswith("_"):
        raise AttributeError(name)
    return submodule(__name__, name) or getattr(peft, name)
