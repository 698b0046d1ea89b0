"""Keys and values joined inside attention: the same as the tokens that they came from, whatever runs around them."""

from __future__ import annotations

import copy
from threading import Thread

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft import (
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    initialize_kv_prefix_from_past_key_values,
)
from peft.errors import ConfigError, ShapeError, StateError, UnsupportedError
from peft.prompts._cache import layer_tensors

from .kit import CAUSAL, ENCODERS, SEQ2SEQ, TOKENS, VOCABULARY, adapted, batch, encoder, make

CONTEXT = torch.tensor([[5, 9, 11]])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prefix(**changes) -> PrefixTuningConfig:
    return PrefixTuningConfig(**({"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS} | changes))


def with_context(base: torch.nn.Module, config=None) -> PeftModel:
    """A model whose prefix is the cache of CONTEXT: by definition, `model(x)` is then `base(CONTEXT + x)`."""
    model = adapted(base, context=config or prefix())
    with torch.no_grad():
        cache = base(CONTEXT, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    return model


def after_context(inputs: dict) -> dict:
    rows = len(inputs["input_ids"])
    return {
        "input_ids": torch.cat([CONTEXT.expand(rows, -1), inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones(rows, TOKENS, dtype=torch.long), inputs["attention_mask"]], 1),
    }


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_forward_equals_the_tokens_themselves(name, padded):
    base = make(name)
    model, inputs = with_context(base), batch(padded=padded)
    want = base(**after_context(inputs)).logits[:, TOKENS:]
    real = inputs["attention_mask"].bool()
    for use_cache in (True, False):
        got = model(**inputs, use_cache=use_cache).logits
        torch.testing.assert_close(got[real], want[real], **CLOSE)
    if padded is None:
        torch.testing.assert_close(model(inputs["input_ids"]).logits, want, **CLOSE)


HOW = [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}]
EVERYWHERE = [(name, how) for name in CAUSAL for how in HOW[:2]]
SOMEWHERE = [(name, how) for name in ("llama", "qwen2", "gpt2", "opt", "bloom", "falcon") for how in HOW[2:]]


@pytest.mark.parametrize(("name", "how"), EVERYWHERE + SOMEWHERE, ids=str)
def test_generate_equals_the_tokens_themselves(name, how):
    base = make(name)
    model, inputs = with_context(base), batch()
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **how}
    torch.manual_seed(0)
    want = base.generate(**after_context(inputs), **how)[:, TOKENS:]
    torch.manual_seed(0)
    got = model.generate(**inputs, **how)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_generate_continues_a_cache_of_the_caller(name):
    base = make(name)
    model, inputs = with_context(base), batch(padded=None)
    want = base.generate(**after_context(inputs), max_new_tokens=3, do_sample=False)[:, TOKENS:]
    for cache in (DynamicCache(), StaticCache(config=base.config, max_cache_len=16)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, past_key_values=cache), want)


def test_a_loop_over_the_returned_cache_is_generate():
    base = make("llama")
    model, inputs = with_context(base), batch(padded=None)
    want = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    ids, cache, step = inputs["input_ids"], None, inputs["input_ids"]
    for _ in range(3):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], 1)
    assert torch.equal(ids, want)
    assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("static", [False, True])
def test_a_sliding_window_passes_over_the_prefix_as_over_tokens(static):
    base = make("mistral", sliding_window=5)
    model, inputs = with_context(base), batch(padded=None, length=4)
    how = {"max_new_tokens": 6, "do_sample": False} | ({"cache_implementation": "static"} if static else {})
    want = base.generate(**after_context(inputs), **how)[:, TOKENS:]
    assert torch.equal(model.generate(**inputs, **how), want)
    unlimited = with_context(make("mistral", sliding_window=64)).generate(**inputs, **how)
    assert not torch.equal(unlimited, want), "the window must matter for this test to say anything"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_every_attention_implementation(name, attention):
    base = make(name)
    base.set_attn_implementation(attention)
    model, inputs = with_context(base), batch()
    real = inputs["attention_mask"].bool()
    want = base(**after_context(inputs)).logits[:, TOKENS:]
    torch.testing.assert_close(model(**inputs).logits[real], want[real], **CLOSE)


def gradients(model: PeftModel, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.prompt_encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_gradient_checkpointing_changes_nothing(name, reentrant, projection):
    task = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM"
    model, inputs = adapted(make(name), p=prefix(task_type=task, prefix_projection=projection)), batch()
    loss, plain = gradients(model, inputs)
    model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    again, checkpointed = gradients(model, inputs)
    assert torch.equal(loss, again)
    assert plain.keys() == checkpointed.keys() == dict(model.prompt_encoder.named_parameters()).keys()
    for key, gradient in plain.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(checkpointed[key], gradient, **CLOSE)


def by_hand(model: PeftModel, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(encoder(model).num_layers):
        keys, values = encoder(model).layer(layer)
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon"])
@pytest.mark.parametrize("projection", [False, True])
def test_gradients_are_those_through_a_cache_filled_by_hand(name, projection):
    model, inputs = adapted(make(name), p=prefix(prefix_projection=projection)), batch()
    loss, found = gradients(model, inputs)
    model.zero_grad()
    mask = torch.cat([torch.ones(2, TOKENS, dtype=torch.long), inputs["attention_mask"]], 1)
    ids = inputs["input_ids"]
    want = model.base_model(ids, attention_mask=mask, past_key_values=by_hand(model, 2), labels=ids).loss
    want.backward()
    torch.testing.assert_close(loss, want.detach(), **CLOSE)
    for key, parameter in model.prompt_encoder.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, **CLOSE)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_prefix_stands_in_the_decoder(name):
    base = make(name)
    model, inputs = adapted(base, p=prefix(task_type="SEQ_2_SEQ_LM")), batch()
    targets = batch(length=4, padded=None)["input_ids"]
    cache = EncoderDecoderCache(by_hand(model, 2), DynamicCache())
    want = base(**inputs, labels=targets, past_key_values=cache)
    got = model(**inputs, labels=targets)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)
    torch.testing.assert_close(model(**inputs, labels=targets, use_cache=False).loss, want.loss, **CLOSE)


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_seq2seq_generate_is_a_greedy_loop(name, how):
    model, inputs = adapted(make(name), p=prefix(task_type="SEQ_2_SEQ_LM")), batch()
    got = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **how)
    if "num_beams" in how:
        assert got.shape == (2, 5)
        return
    ids = got[:, :1]
    for _ in range(4):
        logits = model(**inputs, decoder_input_ids=ids).logits[:, -1]
        logits[:, model.base_model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, ids)


def test_models_that_read_sound_take_prefixes_and_not_virtual_tokens():
    sides = ("encoder", "decoder")
    sizes = {f"{side}_layers": 2 for side in sides} | {f"{side}_attention_heads": 4 for side in sides}
    sizes |= {f"{side}_ffn_dim": 32 for side in sides} | {"max_source_positions": 8, "max_target_positions": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    torch.manual_seed(0)
    config = WhisperConfig(vocab_size=VOCABULARY, d_model=32, num_mel_bins=4, **sizes, **tokens)
    base = WhisperForConditionalGeneration(config).eval()
    sound, targets = torch.randn(2, 4, 16), batch(length=4, padded=None)["input_ids"]
    model = adapted(base, p=prefix(task_type="SEQ_2_SEQ_LM"))
    want = base(sound, labels=targets, past_key_values=EncoderDecoderCache(by_hand(model, 2), DynamicCache())).loss
    for use_cache in (True, False):
        torch.testing.assert_close(model(input_features=sound, labels=targets, use_cache=use_cache).loss, want, **CLOSE)
    with pytest.raises(UnsupportedError, match="use prefix tuning"):
        adapted(base, p=PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=TOKENS))(input_features=sound)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_tuples_have_the_places_they_had(name, use_cache):
    base, inputs = make(name), batch()
    how = {"use_cache": use_cache, "return_dict": False, "output_hidden_states": True}
    want = [type(part) for part in base(**inputs, **how)]
    assert [type(part) for part in adapted(base, p=prefix())(**inputs, **how)] == want


TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("head", TASKS)
def test_encoders(name, head):
    base = make(name, head)
    model, inputs = adapted(base, p=prefix(task_type=TASKS[head])), batch(padded="right")
    stack = getattr(base, name, base)
    mask = torch.cat([torch.ones(2, TOKENS, dtype=torch.long), inputs["attention_mask"]], 1)
    want = stack(inputs["input_ids"], attention_mask=mask, past_key_values=by_hand(model, 2)).last_hidden_state
    seen = []
    handle = stack.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    output = model(**inputs)
    handle.remove()
    torch.testing.assert_close(seen[0], want, **CLOSE)
    output[0].sum().backward()
    assert encoder(model).embedding.weight.grad.abs().sum() > 0


def test_models_without_a_cache_say_so():
    with pytest.raises(UnsupportedError, match="Prompt tuning and P-tuning work"):
        adapted(make("deberta"), p=prefix(task_type="FEATURE_EXTRACTION"))
    assert "deberta" in ENCODERS


def test_models_that_cache_latents_say_so():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "pad_token_id": 0}
    base = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **latent))
    keys, values = layer_tensors(base(**batch(), use_cache=True).past_key_values)[0]
    if keys.shape[-1] == values.shape[-1]:
        pytest.skip("this version of transformers caches the keys and values that the latents make")
    with pytest.raises(UnsupportedError, match=r"latent attention.*P-tuning"):
        adapted(base, p=prefix())(**batch())


def test_masks_of_chunks_that_were_prepared_without_the_prompt_are_refused():
    model, inputs = adapted(make("llama"), p=prefix()), batch(padded=None)
    mask = {"full_attention": None, "chunked_attention": torch.ones(2, 1, 6, 6, dtype=torch.bool)}
    with pytest.raises(UnsupportedError, match="dynamic cache"):
        model(input_ids=inputs["input_ids"], attention_mask=mask)


@pytest.mark.parametrize(("name", "room"), [("gpt2", 61), ("opt", 61), ("bart", 61), ("roberta", 60), ("bert", 61)])
def test_prefix_and_input_must_fit_the_positions_that_were_learnt(name, room):
    task = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM" if name in CAUSAL else "FEATURE_EXTRACTION"
    model = adapted(make(name), p=prefix(task_type=task))
    ids = torch.full((1, room + 1), 7)
    more = {"decoder_input_ids": ids} if name in SEQ2SEQ else {}
    with pytest.raises(ShapeError, match=f"Cut the input to {room} tokens"):
        model(input_ids=ids, **more)
    model(input_ids=ids[:, 1:], **{key: value[:, 1:] for key, value in more.items()})
    padded = torch.cat([ids[:, 1:], torch.zeros(1, 3, dtype=torch.long)], 1)
    if name in ("opt", "roberta"):  # where padding takes no position
        model(input_ids=padded, attention_mask=(padded > 0).long())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "falcon_alibi"])
def test_each_sample_may_have_its_own_prefix(name):
    base = make(name)
    model = adapted(
        base, a=prefix(), b=prefix(num_virtual_tokens=5), c=CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    inputs = batch(rows=4)
    names = ["b", "__base__", "a", "c"]
    together = model(**inputs, adapter_names=names).logits
    written = model.generate(
        **inputs, adapter_names=names, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0
    )
    for i, adapter in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        real = row["attention_mask"][0].bool()
        alone = model(**row, adapter_names=[adapter])
        torch.testing.assert_close(together[i][real], alone.logits[0][real], **CLOSE)
        lone = model.generate(
            **row, adapter_names=[adapter], max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0
        )
        assert torch.equal(written[i, : lone.shape[1]], lone[0])


def test_wrong_adapter_names():
    model = adapted(make("llama"), right=prefix())
    with pytest.raises(KeyError, match="Did you mean 'right'"):
        model(**batch(), adapter_names=["rigt", "right"])
    with pytest.raises(StateError, match="one for each"):
        model(**batch(rows=3), adapter_names=["right", "right"])


def test_two_prefixes_in_a_row_are_one_longer_prefix():
    base = make("llama")
    model = adapted(base, a=prefix(), b=prefix(), both=prefix(num_virtual_tokens=2 * TOKENS))
    encoders = model.prompt_encoder
    encoders["both"].load_tensors({"prompt_embeddings": torch.cat([encoders["a"].rows(), encoders["b"].rows()])})
    model.set_adapter("both")
    want = model(**batch()).logits
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(**batch()).logits, want, **CLOSE)


def test_the_base_model_is_as_it_was():
    untouched, base = make("llama"), make("llama")
    model = adapted(base, p=prefix())
    inputs = batch()
    model(**inputs)
    model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + VOCABULARY)
    assert torch.equal(base(**inputs).logits, untouched(**inputs).logits)
    assert base.state_dict().keys() == untouched.state_dict().keys()


def test_a_config_that_is_refused_leaves_no_hooks():
    base = make("llama")
    with pytest.raises(ConfigError, match="give 1 or more"):
        adapted(base, p=prefix(num_virtual_tokens=None))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_copies_and_threads_do_not_meet():
    model, inputs = adapted(make("llama"), a=prefix(), b=prefix()), batch(padded=None)
    twin = copy.deepcopy(model)
    want = {name: model(**inputs, adapter_names=[name] * 2).logits for name in "ab"}
    torch.testing.assert_close(twin(**inputs, adapter_names=["b"] * 2).logits, want["b"])
    got: dict[tuple, torch.Tensor] = {}

    def run(name, i):
        with torch.no_grad():
            got[name, i] = model(**inputs, adapter_names=[name] * 2).logits

    threads = [Thread(target=run, args=(name, i)) for i in range(4) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    for (name, _), logits in got.items():
        torch.testing.assert_close(logits, want[name])


def test_compiles_into_one_graph():
    model, inputs = with_context(make("llama")), batch(padded=None)
    want = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, want, **CLOSE)


def test_half_precision_models_keep_their_dtype():
    model = adapted(make("llama").to(torch.bfloat16), p=prefix())
    assert encoder(model).embedding.weight.dtype == torch.float32
    assert model(**batch()).logits.dtype == torch.bfloat16
    assert model(**batch()).logits.shape[-1] == VOCABULARY
