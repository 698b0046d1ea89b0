"""A PyTorch loop of ten lines: learning, gradient checkpointing, bf16, and going on where one stopped."""

from __future__ import annotations

import pytest
import torch

from peft import PeftModel, prepare_model_for_kbit_training
from tests import models
from tests.training.task import (
    adapted,
    assert_learned,
    assert_same,
    base_model,
    batches,
    frozen,
    optimizer_of,
    train,
    weights,
)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_learns_and_leaves_the_base_alone(options):
    model = adapted(**options)
    before = frozen(model)
    assert_learned(train(model, batches(), optimizer_of(model)))
    assert_same(frozen(model), before)


def _gradients(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model(**batches(1)[0]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [{"lora_dropout": 0.2}, {"use_dora": True}], ids=["dropout", "dora"])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, when, options):
    kind = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    options = {"init_lora_weights": False, **options}
    expected = _gradients(adapted(**options))
    base = base_model()
    if when == "before":
        base.gradient_checkpointing_enable(**kind)
        model = adapted(base, **options)
    else:
        model = adapted(base, **options)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(**kind)
    got = _gradients(model)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)


def test_bf16_base_with_float32_adapters():
    model = adapted(base_model().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, batches(), optimizer_of(model))
    assert_learned(losses)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**batches(1)[0]).logits.dtype == torch.bfloat16


def test_autocast():
    model = adapted()
    optimizer = optimizer_of(model)
    losses = []
    for batch in batches():  # autocast keeps what it cast until it ends, so one context per step
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses += train(model, [batch], optimizer)
    assert_learned(losses)


def test_prepared_for_kbit_training():
    base = prepare_model_for_kbit_training(
        base_model().to(torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert not any(p.requires_grad for p in base.parameters())
    model = adapted(base)
    assert_learned(train(model, batches(), optimizer_of(model)))


def test_stopping_and_resuming_changes_nothing(tmp_path):
    data = batches(8)
    whole = adapted(use_dora=True)
    train(whole, data, optimizer_of(whole))

    first = adapted(use_dora=True)
    optimizer = optimizer_of(first)
    train(first, data[:4], optimizer)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True).train()
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(second, data[4:], optimizer)
    assert_same(weights(second), weights(whole))


def test_what_is_saved_is_what_was_trained(tmp_path):
    model = adapted(base_model("llama_tied"), modules_to_save=["norm"], trainable_token_indices=[3, 4])
    before = weights(model)
    train(model, batches(3), optimizer_of(model))
    after = weights(model)
    assert all(not torch.equal(before[name], after[name]) for name in after)

    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("llama_tied"), tmp_path, is_trainable=True).eval()
    assert_same(weights(again), after)
    batch = batches(1)[0]
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_only_the_chosen_tokens_move():
    model = adapted(trainable_token_indices=[3, 5])
    embed = model.get_input_embeddings()
    every_token = torch.arange(models.VOCAB)
    before = embed(every_token).detach().clone()
    train(model, batches(3), optimizer_of(model))
    moved = (embed(every_token) != before).any(1).nonzero().flatten()
    assert moved.tolist() == [3, 5]


def test_adapters_train_one_at_a_time():
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    model.set_adapter("other")
    train(model, batches(3), optimizer_of(model))
    moved = {name for name, p in model.named_parameters() if "lora_" in name and not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".other." in name}
