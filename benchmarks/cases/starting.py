"""Starting: importing, adapting a model, loading, switching, saving."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases.methods import PROJECTIONS
from benchmarks.cases.models import Size, llama, stack
from benchmarks.job import Case, Job

LLAMA_70B = Size(layers=80, hidden=8192, inner=28672, vocab=32000, rows=0, tokens=0)


def imports(side: str, what: str) -> Job:
    """Importing in a fresh process, after torch."""

    def fresh(before: str, after: str) -> list[str]:
        code = f"import time, torch; from benchmarks.reads import reads\n{before} {what}; {after}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        return done.stdout.split()

    def seconds() -> float:
        return float(fresh("t = time.perf_counter();", "print(time.perf_counter() - t)")[-1])

    def counts() -> dict[str, int]:
        *_, files, opens = fresh("with reads() as found:", "print(len(set(found)), len(found))")
        return {"files": int(files), "opens": int(opens)}

    return Job(lambda _: None, seconds=seconds, counts=counts)


def inject_llama_70b(side: str) -> Job:
    """LoRA on all 560 linear layers of a model of the shape of Llama 70B, on the meta device."""
    import peft

    model = llama(LLAMA_70B, torch.bfloat16, "meta", num_key_value_heads=8)

    def run(_: Any) -> None:
        peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=PROJECTIONS), low_cpu_mem_usage=True).unload()

    # `unload` is part of the run, so that one model serves all samples: building it takes longer than adapting it.
    return Job(run)


def inject(side: str, blocks: int, width: int) -> Job:
    """LoRA on 7 * blocks layers of a real model."""
    import peft

    model = stack(blocks, width)
    return Job(
        lambda m: peft.get_peft_model(m, peft.LoraConfig(r=4, target_modules=PROJECTIONS)),
        prepare=partial(copy.deepcopy, model),
    )


def saved_lora(blocks: int = 20, width: int = 16) -> tuple[Any, str]:
    """A model with an adapter on 7 * blocks layers, and a folder that holds it."""
    import peft

    model = peft.get_peft_model(stack(blocks, width), peft.LoraConfig(r=4, target_modules=PROJECTIONS))
    folder = tempfile.mkdtemp(prefix="peft-bench-")
    model.save_pretrained(folder)
    return model, folder


def load(side: str, already: int) -> Job:
    """Loading an adapter of 140 layers beside `already` others, and (outside the clock) removing it."""
    import peft

    _, folder = saved_lora()
    model = peft.PeftModel.from_pretrained(stack(20, 16), folder)
    for index in range(1, already):
        model.add_adapter(f"a{index}", peft.LoraConfig(r=4, target_modules=PROJECTIONS))

    def forget() -> None:
        if "new" in model.peft_config:
            model.delete_adapter("new")

    return Job(lambda _: model.load_adapter(folder, "new"), prepare=forget)


def first_load(side: str) -> Job:
    """`PeftModel.from_pretrained` of an adapter of 140 layers."""
    import peft

    _, folder = saved_lora()
    model = stack(20, 16)
    return Job(lambda m: peft.PeftModel.from_pretrained(m, folder), prepare=partial(copy.deepcopy, model))


def switch(side: str, what: str) -> Job:
    """`set_adapter`, the state dict and saving, with two adapters on 140 layers."""
    import peft

    model, folder = saved_lora()
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=PROJECTIONS))
    names = ["default", "other"]

    def set_adapter(_: Any) -> None:
        names.reverse()
        model.set_adapter(names[0])

    runs: dict[str, Callable[[Any], Any]] = {
        "set_adapter": set_adapter,
        "state dict": lambda _: peft.get_peft_model_state_dict(model),
        "save": lambda _: model.save_pretrained(folder, selected_adapters=["default"]),
    }
    return Job(runs[what])


def cases() -> list[Case]:
    """All groups of starting."""
    usual = "from peft import LoraConfig, get_peft_model"
    return [
        Case("import", "import peft", partial(imports, what="import peft")),
        Case("import", "LoraConfig, get_peft_model", partial(imports, what=usual)),
        Case("inject", "Llama 70B on meta, 560 layers, and out again", inject_llama_70b),
        Case("inject", "560 layers", partial(inject, blocks=80, width=16)),
        Case("inject", "5,040 layers", partial(inject, blocks=720, width=8), rounds=3),
        Case("load", "first", first_load),
        Case("load", "2nd", partial(load, already=1)),
        Case("load", "50th", partial(load, already=49)),
        *(Case("switch", what, partial(switch, what=what)) for what in ("set_adapter", "state dict", "save")),
    ]
