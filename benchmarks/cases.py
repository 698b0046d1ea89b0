"""The cases, by group. They use the common API only, so either library can run them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.job import Case, Job

TOKENS, WIDTH = 1024, 1024
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r16": ("LoraConfig", {"r": 16}),
    "DoRA r16": ("LoraConfig", {"r": 16, "use_dora": True}),
    "LoHa r8": ("LoHaConfig", {"r": 8}),
    "LoKr r8": ("LoKrConfig", {"r": 8}),
    "LoKr r16 f4": ("LoKrConfig", {"r": 16, "decompose_factor": 4}),
    "HRA r8": ("HRAConfig", {"r": 8}),
    "FourierFT n1000": ("FourierFTConfig", {"n_frequency": 1000}),
    "C3A b128": ("C3AConfig", {"block_size": 128}),
    "BOFT b4": ("BOFTConfig", {"boft_block_size": 4}),
    "OFT b32": ("OFTConfig", {"oft_block_size": 32}),
    "VeRA r256": ("VeraConfig", {"r": 256}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 1000}),
    "MiSS r64": ("MissConfig", {"r": 64}),
    "RandLoRA r32": ("RandLoraConfig", {"r": 32}),
    "WaveFT n1000": ("WaveFTConfig", {"n_frequency": 1000}),
    "SHiRA r16": ("ShiraConfig", {"r": 16}),
    "RoAd": ("RoadConfig", {}),
    "GraLoRA r32": ("GraloraConfig", {"r": 32}),
    "DeLoRA r16": ("DeloraConfig", {"r": 16}),
    "HiRA r16": ("HiraConfig", {"r": 16}),
    "VB-LoRA r4": ("VBLoRAConfig", {"r": 4, "num_vectors": 64, "vector_length": 64}),
    "PVeRA r256": ("PveraConfig", {"r": 256}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "PSOFT r16": ("PsoftConfig", {"r": 16}),
    "OSF": ("OSFConfig", {}),
    "Uni-LoRA r4": ("UniLoraConfig", {"r": 4}),
    "PEANuT": ("PeanutConfig", {}),
    "GLoRA": ("GloraConfig", {}),
    "FRoD": ("FrodConfig", {}),
    "DEFT": ("DeftConfig", {}),
    "BEFT": ("BeftConfig", {}),
    "AdaMSS": ("AdamssConfig", {}),
    "SuperTuning": ("SupertuningConfig", {}),
}
SHAPES = {
    "1 token, 2048 × 2048": (1, 2048, 2048),
    "32 tokens, 2048 × 2048": (32, 2048, 2048),
    "8192 tokens, 256 × 256": (8192, 256, 256),
}
"""Tokens, inputs and outputs of layers beside the square ones of 1024."""
SHAPED = ("LoRA r16", "DoRA r16", "LoHa r8", "OFT b32", "VeRA r256")
DROPOUT = {"LoRA r16": "lora_dropout", "DoRA r16": "lora_dropout"}


class Single(nn.Module):
    """One linear layer."""

    def __init__(self, inner: int, out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = nn.Linear(inner, out, bias=False, dtype=dtype)
        self.lin.requires_grad_(False)


def packed(layer: nn.Linear, bits: int) -> nn.Module:
    """A linear layer of bitsandbytes' with the weight of a plain one."""
    import bitsandbytes as bnb

    sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
    if bits == 8:
        made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4")
    made.to(dtype).load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


class Block(nn.Module):
    """The seven projections of a transformer block, without the rest of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in PROJECTIONS:
            x = getattr(self, name)(x)
        return x


def stack(blocks: int, width: int) -> nn.Sequential:
    """A model of 7 * blocks linear layers, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks)))


def llama(layers: int, hidden: int, inner: int, vocab: int, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        vocab_size=vocab,
        **{"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, **changes},
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def config(method: str, **more: Any) -> Any:
    """The config of a method."""
    import peft

    name, options = METHODS[method]
    return getattr(peft, name)(**{**options, **more})


# one layer


def layer(
    side: str,
    method: str,
    dtype: str,
    dropout: float = 0.0,
    inner: int = WIDTH,
    out: int = WIDTH,
    tokens: int = TOKENS,
    train: bool = True,
    device: str = "cpu",
    bits: int = 16,
) -> Job:
    """Forward and backward of one adapted layer, input gradient included; or in inference forward alone.

    With 8 or 4 bits the layer is one of bitsandbytes'.
    """
    import peft

    model = Single(inner, out, DTYPES[dtype])
    if bits < 16:
        model.lin = packed(model.lin, bits)
        setattr(model, f"is_loaded_in_{bits}bit", True)  # as transformers' loaders do
    model = model.to(device)
    frozen = list(model.parameters())
    module: nn.Module = model.lin
    if side != "floor":
        options = {DROPOUT[method]: dropout} if dropout else {}
        model = peft.get_peft_model(model, config(method, target_modules=["lin"], **options))
        module = model.get_base_model().lin
        model.train(train)
    x = torch.randn(tokens, inner, dtype=DTYPES[dtype], device=device, requires_grad=train)
    grad = torch.randn(tokens, out, dtype=DTYPES[dtype], device=device)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step(_: Any) -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        module(x).backward(grad)

    def run(_: Any) -> None:
        with torch.no_grad():
            module(x)

    weights = [*frozen, *parameters, *(b for b in model.buffers())]
    repeats = max(2, 4 * WIDTH**3 // (inner * out * max(tokens, 32)))
    once = step if train else run
    return Job(once, repeats=min(repeats, 40), forward=lambda: module(x), frozen=weights, device=device)


class Stored(nn.Module):
    """One layer of any type, and a name for it."""

    def __init__(self, make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = make().to(dtype).requires_grad_(False)


class Experts(nn.Module):
    """A stack of expert matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(8, 512, 256) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.stack)


def transposed() -> nn.Module:
    """GPT-2's linear layer."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(1024, 1024)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "Conv2d 64 -> 128, 3 × 3": (lambda: nn.Conv2d(64, 128, 3, padding=1), lambda: torch.randn(4, 64, 32, 32)),
    "Conv2d 256 -> 256, 1 × 1": (lambda: nn.Conv2d(256, 256, 1), lambda: torch.randn(4, 256, 16, 16)),
    "Conv1D 1024 -> 1024": (transposed, lambda: torch.randn(1024, 1024)),
    "Embedding 8192 × 512": (lambda: nn.Embedding(8192, 512), lambda: torch.randint(8192, (4, 256))),
    "8 experts 512 × 256": (Experts, lambda: torch.randn(8, 128, 512)),
}
"""Layers that are no `nn.Linear`, and what they are given."""
MADE_FOR = {
    "LoRA r16": tuple(KINDS),
    "DoRA r16": tuple(kind for kind in KINDS if "experts" not in kind),
    "LoHa r8": tuple(kind for kind in KINDS if "Conv2d" in kind),
    "HiRA r16": ("Conv1D 1024 -> 1024", "Embedding 8192 × 512"),
}
"""Those on which the reference has a method."""


def other_layer(side: str, kind: str, method: str, dtype: str, train: bool) -> Job:
    """Forward and backward of one adapted layer, or forward alone; embeddings train no input."""
    import peft

    make, inputs = KINDS[kind]
    model = Stored(make, DTYPES[dtype])
    module: nn.Module = model.lin
    if side != "floor":
        where = {"target_parameters": ["lin.stack"], "target_modules": []} if "experts" in kind else {}
        model = peft.get_peft_model(model, config(method, **{"target_modules": ["lin"], **where}))
        module = model.get_base_model().lin
        model.train(train)
    x = inputs()
    if x.is_floating_point():
        x = x.to(DTYPES[dtype]).requires_grad_(train)
    with torch.no_grad():
        grad = torch.randn_like(module(x))
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step(_: Any) -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        y = module(x)
        if y.requires_grad:
            y.backward(grad)

    def run(_: Any) -> None:
        with torch.no_grad():
            module(x)

    return Job(step if train else run, repeats=8)


# one model


def training_step(side: str, method: str, dtype: str, checkpointing: bool, device: str = "cpu") -> Job:
    """Forward, backward and AdamW on a small Llama, all linear layers adapted; the floor has no AdamW."""
    import peft

    model = llama(4, 512, 1408, 4096, DTYPES[dtype]).to(device)
    frozen = list(model.parameters())
    optimizer = None
    if side != "floor":
        model = peft.get_peft_model(model, config(method, target_modules="all-linear"))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    inner = model if side == "floor" else model.get_base_model()
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 4096, (4, 256), device=device)
    embedded = inner.get_input_embeddings()(ids).detach().requires_grad_(True)

    def loss() -> torch.Tensor:
        return model(inputs_embeds=embedded, labels=ids).loss

    def step(_: Any) -> None:
        embedded.grad = None
        if optimizer is not None:
            optimizer.zero_grad()
        loss().backward()
        if optimizer is not None:
            optimizer.step()

    return Job(step, forward=loss, frozen=[*frozen, *model.parameters(), *model.buffers()], device=device)


def inference(side: str, method: str, tokens: int) -> Job:
    """Forward of a small Llama, unmerged."""
    import peft

    model = llama(4, 512, 1408, 4096, torch.bfloat16)
    if side != "floor":
        model = peft.get_peft_model(model, config(method, target_modules="all-linear", inference_mode=True))
    model.eval()
    ids = torch.randint(0, 4096, (1, tokens))

    def run(_: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids)

    return Job(run, repeats=3)


# start and switch


def imports(side: str, what: str) -> Job:
    """Importing in a fresh process, after torch."""
    code = f"import time, torch; t = time.perf_counter(); {what}; print(time.perf_counter() - t)"
    job = Job(lambda _: None)

    def sample(_: Any) -> float:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        return float(done.stdout.split()[-1])

    job.sample = sample  # type: ignore[method-assign]
    return job


def inject_llama_70b(side: str) -> Job:
    """LoRA on all 560 linear layers of a model of the shape of Llama 70B, on the meta device."""
    import peft

    with torch.device("meta"):
        model = llama(80, 8192, 28672, 32000, torch.bfloat16, num_key_value_heads=8)

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


# adapters together


def mixed(side: str, adapters: int, rows: int = 32, tokens: int = 1, device: str = "cpu") -> Job:
    """A batch of rows over several adapters, unmerged, on 7 linear layers."""
    import peft

    model, x = stack(1, 512).to(device), torch.randn(rows, tokens, 512, device=device)
    if side == "floor":
        return Job(lambda _: model(x), repeats=2, device=device)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=PROJECTIONS), adapter_name="a0")
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", peft.LoraConfig(r=16, target_modules=PROJECTIONS))
    model.eval()
    names = [f"a{row % adapters}" for row in range(rows)]

    def run(_: Any) -> None:
        with torch.no_grad():
            model(x, adapter_names=names)

    return Job(run, repeats=2, device=device)


def weighted(side: str, combination: str) -> Job:
    """`add_weighted_adapter` of three adapters on 56 layers."""
    import peft

    options = {"r": 8, "target_modules": PROJECTIONS, "init_lora_weights": False}
    model = peft.get_peft_model(stack(8, 128), peft.LoraConfig(**options), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**options))
    model.add_adapter("c", peft.LoraConfig(**options))
    density = {"density": 0.5} if combination in ("ties", "dare_linear") else {}

    def forget() -> None:
        if "new" in model.peft_config:
            model.delete_adapter("new")

    def run(_: Any) -> None:
        model.add_weighted_adapter(["a", "b", "c"], [0.5, 0.3, 0.2], "new", combination_type=combination, **density)

    return Job(run, prepare=forget)


def merge(side: str, method: str, back: bool) -> Job:
    """Merging (or merging and unmerging) on a small Llama."""
    import peft

    model = llama(4, 512, 1408, 4096, torch.float32)
    model = peft.get_peft_model(model, config(method, target_modules="all-linear"))

    def run(_: Any) -> None:
        model.merge_adapter()
        if back:
            model.unmerge_adapter()

    def restore() -> None:
        if not back and any(getattr(m, "merged", False) for m in model.modules()):
            model.unmerge_adapter()

    return Job(run, prepare=restore)


def _layers() -> list[Case]:
    found = []
    for method in METHODS:
        for dtype in DTYPES:
            for dropout in (0.0, 0.1) if method in DROPOUT else (0.0,):
                name = f"{method}, {dtype}" + (", dropout" if dropout else "")
                make = partial(layer, method=method, dtype=dtype, dropout=dropout)
                found.append(Case("layer", name, make, floor=True, counted=True))
    for shape, (inner, out) in {"1024 -> 4096": (1024, 4096), "4096 -> 1024": (4096, 1024)}.items():
        make = partial(layer, method="LoRA r16", dtype="bf16", dropout=0.0, inner=inner, out=out)
        found.append(Case("layer", f"LoRA r16, bf16, {shape}", make, floor=True, counted=True))
    return found


def _shapes() -> list[Case]:
    found = []
    for name, (tokens, inner, out) in SHAPES.items():
        for method in SHAPED:
            for dtype in DTYPES:
                make = partial(layer, method=method, dtype=dtype, inner=inner, out=out, tokens=tokens)
                found.append(Case("shapes", f"{method}, {dtype}, {name}", make, floor=True))
                make = partial(make, train=False)
                found.append(Case("shapes", f"{method}, {dtype}, {name}, inference", make, floor=True))
    return found


def _quantised() -> list[Case]:
    found = []
    for bits in (8, 4):
        for dropout in (0.0, 0.1):
            name = f"LoRA r16, bf16, {bits} bits" + (", dropout" if dropout else "")
            make = partial(layer, method="LoRA r16", dtype="bf16", dropout=dropout, bits=bits)
            found.append(Case("quantised", name, make, floor=True, counted=True))
    return found


def _kinds() -> list[Case]:
    found = []
    for method, kinds in MADE_FOR.items():
        for kind in kinds:
            for dtype in DTYPES:
                for train in (True, False) if method == "LoRA r16" else (True,):
                    name = f"{method}, {dtype}, {kind}" + ("" if train else ", inference")
                    make = partial(other_layer, kind=kind, method=method, dtype=dtype, train=train)
                    found.append(Case("other layers", name, make, floor="Embedding" not in kind))
    return found


def _models() -> list[Case]:
    found = []
    for method, dtype, checkpointing in (
        ("LoRA r16", "bf16", False),
        ("LoRA r16", "bf16", True),
        ("LoRA r16", "fp32", False),
        ("DoRA r16", "bf16", False),
        ("LoHa r8", "bf16", False),
        ("OFT b32", "bf16", False),
    ):
        name = f"{method}, {dtype}" + (", checkpointing" if checkpointing else "")
        make = partial(training_step, method=method, dtype=dtype, checkpointing=checkpointing)
        found.append(Case("model", name, make, floor=True, counted=True))
    return found


def _all() -> list[Case]:
    cases = [
        Case("import", "import peft", partial(imports, what="import peft")),
        Case(
            "import", "LoraConfig, get_peft_model", partial(imports, what="from peft import LoraConfig, get_peft_model")
        ),
        Case("inject", "Llama 70B on meta, 560 layers, and out again", inject_llama_70b),
        Case("inject", "560 layers", partial(inject, blocks=80, width=16)),
        Case("inject", "5,040 layers", partial(inject, blocks=720, width=8), rounds=3),
        Case("load", "first", first_load),
        Case("load", "2nd", partial(load, already=1)),
        Case("load", "50th", partial(load, already=49)),
        *(Case("switch", what, partial(switch, what=what)) for what in ("set_adapter", "state dict", "save")),
        *_layers(),
        *_shapes(),
        *_kinds(),
        *_models(),
        Case("inference", "LoRA r16, 256 tokens", partial(inference, method="LoRA r16", tokens=256), floor=True),
        Case("inference", "LoRA r16, 1 token", partial(inference, method="LoRA r16", tokens=1), floor=True),
        Case("inference", "DoRA r16, 1 token", partial(inference, method="DoRA r16", tokens=1), floor=True),
        *(Case("mixed", f"32 rows, {n} adapters", partial(mixed, adapters=n), floor=True) for n in (1, 8, 16)),
        Case("mixed", "64 rows, 64 adapters", partial(mixed, adapters=64, rows=64), floor=True),
        Case("mixed", "32 rows of 16 tokens, 16 adapters", partial(mixed, adapters=16, tokens=16), floor=True),
        *(Case("weighted", c, partial(weighted, combination=c)) for c in ("linear", "cat", "svd", "ties")),
        *(Case("merge", f"{m}", partial(merge, method=m, back=False)) for m in ("LoRA r16", "DoRA r16", "LoHa r8")),
        *(Case("merge", f"{m}, and back", partial(merge, method=m, back=True)) for m in ("LoRA r16", "LoHa r8")),
    ]
    return cases


def _on_cuda() -> list[Case]:
    found = []
    for method in METHODS:
        make = partial(layer, method=method, dtype="bf16", device="cuda")
        found.append(Case("cuda layer", f"{method}, bf16", make, floor=True))
    for method in ("LoRA r16", "DoRA r16", "LoHa r8", "OFT b32"):
        make = partial(training_step, method=method, dtype="bf16", checkpointing=False, device="cuda")
        found.append(Case("cuda model", f"{method}, bf16", make, floor=True))
    for adapters in (1, 8, 16):
        make = partial(mixed, adapters=adapters, device="cuda")
        found.append(Case("cuda mixed", f"32 rows, {adapters} adapters", make, floor=True))
    return found


SKIPPED = {
    **({} if find_spec("bitsandbytes") else {"bitsandbytes": _quantised()}),
    **({} if torch.cuda.is_available() else {"a GPU": _on_cuda()}),
}
"""Cases that can't run here, by what they need."""
CASES = {
    case.key: case
    for need, cases in (("", _all()), ("bitsandbytes", _quantised()), ("a GPU", _on_cuda()))
    for case in cases
    if need not in SKIPPED
}
