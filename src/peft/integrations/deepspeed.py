"""DeepSpeed ZeRO-3: parameters that live in shards, and have to be gathered to be read."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under ZeRO-3. If DeepSpeed was never imported, it does not."""
    if "deepspeed" not in sys.modules:
        return False
    from transformers.integrations import is_deepspeed_zero3_enabled  # pyright: ignore[reportPrivateImportUsage]

    return is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[Any]:
    """Run the body with sharded parameters gathered; without ZeRO-3 they are whole already."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    # Not by `import deepspeed`: tools that look beside a file first would take this very one.
    zero = sys.modules["deepspeed"].zero
    with zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield
