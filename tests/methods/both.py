"""One program, run on both libraries."""

from __future__ import annotations

import textwrap
from typing import Any

from tests.reference.sides import Ours, Reference

_RUN = "(lambda names: (exec(code, names), names['result'])[1])({'peft': peft, 'torch': torch})"


def run(side: Ours | Reference, code: str, **names: Any) -> Any:
    """What the program leaves in `result`; it finds `peft`, `torch` and the given names."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return side.ask("call", _RUN, code=given + textwrap.dedent(code))
