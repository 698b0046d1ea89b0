"""Layers that share a weight go on sharing it when one of them is adapted, unless that is not wanted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, registry
from peft.config import TargetedConfig
from peft.errors import ConfigError, LoadError, PeftWarning, TargetError, UnsupportedError
from peft.layer import AdaptedLayer
from peft.method import WeightMethod
from peft.testing import samples, train

IDS = torch.arange(1, 9).view(2, 4)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=12, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def adapted(config: TargetedConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        torch.manual_seed(1)
        model = get_peft_model(llama(), copy.deepcopy(config))
    train(model)
    return model.eval()


def embeddings(model: nn.Module) -> tuple[AdaptedLayer, AdaptedLayer]:
    base = model.get_base_model()
    return base.model.embed_tokens, base.lm_head


def effective(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    one, two = embeddings(model)
    with torch.no_grad():
        if not isinstance(one, AdaptedLayer):  # copies of modules, by LN tuning
            return one.weight, two.weight
        return one.effective()[0].mT, two.effective()[0]


def _configs() -> list:
    found = []
    for name, method in registry.all_methods().items():
        if isinstance(method, WeightMethod) and name != "TRAINABLE_TOKENS":
            found += [(f"{name} {i}", config) for i, config in enumerate(samples(name))]
    return [*found, ("TRAINABLE_TOKENS", TrainableTokensConfig(token_indices=[2, 3]))]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in _configs()])
def test_ties_are_kept_by_every_method(config, target, tmp_path):
    config = copy.deepcopy(config)
    config.target_modules = {target}
    try:
        model = adapted(config)
    except (TargetError, ConfigError, UnsupportedError) as refusal:
        pytest.skip(str(refusal))
    assert config.ensure_weight_tying is None
    assert model.active_peft_config.ensure_weight_tying is True
    head, body = effective(model)
    torch.testing.assert_close(head, body, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        y = model(IDS).logits
        assert not torch.allclose(y, llama()(IDS).logits)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(loaded(IDS).logits, y, rtol=1e-10, atol=1e-10)
        model.base_model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-10, atol=1e-10)
        model.base_model.unmerge_adapter()
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(IDS).logits, y, rtol=1e-10, atol=1e-10)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings


def test_one_set_of_parameters_gets_the_gradients_of_both():
    model = adapted(LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [f"base_model.model.model.embed_tokens.lora_embedding_{x}.default" for x in "AB"]
    model(IDS).logits.square().sum().backward()
    a, b = (p for p in model.parameters() if p.requires_grad)
    found = a.grad, b.grad
    weight = llama().lm_head.weight.detach() + (model.peft_config["default"].lora_alpha / 2 * b @ a).mT
    plain = llama()
    for layer in (plain.model.embed_tokens, plain.lm_head):
        del layer.weight
        layer.weight = weight
    expected = torch.autograd.grad(plain(IDS).logits.square().sum(), (a, b))
    torch.testing.assert_close(found, expected)


def test_untied_on_request_and_merging_parts_the_two(tmp_path):
    with pytest.warns(PeftWarning, match="shares its weight"):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=False))
    train(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        y = model.eval()(IDS).logits
        assert not isinstance(model.get_base_model().lm_head, AdaptedLayer)
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(loaded(IDS).logits, y)
        with pytest.warns(PeftWarning, match="tie_word_embeddings is now False"):
            plain = model.merge_and_unload()
        torch.testing.assert_close(plain(IDS).logits, y)
    assert not plain.config.tie_word_embeddings


def test_excluding_the_partner_unties():
    with pytest.warns(PeftWarning, match="shares its weight"):
        model = get_peft_model(
            llama(), LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], exclude_modules=["lm_head"])
        )
    assert model.active_peft_config.ensure_weight_tying is False


def test_tied_and_untied_adapters_together():
    model = adapted(LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.warns(PeftWarning, match="shares its weight"):
        model.add_adapter("apart", LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=False))
    model.set_adapter("apart")
    train(model)
    model.set_adapter(["default", "apart"])
    with torch.no_grad():
        y = model(IDS).logits
        for chosen in (["default"], ["apart"], ["default", "apart"]):
            model.base_model.merge_adapter(chosen)
            torch.testing.assert_close(model(IDS).logits, y)
            model.base_model.unmerge_adapter()
        model.rename_adapter("default", "tied")
        torch.testing.assert_close(model(IDS).logits, y)
        twin = copy.deepcopy(model)
        model.delete_adapter("apart")
        model.delete_adapter("tied") if len(model.peft_config) > 1 else None
        torch.testing.assert_close(twin(IDS).logits, y)
    one, two = effective(model)
    torch.testing.assert_close(one, two)


def test_a_file_whose_halves_differ_is_refused(tmp_path):
    from peft.checkpoint import files, tensors

    model = adapted(LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path)
    held = {k: t.clone() for k, t in tensors.read(tmp_path / "adapter_model.safetensors").items()}
    assert sorted(n.split("model.")[-1] for n in held) == [
        "embed_tokens.lora_embedding_A",
        "embed_tokens.lora_embedding_B",
        "lm_head.lora_A.weight",
        "lm_head.lora_B.weight",
    ]
    held["base_model.model.lm_head.lora_A.weight"] += 1
    files.save(tmp_path, {"adapter_model.safetensors": tensors.encode(held)})
    with pytest.raises(LoadError, match="trained apart"):
        PeftModel.from_pretrained(llama(), tmp_path)
