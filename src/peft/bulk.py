"""Work that makes or drops thousands of modules at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bulk() -> Iterator[None]:
    """Run the body with the garbage collector paused, if it is on.

    While thousands of modules are made, none of which is garbage, it walks all objects of the process again and again:
    half of the time that adding an adapter to a large model takes.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
