"""Routes: threads, async tasks, samples with their own adapters, and forward passes that backward runs again."""

from __future__ import annotations

import asyncio
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model, registry, routing
from peft.config import TargetedConfig
from peft.errors import ConfigError, PeftWarning, StateError, TargetError, UnsupportedError
from peft.method import WeightMethod
from peft.testing import PLACES, Place, samples, train

NAMES = ("one", "two", "three")
METHODS = [
    n
    for n, m in registry.all_methods().items()
    if isinstance(m, WeightMethod) and m.samples and m.copies is None and n != "TRAINABLE_TOKENS"
]


def mlp(checkpointed: str = "") -> PeftModel:
    torch.manual_seed(0)
    model = PeftModel(Blocks(checkpointed), LoraConfig(r=2, target_modules=["0", "2"]), "one")
    for name in NAMES[1:]:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["0", "2"]))
    for seed, name in enumerate(NAMES):
        model.set_adapter(name)
        train(model, seed)
    return model.eval()


class Blocks(nn.Module):
    def __init__(self, checkpointed: str) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.checkpointed:
            return self.blocks(x)
        options = {"context_fn": routing.context_fn} if self.checkpointed == "bound" else {}
        return checkpoint(self.blocks, x, use_reentrant=self.checkpointed == "reentrant", **options)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    return LlamaForCausalLM(config)


def adapted_llama(**options) -> PeftModel:
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model = get_peft_model(llama(), LoraConfig(**config), "one")
        for name in NAMES[1:]:
            model.add_adapter(name, LoraConfig(**config))
        for seed, name in enumerate(NAMES):
            model.set_adapter(name)
            train(model, seed)
    model.set_adapter("one")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in NAMES for part in name.split(".")))
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    expected = {n: g for n, g in expected.items() if g.any()}
    found = {n: g for n, g in found.items() if g.any()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_threads_do_not_see_each_others_adapters():
    model, x = mlp(), torch.randn(2, 4)
    with torch.no_grad():
        expected = {}
        for name in NAMES:
            with model.use(name):
                expected[name] = model(x)
        with model.disable_adapter():
            expected[routing.BASE] = model(x)
        barrier = threading.Barrier(8)

        def work(number: int) -> int:
            barrier.wait()
            wrong = 0
            for step in range(60):
                name = (*NAMES, routing.BASE)[(number + step) % 4]
                with torch.no_grad(), model.use(name) if name != routing.BASE else model.disable_adapter():
                    wrong += not torch.equal(model(x), expected[name])
            return wrong

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0


def test_a_compiled_model_sees_the_route_of_its_thread_and_compiles_once_for_each():
    torch._dynamo.reset()
    model, counter = mlp(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = {name: run(model, name, x) for name in (*NAMES, None)}
        assert torch.equal(compiled(x), model(x))
        for name in expected:
            assert torch.equal(run(compiled, name, x, model), expected[name])
        count = counter.frame_count

        met = threading.Barrier(4, timeout=60)
        turn = threading.Lock()  # torch 2.13 may compile anew where two threads check the same guards at once

        def work(index: int) -> bool:
            name = list(expected)[index % len(expected)]
            with torch.no_grad(), model.use(name) if name else model.disable_adapter():
                met.wait()  # four routes are open
                with turn:
                    return torch.equal(compiled(x), expected[name])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(24)))
    assert counter.frame_count == count


def run(call, name, x, model=None):
    with (model or call).use(name) if name else (model or call).disable_adapter():
        return call(x)


def test_a_compiled_model_sees_the_route_of_its_task():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = {name: run(model, name, x) for name in NAMES}
        alone = model(x)

    async def task(name: str | None) -> bool:
        right = []
        for _ in range(4):
            if name is None:
                right.append(torch.equal(compiled(x), alone))
                await asyncio.sleep(0)
                continue
            with model.use(name):
                await asyncio.sleep(0)
                right.append(torch.equal(compiled(x), expected[name]))
        return all(right)

    async def all_tasks() -> list[bool]:
        return await asyncio.gather(*(task(name) for name in (*NAMES, None) * 2))

    with torch.no_grad():
        assert all(asyncio.run(all_tasks()))


def test_async_tasks_do_not_see_each_others_adapters():
    model, x = mlp(), torch.randn(2, 4)

    @torch.no_grad()
    def alone(name: str) -> torch.Tensor:
        with model.use(name):
            return model(x)

    expected = {name: alone(name) for name in NAMES}

    async def task(name: str) -> bool:
        with model.use(name):
            right = True
            for _ in range(5):
                await asyncio.sleep(0)
                right &= torch.equal(model(x), expected[name])
            return right

    async def all_tasks() -> list[bool]:
        return await asyncio.gather(*(task(name) for name in NAMES * 3))

    assert all(asyncio.run(all_tasks()))


@torch.no_grad()
def test_the_innermost_context_counts():
    model, x = mlp(), torch.randn(2, 4)
    with model.use("two"):
        two = model(x)
        with model.disable_adapter():
            base = model(x)
            with model.use("three"):
                three = model(x)
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), two)
    with model.use("three"):
        assert torch.equal(model(x), three)
    assert torch.equal(model.unload()(x), base)


def test_disabling_leaves_a_frozen_adapter_frozen():
    model = mlp()
    model.set_adapter("one", inference_mode=True)
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    assert model.has_active_enabled_adapter
    assert not any(p.requires_grad for p in model.parameters())


def two_adapters(place: Place, config: TargetedConfig) -> PeftModel | None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        try:
            model = PeftModel(place.build().double(), place.target(config), "one")
            model.add_adapter("two", place.target(config))
        except (TargetError, ConfigError, UnsupportedError):
            return None
    return model


@pytest.mark.parametrize("kind", METHODS)
def test_samples_train_their_own_adapters(kind):
    """One batch of samples of several adapters gives each the gradients of a batch of its own."""
    tried = 0
    for place in PLACES.values():
        model = next((m for config in samples(kind) if (m := two_adapters(place, config)) is not None), None)
        if model is None:
            continue
        for seed, name in enumerate(("one", "two")):
            model.set_adapter(name)
            train(model, seed)
        model.set_requires_grad(["one", "two"])  # copies of modules are active one at a time
        model.eval()
        x = place.input(torch.float64)
        y = model(x, adapter_names=["two", "one", "two"])
        towards = torch.randn(y.shape, dtype=y.dtype)
        (y * towards).sum().backward()
        mixed = gradients(model)
        for rows, name in (([0, 2], "two"), ([1], "one")):
            with model.use(name):
                (model(x[rows]) * towards[rows]).sum().backward()
        same_gradients(mixed, gradients(model))
        tried += 1
    assert tried


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["use", "rows", "disabled backward"])
def test_checkpointed_blocks_of_transformers_keep_their_route(reentrant, how):
    ids = torch.arange(1, 13).view(3, 4)

    def run(model: PeftModel) -> dict[str, torch.Tensor]:
        model.train()
        if how == "rows":
            loss = model(ids, labels=ids, adapter_names=["two", "one", "three"]).loss
            loss = loss + model(ids, labels=ids, adapter_names=["one", "__base__", "one"]).loss
        elif how == "use":
            with model.use("two"):
                loss = model(ids, labels=ids).loss
        else:
            loss = model(ids, labels=ids).loss
        with model.use("three"):  # the route of backward is not that of forward
            loss.backward()
        return gradients(model)

    expected = run(adapted_llama())
    model = adapted_llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same_gradients(run(model), expected)


def test_checkpointing_switched_on_before_adapting_keeps_routes():
    ids = torch.arange(1, 9).view(2, 4)
    base = llama()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with model.use("default"):
        loss = model(ids, labels=ids).loss
    model.base_model.set_adapter("other")
    model.set_requires_grad("default")
    loss.backward()
    assert {name.split(".")[-2] for name in gradients(model)} == {"default"}


@pytest.mark.parametrize("kind", ["plain", "reentrant"])
def test_other_checkpoints_on_another_route_say_so(kind):
    model, x = mlp(kind).train(), torch.randn(2, 4, requires_grad=True)
    with model.use("two"):
        y = model(x)
    with pytest.raises(StateError, match="context_fn"):
        y.sum().backward()
    with model.use("two"):
        model(x).sum().backward()


def test_context_fn_keeps_the_route():
    x = torch.randn(2, 4)
    found = []
    for kind in ("", "bound"):
        model = mlp(kind).train()
        model.set_requires_grad("two")
        with model.use("two"):
            y = model(x)
        y.square().sum().backward()
        found.append(gradients(model))
    same_gradients(*found)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [2, 3]}])
def test_rows_reach_what_trains_besides(options):
    model = adapted_llama(**options).train()
    ids = torch.arange(1, 13).view(3, 4)
    rows = ["two", "one", "two"]
    y = model(ids, adapter_names=rows).logits
    y.square().sum().backward()
    mixed = gradients(model)
    for index, name in (([0, 2], "two"), ([1], "one")):
        with model.use(name):
            alone = model(ids[index]).logits
        torch.testing.assert_close(y[index], alone)
        alone.square().sum().backward()
    same_gradients(mixed, gradients(model))


@torch.no_grad()
def test_beams_follow_their_sample():
    model = adapted_llama().eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["two", "three"], **options)
    for row, name in enumerate(("two", "three")):
        with model.use(name):
            alone = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_unknown_names_and_wrong_counts_are_errors():
    model, x = mlp(), torch.randn(4, 4)
    with pytest.raises(ValueError, match="Did you mean 'two'"):
        model(x, adapter_names=["tow"] * 4)
    with pytest.raises(StateError, match="one name per sample"):
        model(x, adapter_names=["one", "two", "three"])


class Dispatch(nn.Module):
    """A layer of experts, each a module, that get the tokens that are sent to them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        for number, expert in enumerate(self.experts):
            mine = (x[:, 0] > 0) == bool(number)
            y[mine] = expert(x[mine])
        return y


def test_an_expert_that_cannot_know_its_samples_says_so():
    config = LoraConfig(r=2, target_modules=["0", "1"])
    model = PeftModel(Dispatch(), config, "one").eval()
    model.add_adapter("two", config)
    x = torch.randn(4, 4)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="experts"):
        model(x, adapter_names=["one", "two", "one", "one"])
    with torch.no_grad():
        model(x, adapter_names=["one"] * 4)


def test_stacks_of_experts_know_their_samples():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_parameters=["gate_up_proj", "down_proj"], target_modules=["q_proj"])
    model = get_peft_model(MixtralForCausalLM(config), lora, "one")
    model.add_adapter("two", lora)
    for name in ("one", "two"):
        model.set_adapter(name)
        train(model, 1)
    model.eval()
    ids = torch.arange(1, 13).view(3, 4)
    y = model(ids, adapter_names=["two", "one", "two"]).logits
    for index, name in (([0, 2], "two"), ([1], "one")):
        with model.use(name):
            torch.testing.assert_close(y[index], model(ids[index]).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_reach_an_adapted_layer_inside_another():
    """Tokens of one adapter wrap an output layer that another one adapts."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["lm_head"]), "head").eval()
    train(model)
    model.add_adapter("tokens", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3]))
    ids = torch.arange(1, 7).view(2, 3)
    mixed = model(ids, adapter_names=["head", "__base__"]).logits
    with model.use("head"):
        torch.testing.assert_close(mixed[:1], model(ids[:1]).logits)
