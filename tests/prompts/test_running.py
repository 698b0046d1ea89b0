"""Prompts under everything that drives a model: decoding strategies, the Trainer, checkpointing, compilers."""

from __future__ import annotations

import pytest
import torch
import transformers

from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.errors import UnsupportedError

from .kit import TOKENS, adapted, batch, encoder, make

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig]
METHODS = {
    "prompt": (PromptTuningConfig, {}),
    "mlp": (PromptEncoderConfig, {}),
    "lstm": (PromptEncoderConfig, {"encoder_reparameterization_type": "LSTM"}),
    "prefix": (PrefixTuningConfig, {}),
    "projection": (PrefixTuningConfig, {"prefix_projection": True}),
    "cartridge": (CartridgeConfig, {}),
    "multitask": (MultitaskPromptTuningConfig, {"num_tasks": 3}),
    "cpt": (CPTConfig, {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4], "num_virtual_tokens": None}),
}


def config(kind=PrefixTuningConfig, task: str = "CAUSAL_LM", **changes):
    return kind(**({"task_type": task, "num_virtual_tokens": TOKENS} | changes))


def written(model: PeftModel, inputs: dict, **how) -> torch.Tensor:
    return model.generate(**inputs, **({"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | how))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_speculation_writes_what_greedy_decoding_writes(kind, name):
    model, inputs = adapted(make(name), p=config(kind)), batch(rows=1, padded=None)
    want = written(model, inputs)
    assert torch.equal(written(model, inputs, assistant_model=make(name)), want)
    assert torch.equal(written(model, inputs, prompt_lookup_num_tokens=2), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_caches_of_generate_go_on_in_forward_and_in_generate(kind, name):
    model, inputs = adapted(make(name), p=config(kind)), batch(rows=1, padded=None)
    output = written(model, inputs, return_dict_in_generate=True)
    text = output.sequences
    step = model(input_ids=text[:, -1:], past_key_values=output.past_key_values).logits[:, -1]
    torch.testing.assert_close(step, model(input_ids=text).logits[:, -1], **CLOSE)
    output = written(model, inputs, return_dict_in_generate=True)
    longer = {"input_ids": torch.cat([text, text[:, :2]], dim=1)}
    assert torch.equal(written(model, longer, past_key_values=output.past_key_values), written(model, longer))


def test_caches_of_forward_hold_virtual_tokens_and_generate_refuses_them():
    model, inputs = adapted(make("llama"), p=config(PromptTuningConfig)), batch(rows=1, padded=None)
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="virtual tokens are in it"):
        written(model, inputs, past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_assists(kind):
    base, assistant = make("llama"), adapted(make("llama"), p=config(kind))
    inputs = batch(rows=1, padded=None)
    assert torch.equal(written(base, inputs, assistant_model=assistant.base_model), written(base, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_over_a_static_cache(kind, how):
    model, inputs = adapted(make("llama"), p=config(kind)), batch()
    want = written(model, inputs, use_cache=False, **how)
    assert torch.equal(written(model, inputs, cache_implementation="static", **how), want)


class Rows(torch.utils.data.Dataset):
    """Rows of a batch, with labels."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.columns = batch(rows=4) | {"labels": labels}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[i] for key, value in self.columns.items()}


def arguments(kind, folder, **changes):
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    sizes = {"per_device_eval_batch_size": 2, "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2}
    return kind(output_dir=str(folder), **quiet, **sizes, **changes)


TASKS = {
    ("bert", "ForSequenceClassification", "SEQ_CLS"): torch.tensor([0, 1, 1, 0]),
    ("llama", "ForSequenceClassification", "SEQ_CLS"): torch.tensor([0, 1, 1, 0]),
    ("bert", "ForTokenClassification", "TOKEN_CLS"): batch(rows=4)["input_ids"] % 2,
    ("llama", "", "CAUSAL_LM"): batch(rows=4)["input_ids"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TASKS, ids=str)
def test_the_trainer_trains_and_reports_the_loss_of_a_plain_loop(kind, case, tmp_path):
    name, head, task = case
    model, rows = adapted(make(name, head), p=config(kind, task)), Rows(TASKS[case])
    before = encoder(model).rows().detach().clone()
    trainer = transformers.Trainer(
        model, arguments(transformers.TrainingArguments, tmp_path), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    assert not torch.equal(encoder(model).rows(), before)
    found = trainer.predict(rows)
    with torch.no_grad():
        whole = model.eval()(**rows.columns)
    assert found.predictions.shape == whole.logits.shape
    torch.testing.assert_close(torch.from_numpy(found.predictions), whole.logits, **CLOSE)
    if task != "CAUSAL_LM":  # whose loss is divided by the labels of each batch
        assert found.metrics["test_loss"] == pytest.approx(whole.loss.item(), abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found.metrics["test_loss"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_seq2seq_trainer_generates(kind, name, tmp_path):
    model = adapted(make(name), p=config(kind, "SEQ_2_SEQ_LM"))
    rows = Rows(batch(rows=4, length=4, padded=None)["input_ids"])
    options = arguments(
        transformers.Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True, generation_max_length=5
    )
    trainer = transformers.Seq2SeqTrainer(model, options, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    found = trainer.predict(rows)
    tokens, want = torch.from_numpy(found.predictions), model.generate(**batch(rows=4), max_length=5)
    assert torch.equal(tokens[:, : want.shape[1]], want)
    assert (tokens[:, want.shape[1] :] == model.base_model.config.pad_token_id).all()
    with torch.no_grad():
        assert found.metrics["test_loss"] == pytest.approx(model(**rows.columns).loss.item(), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "roberta", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_outputs_nor_gradients(method, name, reentrant):
    kind, fields = METHODS[method]
    if method == "cpt" and name != "llama":
        pytest.skip("CPT is for causal language models")
    task = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "roberta": "TOKEN_CLS"}[name]
    model = adapted(make(name, "ForTokenClassification" if name == "roberta" else ""), p=config(kind, task, **fields))
    inputs = batch(padded="right")
    inputs |= {"labels": inputs["input_ids"] % 2} | (
        {"task_ids": torch.tensor([2, 0])} if method == "multitask" else {}
    )
    seen = []
    for checkpointed in (False, True):
        if checkpointed:
            model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        output = model(**inputs)
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.prompt_encoder.named_parameters() if p.grad is not None}
        seen.append((output.logits.detach(), grads))
    torch.testing.assert_close(*[logits for logits, _ in seen], **CLOSE)
    assert seen[0][1].keys() == seen[1][1].keys()
    for key, gradient in seen[0][1].items():
        torch.testing.assert_close(seen[1][1][key], gradient, **CLOSE)


@pytest.mark.parametrize("method", ["mlp", "projection"])
def test_training_compiles_into_one_graph(method):
    kind, fields = METHODS[method]
    model, inputs = adapted(make("llama"), p=config(kind, **fields)).train(), batch(padded=None)
    grads = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.prompt_encoder.named_parameters() if p.grad is not None})
    torch._dynamo.reset()
    assert grads[0].keys() == grads[1].keys() != set()
    for key, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][key], gradient, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_implementation_computes_the_same(kind, attention):
    model, inputs = adapted(make("llama"), p=config(kind)), batch()
    real = inputs["attention_mask"].bool()
    model.base_model.set_attn_implementation("eager")
    want = model(**inputs).logits[:, -6:]
    model.base_model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # flex attention is compiled otherwise
        torch.testing.assert_close(model(**inputs).logits[:, -6:][real], want[real], **CLOSE)


def test_nothing_is_left_on_a_model_without_prompts():
    base = make("gpt2")
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model(input_ids=torch.arange(4)[None])
    model.generate(input_ids=torch.arange(4)[None], max_new_tokens=2, pad_token_id=0)
    model.delete_adapter("default")
    assert {name: set(vars(module)) for name, module in base.named_modules()} == before
