"""Several adapters with prompts on one model: switched, mixed in a batch, renamed, deleted, beside weight adapters."""

from __future__ import annotations

import pytest
import torch

from peft import (
    CartridgeConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.errors import UnsupportedError

from .kit import TOKENS, VOCABULARY, adapted, batch, make

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TOKEN_KINDS = {"a": PromptTuningConfig, "b": PromptEncoderConfig}
KEY_KINDS = {"a": PrefixTuningConfig, "b": CartridgeConfig}
BOTH = pytest.mark.parametrize("kinds", [TOKEN_KINDS, KEY_KINDS], ids=["tokens", "keys"])
CLASSIFIERS = [("bert", "SEQ_CLS", "ForSequenceClassification"), ("roberta", "TOKEN_CLS", "ForTokenClassification")]


def configs(kinds: dict, task: str = "CAUSAL_LM") -> dict:
    """Two adapters, the second one two tokens longer."""
    return {
        name: kind(task_type=task, num_virtual_tokens=TOKENS + 2 * i) for i, (name, kind) in enumerate(kinds.items())
    }


def several(name: str, kinds: dict, task: str = "CAUSAL_LM", head: str = "") -> PeftModel:
    """A model with two adapters whose heads differ, if they have heads."""
    torch.manual_seed(3)
    model = adapted(make(name, head), **configs(kinds, task))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if "modules_to_save" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def last(output: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens of the batch, without those of virtual tokens."""
    return output[:, -6:]


@BOTH
def test_every_way_to_choose_an_adapter_gives_the_same(kinds):
    model, inputs = several("llama", kinds), batch()
    base = make("llama")(**inputs).logits
    found = {}
    for name in "ab":
        model.set_adapter(name)
        found[name] = model(**inputs).logits
    model.set_adapter("a")
    for name, want in found.items():
        with model.use(name):
            torch.testing.assert_close(model(**inputs).logits, want, **CLOSE)
        torch.testing.assert_close(model(**inputs, adapter_names=[name] * 2).logits, want, **CLOSE)
    with model.use(), model.use("b"):
        torch.testing.assert_close(model(**inputs).logits, found["b"], **CLOSE)
    for nothing in (model.use(), model.disable_adapter()):
        with nothing:
            assert torch.equal(model(**inputs).logits, base)
            assert torch.equal(
                model.generate(**inputs, max_new_tokens=2), model.base_model.generate(**inputs, max_new_tokens=2)
            )
    torch.testing.assert_close(model(**inputs).logits, found["a"], **CLOSE)


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "biogpt"])
def test_a_mixed_batch_trains_each_adapter_on_its_own_rows(kinds, name):
    model, inputs = several(name, kinds), batch(rows=4, padded=None)
    model.set_requires_grad(["a", "b"], True)
    names, labels = ["b", "a", "__base__", "b"], inputs["input_ids"]

    def gradients(total: torch.Tensor) -> dict:
        model.zero_grad()
        total.backward()
        return {key: p.grad.clone() for key, p in model.prompt_encoder.named_parameters() if p.grad is not None}

    got = gradients(model(**inputs, labels=labels, adapter_names=names).loss)
    alone = [
        model(
            **{key: value[i : i + 1] for key, value in inputs.items()}, labels=labels[i : i + 1], adapter_names=[n]
        ).loss
        for i, n in enumerate(names)
    ]
    want = gradients(torch.stack(alone).mean())
    assert {key.split(".")[0] for key in got} == {"a", "b"}
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, **CLOSE)


def test_tasks_and_prompts_mix_in_one_batch():
    torch.manual_seed(3)
    tasks = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, num_tasks=3)
    model, inputs = adapted(make("llama"), tasks=tasks, plain=configs(TOKEN_KINDS)["b"]), batch(rows=3, padded=None)
    ids, names = torch.tensor([2, 0, 1]), ["tasks", "plain", "tasks"]
    together = last(model(**inputs, task_ids=ids, adapter_names=names).logits)
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        alone = last(model(**row, task_ids=ids[i : i + 1], adapter_names=[name]).logits)
        torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)


@BOTH
@pytest.mark.parametrize(("name", "task", "head"), CLASSIFIERS)
def test_heads_are_switched_disabled_and_mixed_with_their_prompts(kinds, name, task, head):
    model, inputs = several(name, kinds, task, head), batch(rows=3, padded="right")
    base = make(name, head)(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base)
    names = ["b", "__base__", "a"]
    together = last(model(**inputs, adapter_names=names).logits)
    for i, adapter in enumerate(names):
        with model.use(*(() if adapter == "__base__" else (adapter,))):
            alone = last(model(**inputs).logits)
        real = inputs["attention_mask"][i].bool() if task == "TOKEN_CLS" else ...
        torch.testing.assert_close(together[i][real], alone[i][real], **CLOSE)
    model.set_adapter("b")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(".b." in key for key in trained)
    assert {key.split(".")[0] for key in trained} == {"prompt_encoder", "base_model"}


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_encoder_decoders_mix_prompts_of_any_length(name):
    model, inputs = several(name, TOKEN_KINDS, "SEQ_2_SEQ_LM"), batch(rows=3, padded="right")
    targets, names = batch(rows=3, length=4, padded=None)["input_ids"], ["b", "__base__", "a"]
    together = model(**inputs, labels=targets, adapter_names=names)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    written = model.generate(**inputs, adapter_names=names, **how)
    losses = []
    for i, adapter in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()} | {"adapter_names": [adapter]}
        alone = model(**row, labels=targets[i : i + 1])
        losses.append(alone.loss)
        torch.testing.assert_close(together.logits[i], alone.logits[0], **CLOSE)
        assert torch.equal(written[i], model.generate(**row, **how)[0])
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), **CLOSE)


def test_decoders_that_count_places_themselves_refuse_prompts_of_different_lengths():
    prompts = configs({"a": MultitaskPromptTuningConfig, "b": MultitaskPromptTuningConfig}, "SEQ_2_SEQ_LM")
    inputs = batch() | {"task_ids": torch.tensor([0, 0]), "adapter_names": ["a", "b"]}
    labels = inputs["input_ids"]
    assert adapted(make("t5"), **prompts)(**inputs, labels=labels).loss > 0
    for model in (adapted(make("bart"), **prompts), several("bart", KEY_KINDS, "SEQ_2_SEQ_LM")):
        with pytest.raises(UnsupportedError, match="one length in a batch"):
            model(**inputs, labels=labels)


@BOTH
def test_renamed_adapters_compute_and_save_the_same(kinds, tmp_path):
    model, inputs = several("bert", kinds, "SEQ_CLS", "ForSequenceClassification"), batch()
    want = model(**inputs).logits
    model.rename_adapter("a", "first")
    assert model.active_adapters == ["first"]
    assert torch.equal(model(**inputs).logits, want)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("bert", "ForSequenceClassification"), tmp_path / "first").eval()
    torch.testing.assert_close(again(**inputs).logits, want, **CLOSE)


@BOTH
def test_deleted_adapters_leave_the_others_and_then_the_base_model(kinds):
    head = "ForSequenceClassification"
    model, inputs = several("bert", kinds, "SEQ_CLS", head), batch()
    with model.use("b"):
        want = model(**inputs).logits
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert torch.equal(model(**inputs).logits, want)
    model.delete_adapter("b")
    untouched = make("bert", head)
    assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)
    bare = model.get_base_model().bert
    assert not bare._forward_pre_hooks
    assert not bare.get_input_embeddings()._forward_hooks
    model.add_adapter("c", configs(kinds, "SEQ_CLS")["a"])
    model.set_adapter("c")
    assert not torch.allclose(model(**inputs).logits, untouched(**inputs).logits)


@BOTH
def test_a_prompt_beside_lora_is_the_prompt_on_the_merged_model(kinds):
    model, inputs = several("llama", kinds), batch()
    model.add_adapter("w", LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    prompted = model(**inputs).logits
    model.set_adapter(["a", "w"])
    both = model(**inputs).logits
    assert not torch.allclose(both, prompted)
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with model.use("w"):
        weighted = model(**inputs).logits
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    learnt = {key for key, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in key for key in learnt)
    assert any("prompt_encoder.a" in key for key in learnt)
    names = ["a", "w"]
    mixed = last(model(**inputs, adapter_names=names).logits)
    torch.testing.assert_close(mixed[0][2:], last(prompted)[0][2:], **CLOSE)
    torch.testing.assert_close(mixed[1], weighted[1], **CLOSE)
    model.base_model.merge_adapter(["w"])
    torch.testing.assert_close(model(**inputs).logits, both, **CLOSE)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), written)
    model.base_model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, make("llama")(**inputs).logits)
    assert both.shape[-1] == VOCABULARY
