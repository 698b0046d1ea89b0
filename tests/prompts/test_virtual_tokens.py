"""Virtual tokens before the input: the same as embeddings put there by hand, for every task."""

from __future__ import annotations

import pytest
import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration, MambaConfig, MambaForCausalLM

from peft import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.errors import ConfigError, ShapeError, UnsupportedError
from peft.prompts.cpt import cpt_loss

from .kit import CAUSAL, ENCODERS, SEQ2SEQ, TOKENS, VOCABULARY, adapted, batch, encoder, make

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def config(kind=PromptTuningConfig, **changes):
    return kind(**({"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS} | changes))


def by_hand(model: PeftModel, inputs: dict) -> dict:
    """The inputs with the prompt's embeddings concatenated before them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.base_model.get_input_embeddings()(ids)
    prompt = encoder(model).rows()[:TOKENS].expand(len(ids), -1, -1)
    return {
        "inputs_embeds": torch.cat([prompt, embeds], 1),
        "attention_mask": torch.cat([torch.ones(len(ids), TOKENS, dtype=torch.long), mask], 1),
    }


def labelled(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((len(ids), TOKENS), -100), ids], 1)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_causal_forward_and_gradient(name, kind):
    model, inputs = adapted(make(name), p=config(kind)), batch()
    got = model(**inputs, labels=inputs["input_ids"])
    got.loss.backward()
    gradient = encoder(model).embedding.weight.grad.clone()
    model.zero_grad()
    want = model.base_model(**by_hand(model, inputs), labels=labelled(inputs["input_ids"]))
    want.loss.backward()
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)
    torch.testing.assert_close(gradient, encoder(model).embedding.weight.grad, **CLOSE)


HOW = [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}]


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, {}) for name in CAUSAL] + [(name, how) for name in ("llama", "gpt2", "bloom") for how in HOW[1:]],
    ids=str,
)
def test_causal_generate(name, how):
    model, inputs = adapted(make(name), p=config()), batch()
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **how}
    by_hand_how = how | {"use_cache": True}
    torch.manual_seed(0)
    want = model.base_model.generate(**by_hand(model, inputs), **by_hand_how)
    torch.manual_seed(0)
    got = model.generate(**inputs, **how)
    assert torch.equal(got[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(got[:, inputs["input_ids"].shape[1] :], want)


def test_padding_does_not_change_what_is_generated():
    model = adapted(make("llama"), p=config())
    ids = torch.tensor([[7, 8, 9]])
    alone = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    padded = {"input_ids": torch.tensor([[0, 0, 7, 8, 9]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    assert torch.equal(model.generate(**padded, max_new_tokens=4, do_sample=False)[:, 2:], alone)


def test_generate_in_training_with_checkpointing():
    model, inputs = adapted(make("llama"), p=config()), batch()
    want = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.base_model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), want)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq(name):
    model, inputs = adapted(make(name), p=config(task_type="SEQ_2_SEQ_LM")), batch()
    assert encoder(model).embedding.weight.shape[0] == 2 * TOKENS
    targets = batch(length=4, padded=None)["input_ids"]
    want = model.base_model(**by_hand(model, inputs), labels=targets)
    got = model(**inputs, labels=targets)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)
    for how in ({}, {"num_beams": 2}, {"use_cache": False}):
        written = model.base_model.generate(**by_hand(model, inputs), max_new_tokens=4, do_sample=False, **how)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **how), written)


@pytest.mark.parametrize("name", ENCODERS)
def test_token_classification_and_segments(name):
    model, inputs = (
        adapted(make(name, "ForTokenClassification"), p=config(task_type="TOKEN_CLS")),
        batch(padded="right"),
    )
    labels = inputs["input_ids"] % 2
    segments = torch.zeros_like(labels)
    if name != "roberta":
        segments[:, 3:] = 1
    got = model(**inputs, labels=labels, token_type_ids=segments)
    types = torch.cat([torch.zeros(2, TOKENS, dtype=torch.long), segments], 1)
    want = model.base_model(**by_hand(model, inputs), labels=labelled(labels), token_type_ids=types)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_question_answering_moves_the_span(name):
    model, inputs = adapted(make(name, "ForQuestionAnswering"), p=config(task_type="QUESTION_ANS")), batch(padded=None)
    start, end = torch.tensor([0, 2]), torch.tensor([1, 5])
    got = model(**inputs, start_positions=start, end_positions=end)
    want = torch.nn.functional.cross_entropy(got.start_logits[:, TOKENS:], start)
    assert got.start_logits.shape == (2, TOKENS + 6)
    plain = model.base_model(**by_hand(model, inputs), start_positions=start + TOKENS, end_positions=end + TOKENS)
    torch.testing.assert_close(got.loss, plain.loss, **CLOSE)
    assert want > 0


@pytest.mark.parametrize("name", ENCODERS)
def test_sequence_classification_and_features(name):
    inputs = batch(padded="right")
    model = adapted(make(name, "ForSequenceClassification"), p=config(task_type="SEQ_CLS"))
    got, want = model(**inputs, labels=torch.tensor([0, 1])), model.base_model(**by_hand(model, inputs))
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    features = adapted(make(name), p=config(task_type="FEATURE_EXTRACTION"))
    want = features.base_model(**by_hand(features, inputs)).last_hidden_state
    torch.testing.assert_close(features(**inputs).last_hidden_state, want, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_causal_classifiers_find_the_last_token(name):
    extra = {"pad_token_id": 0}
    model = adapted(make(name, "ForSequenceClassification", **extra), p=config(task_type="SEQ_CLS"))
    short = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    padded = {"input_ids": torch.tensor([[7, 8, 9, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    want = model.base_model(**by_hand(model, short)).logits
    torch.testing.assert_close(model(**short).logits, want, **CLOSE)
    torch.testing.assert_close(model(**padded).logits, want, **CLOSE)
    model(**padded, labels=torch.tensor([1])).loss.backward()
    assert encoder(model).embedding.weight.grad.abs().sum() > 0


def test_positions_of_the_caller_move_along():
    model, inputs = adapted(make("gpt2"), p=config()), batch(padded=None)
    positions = torch.tensor([[4, 5, 6, 7, 8, 9]]).expand(2, -1)
    whole = torch.cat([torch.arange(TOKENS).expand(2, -1), positions + TOKENS], 1)
    want = model.base_model(**by_hand(model, inputs), position_ids=whole).logits
    torch.testing.assert_close(model(**inputs, position_ids=positions).logits, want, **CLOSE)
    with pytest.warns(UserWarning, match="takes no token_type_ids"):
        adapted(make("llama"), p=config())(**inputs, token_type_ids=torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_each_sample_may_have_its_own_prompt(name):
    model = adapted(make(name), a=config(), b=config(num_virtual_tokens=5))
    inputs, names = batch(rows=3), ["b", "__base__", "a"]
    together = model(**inputs, adapter_names=names).logits
    written = model.generate(**inputs, adapter_names=names, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert together.shape[1] == 5 + 6
    for i, adapter in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        real = row["attention_mask"][0].bool()
        alone = model(**row, adapter_names=[adapter]).logits[0, -6:]
        torch.testing.assert_close(together[i, -6:][real], alone[real], **CLOSE)
        lone = model.generate(**row, adapter_names=[adapter], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(written[i, : lone.shape[1]], lone[0])


@pytest.mark.parametrize(("name", "room"), [("gpt2", 61), ("opt", 61), ("bart", 61), ("roberta", 60), ("deberta", 61)])
def test_prompt_and_input_must_fit_the_positions_that_were_learnt(name, room):
    task = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM" if name in CAUSAL else "FEATURE_EXTRACTION"
    model = adapted(make(name), p=config(task_type=task))
    ids = torch.full((1, room + 1), 7)
    more = {"labels": ids[:, :3]} if name in SEQ2SEQ else {}
    with pytest.raises(ShapeError, match=f"Cut the input to {room} tokens"):
        model(input_ids=ids, **more)
    model(input_ids=ids[:, 1:], **more)
    if name in CAUSAL:  # left padding takes no position in generate
        padded = {"input_ids": torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:, 2:]], 1)}
        model.generate(**padded, attention_mask=(padded["input_ids"] > 0).long(), max_new_tokens=1, pad_token_id=0)
        with pytest.raises(ShapeError, match="virtual tokens"):
            model.generate(input_ids=ids, max_new_tokens=1, pad_token_id=0)


def test_multitask_prompts_need_a_model_that_takes_embeddings_beside_labels():
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = adapted(
        M2M100ForConditionalGeneration(M2M100Config(**sizes, **heads)),
        p=config(MultitaskPromptTuningConfig, task_type="SEQ_2_SEQ_LM"),
    )
    inputs = batch() | {"task_ids": torch.tensor([0, 0])}
    with pytest.raises(UnsupportedError, match="Pass decoder_input_ids without labels"):
        model(**inputs, labels=inputs["input_ids"])
    logits = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
    assert logits.shape == (2, TOKENS + 6, VOCABULARY)


def test_state_space_models_take_virtual_tokens_in_forward():
    torch.manual_seed(0)
    base = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    ).eval()
    model, inputs = adapted(base, p=config()), batch(padded=None)
    want = base(inputs_embeds=by_hand(model, inputs)["inputs_embeds"]).logits
    torch.testing.assert_close(model(inputs["input_ids"]).logits, want, **CLOSE)
    with pytest.raises(UnsupportedError, match="need a key/value cache"):
        model.generate(inputs["input_ids"], max_new_tokens=1)
    with pytest.raises(UnsupportedError, match="no keys and values to put a prefix before"):
        adapted(base, p=config(PrefixTuningConfig))


def test_two_prompts_need_an_encoder_and_a_decoder():
    with pytest.raises(ConfigError, match="LlamaForCausalLM is one stack"):
        adapted(make("llama"), p=config(num_transformer_submodules=2))
    with pytest.raises(ConfigError, match="choose the task_type"):
        adapted(make("llama"), p=config(task_type="SEQ_2_SEQ_LM"))


def test_kinds_do_not_mix_in_one_batch():
    model = adapted(make("llama"), a=config(), b=config(PrefixTuningConfig))
    with pytest.raises(UnsupportedError, match="two calls"):
        model(**batch(), adapter_names=["a", "b"])


def test_multitask_prompts_are_the_shared_prompt_times_the_task():
    model = adapted(make("llama"), p=config(MultitaskPromptTuningConfig, num_tasks=3, num_ranks=2))
    shared, inputs = encoder(model), batch()
    tasks = torch.tensor([2, 0])
    prompts = [shared.embedding.weight * (shared.prefix_task_cols[t] @ shared.prefix_task_rows[t]) for t in tasks]
    hand = by_hand(model, inputs)
    hand["inputs_embeds"] = torch.cat([torch.stack(prompts), hand["inputs_embeds"][:, TOKENS:]], 1)
    torch.testing.assert_close(model(**inputs, task_ids=tasks).logits, model.base_model(**hand).logits, **CLOSE)
    how = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, task_ids=tasks, **how)[:, 6:], model.base_model.generate(**hand, **how))
    with pytest.raises(ConfigError, match="task_ids"):
        model(**inputs)


CPT = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [5, 6, 7, 8, 9],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 4],
}


def test_cpt_starts_at_the_examples_and_stays_near():
    model = adapted(make("llama"), p=CPTConfig(**CPT))
    words = model.base_model.get_input_embeddings().weight[torch.tensor(CPT["cpt_token_ids"])]
    torch.testing.assert_close(encoder(model).rows(), words)
    with torch.no_grad():
        encoder(model).delta_embedding.weight.normal_()
    moved = (encoder(model).rows() - words).norm(dim=1)
    radius = 0.1 * (32 / 2048) ** 0.5
    torch.testing.assert_close(moved, torch.tensor([radius, radius, radius, 0.0, 0.0]), atol=1e-6, rtol=1e-4)
    model.train()
    inputs, types = batch(padded=None), torch.tensor([[1, 2, 2, 3, 4, 4]]).expand(2, -1)
    model(**inputs, labels=inputs["input_ids"], input_type_mask=types).loss.backward()
    assert (encoder(model).delta_embedding.weight.grad[:3].abs().sum(1) > 0).all()
    assert (encoder(model).delta_embedding.weight.grad[3:] == 0).all()
    assert (encoder(model).delta_embedding.weight[:3].norm(dim=1) <= radius * 1.001).all(), (
        "the step itself is projected"
    )


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_cpt_loss_counts_every_label_and_weighs_old_examples_down(decay):
    config = CPTConfig(**CPT, opt_weighted_loss_type="decay", opt_loss_decay_factor=decay)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5 + 6, VOCABULARY, generator=generator)
    labels, types = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[0, 1, 2, 4, 4, 4]])
    whole = torch.cat([torch.tensor([CPT["cpt_token_ids"]]), labels], 1)
    each = torch.nn.functional.cross_entropy(logits[0, :-1], whole[0, 1:], reduction="none")
    want = (decay * each[[2, 3]].sum() + each[[7, 8, 9]].sum()) / 5
    torch.testing.assert_close(cpt_loss(config, logits, labels, types), want)


def test_virtual_tokens_do_not_survive_their_call():
    untouched, base = make("llama"), make("llama")
    model, inputs = adapted(base, p=config()), batch()
    model(**inputs)
    model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(base(**inputs).logits, untouched(**inputs).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs = adapted(make("llama"), p=config(PromptEncoderConfig)), batch()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.prompt_encoder.named_parameters()})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, **CLOSE)
