"""A resumed run is the run that never stopped, bit for bit; and what does not fit is said."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn

from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    load_training_state,
    save_training_state,
)
from peft.errors import CorruptFileError, LoadError, PeftWarning, SaveError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(names: tuple[str, ...] = ("one", "two"), **options) -> PeftModel:
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["first", "second"], "lora_dropout": 0.3, **options}
    model = PeftModel(Net(), LoraConfig(**config, modules_to_save=["head"]), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config, modules_to_save=["head"]))
    return model.train()


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, centered=True),
}
SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "warmup": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 4)),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


def groups_of(model: nn.Module, turned: bool = False) -> list[dict]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    a = [p for n, p in named if "lora_A" in n]
    rest = [p for n, p in named if "lora_A" not in n]
    return [{"params": a[:: -1 if turned else 1], "weight_decay": 0.0}, {"params": rest[:: -1 if turned else 1]}]


class Run:
    """A training run with dropout and data that depend on all random numbers."""

    def __init__(self, optimizer: str = "AdamW", scheduler: str = "cosine", turned: bool = False, **options) -> None:
        self.model = adapted(**options)
        for adapter in ("one", "two"):
            self.model.set_requires_grad(adapter)
        self.optimizer = OPTIMIZERS[optimizer](groups_of(self.model, turned))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def steps(self, count: int) -> None:
        for number in range(count):
            x = torch.randn(4, 6) + random.random() + numpy.random.rand()
            with self.model.use(("one", "two")[number % 2]):
                loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(loss.item()) if plateau else self.scheduler.step()

    def save(self, folder) -> None:
        save_training_state(folder, self.model, self.optimizer, self.scheduler, step=4, extra={"epoch": 1, "best": 0.5})

    def load(self, folder) -> dict:
        return load_training_state(folder, self.model, self.optimizer, self.scheduler)


def same_model(one: nn.Module, two: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [*((o, "cosine") for o in OPTIMIZERS), *(("SGD", s) for s in SCHEDULERS if s != "cosine")],
)
def test_a_resumed_run_is_the_run_that_never_stopped(optimizer, scheduler, tmp_path):
    run = Run(optimizer, scheduler)
    random.seed(3), numpy.random.seed(4)
    run.steps(4)
    run.save(tmp_path)
    run.steps(4)
    again = Run(optimizer, scheduler, turned=True)
    random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    assert again.load(tmp_path) == {"step": 4, "extra": {"epoch": 1, "best": 0.5}, "adapters": ["one", "two"]}
    again.steps(4)
    same_model(again.model, run.model)
    assert again.scheduler.state_dict().keys() == run.scheduler.state_dict().keys()


def test_the_files_hold_no_pickle_and_name_parameters(tmp_path):
    run = Run()
    run.steps(2)
    run.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training_state.json", "training_state.safetensors"]
    state = json.loads((tmp_path / "training_state.json").read_text())["optimizer"]["state"]
    assert "base_model.model.first.lora_A.one.weight" in state


def test_adalora_goes_on_pruning_where_it_was(tmp_path):
    def run():
        torch.manual_seed(0)
        config = AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=8, target_modules=["first", "second"]
        )
        model = get_peft_model(Net(), config).train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def steps(model, optimizer, numbers):
        for number in numbers:
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()

    model, optimizer = run()
    steps(model, optimizer, range(1, 5))
    save_training_state(tmp_path, model, optimizer)
    steps(model, optimizer, range(5, 9))
    again, fresh = run()
    load_training_state(tmp_path, again, fresh)
    steps(again, fresh, range(5, 9))
    same_model(again, model)
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_prompts_are_resumed(tmp_path):
    from tests.models import build

    def run():
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), config)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    model, optimizer = run()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    save_training_state(tmp_path, model, optimizer)
    again, fresh = run()
    load_training_state(tmp_path, again, fresh)
    same_model(again, model)


def test_what_does_not_fit_is_said_and_changes_nothing(tmp_path):
    run = Run()
    run.steps(2)
    run.save(tmp_path)
    other = Run(target_modules=["first"])
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(LoadError, match=r"second\.lora_A"):
        other.load(tmp_path)
    with pytest.raises(LoadError, match="SGD"):
        Run("SGD").load(tmp_path)
    one_group = Run()
    one_group.optimizer = torch.optim.AdamW([p for p in one_group.model.parameters() if p.requires_grad])
    with pytest.raises(LoadError, match="divided otherwise"):
        one_group.load(tmp_path)
    fewer = Run()
    fewer.model.set_adapter("one")
    fewer.optimizer = torch.optim.AdamW([p for p in fewer.model.parameters() if p.requires_grad])
    with pytest.raises(LoadError, match=r"two\.weight"):
        fewer.load(tmp_path)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_json_cannot_hold_is_refused_and_leaves_the_old_state(tmp_path):
    run = Run()
    run.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SaveError, match=r"extra.*object"):
        save_training_state(tmp_path, run.model, run.optimizer, extra={"x": object()})
    run.model.delete_adapter("two")
    with pytest.raises(SaveError, match="not the model's"):
        save_training_state(tmp_path, run.model, run.optimizer)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_damaged_state_is_refused(tmp_path):
    run = Run()
    run.save(tmp_path)
    path = tmp_path / "training_state.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CorruptFileError, match="format 2"):
        run.load(tmp_path)


RANK = """
import random, sys, numpy, torch
from torch import distributed
from tests.training.test_training_state import Run

def numbers():
    return random.random(), numpy.random.rand(), *torch.rand(2).tolist()

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
run = Run()
random.seed(rank), numpy.random.seed(rank), torch.manual_seed(rank)
run.save(folder + "/state")
expected = numbers()
distributed.barrier()
Run().load(folder + "/state")
assert numbers() == expected
print(expected)
"""


def test_each_process_has_its_random_numbers_again(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=240) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], done
    assert done[0][0] != done[1][0]
    run = Run()
    with pytest.warns(PeftWarning, match="2 processes"):
        run.load(tmp_path / "state")


def test_sharded_tensors_are_for_accelerate(tmp_path):
    run = Run()
    next(run.model.parameters()).ds_id = 0  # as DeepSpeed marks the parameters that it has partitioned
    with pytest.raises(SaveError, match="save_state"):
        run.save(tmp_path)
    with pytest.raises(LoadError, match="save_state"):
        run.load(tmp_path)
