"""Prompt adapters on disk: the same prompt comes back, and training can go on where it stopped."""

from __future__ import annotations

import pytest
import torch

from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from peft.checkpoint import tensors
from peft.errors import ConfigError, LoadError, UnsupportedError

from .kit import TOKENS, adapted, batch, encoder, make

CONFIGS = {
    "prompt_tuning": (PromptTuningConfig, {}),
    "p_tuning_mlp": (PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "p_tuning_lstm": (PromptEncoderConfig, {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
    "prefix_tuning": (PrefixTuningConfig, {}),
    "prefix_projection": (PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 8}),
    "multitask": (MultitaskPromptTuningConfig, {"num_tasks": 2, "num_ranks": 2}),
    "cartridge": (CartridgeConfig, {"num_frozen_tokens": 1}),
    "cpt": (CPTConfig, {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]}),
}
NETWORKS = ["p_tuning_mlp", "p_tuning_lstm", "prefix_projection"]


def config(name: str):
    kind, fields = CONFIGS[name]
    return kind(task_type="CAUSAL_LM", **({} if kind is CPTConfig else {"num_virtual_tokens": TOKENS}), **fields)


def trained(name: str) -> PeftModel:
    """An adapter after some steps of training."""
    torch.manual_seed(1)
    model = adapted(make("llama"), default=config(name)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**inputs(name), labels=batch()["input_ids"]).loss.backward()
        optimizer.step()
    return model.eval()


def inputs(name: str) -> dict:
    return batch() | ({"task_ids": torch.tensor([1, 0])} if name == "multitask" else {})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("trainable", [False, True])
def test_what_is_loaded_computes_what_was_saved(name, trainable, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=trainable).eval()
    torch.testing.assert_close(loaded(**inputs(name)).logits, model(**inputs(name)).logits, atol=1e-6, rtol=1e-6)
    assert any(p.requires_grad for p in loaded.prompt_encoder.parameters()) is trainable
    frozen = {n: p.requires_grad for n, p in loaded.prompt_encoder.named_parameters() if "frozen" in n}
    assert not any(frozen.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_training_goes_on_with_the_network(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    saved = tensors.read(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["prompt_embeddings"], encoder(model).rows())
    again = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert encoder(again).reparametrised
    for key, value in encoder(model).state_dict().items():
        assert torch.equal(encoder(again).state_dict()[key], value), key
    assert not encoder(PeftModel.from_pretrained(make("llama"), tmp_path)).reparametrised


@pytest.mark.parametrize("name", NETWORKS)
def test_files_without_the_network_still_train(name):
    model, fresh = trained(name), adapted(make("llama"), default=config(name))
    with pytest.warns(UserWarning, match="plain table"):
        encoder(fresh).load_tensors({"prompt_embeddings": encoder(model).rows().detach()})
    torch.testing.assert_close(fresh(**inputs(name)).logits, model(**inputs(name)).logits)
    fresh(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert encoder(fresh).embedding.weight.grad.abs().sum() > 0


def test_wrong_files_are_refused():
    table = encoder(adapted(make("llama"), default=config("prompt_tuning")))
    before = table.rows().clone()
    with pytest.raises(LoadError, match="size mismatch"):
        table.load_tensors({"prompt_embeddings": torch.zeros(TOKENS + 1, 32)})
    with pytest.raises(LoadError, match="another method"):
        table.load_tensors({"base_model.model.lora_A.weight": torch.zeros(1)})
    assert torch.equal(table.rows(), before)


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_prompts_start_at_source_tasks(init, tmp_path):
    source = trained("multitask")
    source.save_pretrained(tmp_path)
    start = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        num_ranks=2,
        prompt_tuning_init=init,
        prompt_tuning_init_task=1,
        prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"),
    )
    target, shared = encoder(adapted(make("llama"), default=start)), encoder(source)
    assert torch.equal(target.embedding.weight, shared.embedding.weight)
    if init == "AVERAGE_SOURCE_TASKS":
        torch.testing.assert_close(target.prefix_task_cols[0], shared.prefix_task_cols.mean(0))
    elif init == "EXACT_SOURCE_TASK":
        assert torch.equal(target.prefix_task_rows[0], shared.prefix_task_rows[1])


def test_prompts_start_at_tokens(monkeypatch):
    from peft.prompts import prompt_tuning

    monkeypatch.setattr(prompt_tuning, "text_ids", lambda config: [7, 8])
    base = make("llama")
    words = base.get_input_embeddings().weight
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b", "tokenizer_name_or_path": "none"}
    start = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **text)
    assert torch.equal(encoder(adapted(base, default=start)).rows(), words[[7, 8, 7]])
    start = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prompt_tuning_init="SAMPLE_VOCAB")
    rows = encoder(adapted(base, default=start)).rows()
    assert all((words == row).all(1).any() for row in rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path"),
        ({"prompt_tuning_init": "RANDM"}, "Did you mean 'RANDOM'"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "TEXT"),
    ],
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(ConfigError, match=message):
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **fields)


def test_cartridges_join_end_to_end(tmp_path):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = make("llama")
    for name, piece in (("a", ids[:, :3]), ("b", ids[:, 2:])):
        model = adapted(make("llama"), default=config("cartridge"))
        cache = base(piece, use_cache=True).past_key_values
        rows = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        torch.testing.assert_close(rows, prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=TOKENS))
        model.save_pretrained(tmp_path / name)
    compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both")
    parts = [tensors.read(tmp_path / n / "adapter_model.safetensors")["prompt_embeddings"] for n in ("a", "b", "both")]
    assert torch.equal(parts[2], torch.cat(parts[:2]))
    both = PeftModel.from_pretrained(make("llama"), tmp_path / "both")
    assert both.peft_config["default"].num_virtual_tokens == 2 * TOKENS
    both(**batch())
    with pytest.raises(ConfigError, match="at least 2"):
        compose_cartridge_adapters([tmp_path / "a"], output_path=tmp_path / "c")


class Tokenizer:
    """One token per letter."""

    def __call__(self, text, truncation=False, max_length=None, return_tensors="pt"):
        return {"input_ids": torch.tensor([[ord(c) % 60 + 3 for c in text]])}

    def apply_chat_template(self, messages, **kwargs):
        return self(messages[0]["content"])["input_ids"]


@pytest.mark.parametrize("template", [True, False])
def test_a_prefix_from_a_text_is_the_text(template):
    model = adapted(make("gpt2"), default=config("prefix_tuning"))
    initialize_kv_prefix_from_text(model, Tokenizer(), text="abc", use_chat_template=template)
    text, row = Tokenizer()("abc")["input_ids"], batch(padded=None)["input_ids"][:1]
    want = model.base_model(torch.cat([text, row], 1)).logits[:, TOKENS:]
    torch.testing.assert_close(model(row).logits, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="Need at least 3"):
        initialize_kv_prefix_from_text(model, Tokenizer(), text="ab")
    with pytest.raises(UnsupportedError, match="prefix_projection=False"):
        initialize_kv_prefix_from_text(
            adapted(make("gpt2"), default=config("prefix_projection")), Tokenizer(), text="abc"
        )


def test_a_disabled_prompt_leaves_no_trace():
    for name in ("prompt_tuning", "prefix_tuning"):
        model, base = trained(name), make("llama")
        with model.disable_adapter():
            assert torch.equal(model(**batch()).logits, base(**batch()).logits)
        assert not torch.allclose(model(**batch()).logits[:, -1], base(**batch()).logits[:, -1])


def test_get_prompt_is_the_prompt_alone():
    model = adapted(make("llama"), default=config("prompt_tuning"))
    assert torch.equal(model.get_prompt(2), encoder(model).rows().expand(2, -1, -1))
    assert adapted(make("llama"), default=config("prefix_tuning")).get_prompt(2).get_seq_length() == TOKENS
