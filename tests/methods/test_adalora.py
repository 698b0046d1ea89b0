"""AdaLoRA while it trains: when it prunes, what it prunes, and what is left in files."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import peft
from tests.methods.both import run

SCHEDULE = {"init_r": 6, "target_r": 3, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}

TRAIN = """
    import zlib
    from torch import nn

    base = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8))
    config = peft.AdaLoraConfig(target_modules=["0", "2"], **schedule)
    model = peft.get_peft_model(base, config).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if "ranknum" not in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ranks = model.base_model.rankallocator
    result = []
    for step in range(schedule["total_step"] + 3):
        torch.manual_seed(step)
        loss = ((model(torch.randn(4, 10)) - torch.randn(4, 8)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        left = {n: (p != 0).flatten().tolist() for n, p in model.named_parameters() if "lora_E" in n}
        result.append((ranks.budget_schedule(step), left))
"""


def model(**changes) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8))
    config = peft.AdaLoraConfig(target_modules=["0", "2"], **{**SCHEDULE, **changes})
    return peft.get_peft_model(base, config).train()


def steps(adapted: nn.Module, which: range, allocate: bool = True) -> None:
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for step in which:
        optimizer.zero_grad()
        adapted(torch.randn(4, 10)).square().mean().backward()
        optimizer.step()
        if allocate:
            adapted.base_model.update_and_allocate(step)


def test_prunes_what_the_reference_prunes(pair):
    ours, reference = (run(side, TRAIN, schedule=SCHEDULE) for side in (pair.ours, pair.reference))
    assert ours == reference


def test_files_hold_the_ranks_that_are_left(tmp_path):
    adapted = model()
    steps(adapted, range(1, 11))
    adapted.eval().save_pretrained(tmp_path)
    pattern = peft.AdaLoraConfig.from_pretrained(tmp_path).rank_pattern
    assert sum(map(sum, pattern.values())) == 6
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    for key, kept in pattern.items():
        path = key.removesuffix(".lora_E")
        assert loaded.get_submodule(f"base_model.model.{path}").lora_E["default"].shape == (sum(kept), 1)
    x = torch.randn(3, 10)
    torch.testing.assert_close(loaded.eval()(x), adapted(x), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_before_the_end_is_whole(tmp_path):
    adapted = model()
    steps(adapted, range(1, 6))  # pruned at step 4, grown back at step 5
    state = peft.get_peft_model_state_dict(adapted)
    assert all(t.shape[0] == 6 for name, t in state.items() if "lora_E" in name)


def test_the_loss_gets_the_orthogonality_term_in_training_only():
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 8)

        def forward(self, x):
            from types import SimpleNamespace

            return SimpleNamespace(loss=self.layer(x).square().mean())

    config = peft.AdaLoraConfig(target_modules=["layer"], **SCHEDULE)
    adapted = peft.get_peft_model(WithLoss(), config)
    x = torch.randn(2, 10)
    with torch.no_grad():
        plain = adapted.eval()(x).loss
    layer = adapted.base_model.model.layer
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    expected = 0.5 * ((a @ a.mT - torch.eye(6)).norm() + (b.mT @ b - torch.eye(6)).norm()) / 2
    torch.testing.assert_close(adapted.train()(x).loss, plain + expected)


def test_warns_when_nobody_allocates():
    adapted = model()
    with pytest.warns(peft.PeftWarning, match="prunes no ranks"):
        steps(adapted, range(5), allocate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        steps(model(), range(9))


def test_the_trainer_prunes_by_itself(tmp_path):
    transformers = pytest.importorskip("transformers")
    from peft.integrations.callbacks import AllocationCallback

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 8)

        def forward(self, x, labels=None):
            y = self.layer(x)
            return {"loss": (y - labels).square().mean(), "logits": y}

    rows = [{"x": torch.randn(10), "labels": torch.randn(8)} for _ in range(16)]
    adapted = peft.get_peft_model(Task(), peft.AdaLoraConfig(target_modules=["layer"], **SCHEDULE))
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True
    )
    transformers.Trainer(adapted, arguments, train_dataset=rows, callbacks=[AllocationCallback()]).train()
    assert int((adapted.base_model.model.layer.lora_E["default"] != 0).sum()) == 3


@pytest.mark.parametrize(
    "changes", [{"total_step": None}, {"tinit": 9}, {"use_dora": True}, {"init_r": 0}], ids=lambda c: next(iter(c))
)
def test_refuses_configs_that_can_not_work(changes):
    with pytest.raises(ValueError):
        model(**changes)
