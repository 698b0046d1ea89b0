"""Laws of the core that were broken once: what one adapter does leaves the others, and the base model, alone."""

import copy
import warnings
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    routing,
    set_peft_model_state_dict,
    whole,
)
from peft.auxiliary import ModulesToSaveWrapper
from peft.errors import AdapterNameError, LoadError, StateError, TargetError, UnsupportedError
from peft.functional import set_adapter
from peft.layer import AdaptedLayer

X = torch.linspace(-1, 1, 24).view(3, 8)
IDS = torch.arange(6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.q, self.v, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x if x.is_floating_point() else self.emb(x)
        return self.head(self.v(torch.tanh(self.q(x))))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0))


def lora(*targets, **options):
    return LoraConfig(r=2, target_modules=list(targets), **options)


def prompt(**options):
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **options)


def trained(model):
    return {name.replace(".base_layer", "") for name, p in model.named_parameters() if p.requires_grad}


def saved_and_damaged(model, folder, part):
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    values = load_file(path)
    save_file({k: v for k, v in values.items() if part not in k}, path)
    return folder


# adding


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_adding_an_adapter_changes_nothing_for_those_that_train(frozen, inference_mode):
    model = get_peft_model(Net(), lora("q", bias="all", modules_to_save=["head"]))
    model.set_requires_grad("default", not frozen)
    before = trained(model)
    model.add_adapter("b", lora("q", "v", modules_to_save=["head"], inference_mode=inference_mode))
    assert trained(model) == before
    assert all(layer.active_adapters == ["default"] for layer in whole.layers(model))


def test_loading_a_frozen_adapter_beside_leaves_the_active_one_training(tmp_path):
    model = get_peft_model(Net(), lora("q"))
    before = trained(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "b")
    assert trained(model) == before


def test_an_adapter_that_fails_to_start_leaves_no_part_behind():
    model = get_peft_model(Net(), lora("q", "v"))
    with pytest.raises(TargetError):
        model.add_adapter("b", LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights="orthogonal"))
    assert whole.adapters_in(model) == list(model.peft_config) == ["default"]
    model.add_adapter("b", lora("q", "v"))


@pytest.mark.parametrize("name", ["train", "type", "keys", "training"])
def test_names_that_torch_modules_use_are_refused_in_words(name):
    with pytest.raises(AdapterNameError, match="can't name an adapter"):
        get_peft_model(Net(), lora("q"), name)


def test_a_module_around_adapted_layers_is_not_trained_whole():
    model = get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)), lora("0.0"))
    with pytest.raises(TargetError, match="inside it"):
        model.add_adapter("b", lora("1", modules_to_save=["0"]))


def test_all_linear_leaves_out_whatever_is_trained_whole():
    sizes = {"n_layers": 1, "dim": 8, "hidden_dim": 16, "n_heads": 2, "vocab_size": 20}
    model = DistilBertForSequenceClassification(DistilBertConfig(**sizes))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert isinstance(model.base_model.pre_classifier, ModulesToSaveWrapper)


def test_rows_of_embeddings_train_in_the_base_dtype_if_asked():
    config = lora("q", trainable_token_indices={"emb": [1]})
    model = get_peft_model(Net().bfloat16(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


# biases


def test_biases_of_a_loaded_adapter_are_frozen_unless_it_is_trainable(tmp_path):
    base = Net()
    get_peft_model(copy.deepcopy(base), lora("q", bias="all")).save_pretrained(tmp_path)
    assert not trained(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    assert any("bias" in n for n in trained(PeftModel.from_pretrained(base, tmp_path, is_trainable=True)))


def test_lora_only_means_the_layers_of_that_adapter():
    model = get_peft_model(Net(), lora("q", bias="lora_only"))
    alone = get_peft_model_state_dict(model).keys()
    model.add_adapter("b", lora("v"))
    assert get_peft_model_state_dict(model).keys() == alone


# merging and unloading


def test_a_refused_merge_changes_nothing():
    base = Net()
    model = get_peft_model(base, lora("q", "v"))
    with torch.no_grad():
        base.q.lora_B["default"].weight.fill_(float("nan"))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        assert [layer.merged for layer in whole.layers(base)] == [False, False]
        with pytest.raises(AdapterNameError, match="defaul"):
            merge(adapter_names=["defaul"])


@pytest.mark.parametrize("targets", [("q",), ("q", "emb")])
def test_rows_and_adapters_of_one_embedding_merge_and_come_apart(targets):
    base = Net()
    was = {k: v.clone() for k, v in base.state_dict().items()}
    config = lora(*targets, init_lora_weights=False, trainable_token_indices={"emb": [1, 2]})
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        base.emb.token_adapter.trainable_tokens_delta["default"].add_(1)
    y = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), y)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(IDS), y)
    plain = model.unload()
    assert all(torch.equal(v, was[k]) for k, v in plain.state_dict().items())


def test_tensors_are_not_loaded_under_merged_weights():
    model = get_peft_model(Net(), lora("q"))
    values = get_peft_model_state_dict(model)
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        set_peft_model_state_dict(model, values)


# loading


@pytest.mark.parametrize(
    ("make", "config", "part"), [(Net, lora("q"), "lora_B"), (gpt2, prompt(modules_to_save=["ln_f"]), "ln_f")]
)
def test_a_failed_load_gives_the_base_model_back_as_it_was(tmp_path, make, config, part):
    base = make()
    folder = saved_and_damaged(get_peft_model(copy.deepcopy(base), copy.deepcopy(config)), tmp_path, part)
    before, structure = trained(base), repr(base)
    with pytest.raises(LoadError):
        PeftModel.from_pretrained(base, folder)
    assert (trained(base), repr(base)) == (before, structure)
    assert not hasattr(base, "peft_config")


def test_a_loaded_adapter_trains_through_reentrant_checkpoints(tmp_path):
    base = gpt2()
    get_peft_model(copy.deepcopy(base), lora("c_attn", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    base.train()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    model(input_ids=IDS[None], labels=IDS[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# shared tensors


def test_shared_tensors_serve_all_adapters_injected_one_after_another():
    model = Net()
    for name in ("a", "b"):
        inject_adapter_in_model(VeraConfig(target_modules=["q", "v"], r=2), model, name)
    for name in ("a", "b"):
        set_adapter(model, name)
        assert model(X).isfinite().all()


def test_shared_tensors_are_loaded_and_frozen_with_their_adapter():
    def injected(model):
        config = VBLoRAConfig(target_modules=["q", "v"], r=2, num_vectors=8, vector_length=4, topk=2)
        return inject_adapter_in_model(config, model, "a")

    base = Net()
    one, two = injected(copy.deepcopy(base)), injected(copy.deepcopy(base))
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    report = set_peft_model_state_dict(two, get_peft_model_state_dict(one, adapter_name="a"), "a")
    assert not report.unexpected_keys
    torch.testing.assert_close(one(X), two(X))
    whole.set_requires_grad(two, "a", False)
    assert not trained(two)


# prompts beside


def test_prompts_and_weight_adapters_share_one_set_of_names():
    for first, second in ((lora("c_attn", task_type="CAUSAL_LM"), prompt()), (prompt(), lora("c_attn"))):
        model = get_peft_model(gpt2(), first)
        with pytest.raises(AdapterNameError, match="already"):
            model.add_adapter("default", second)


def test_a_prompt_that_is_added_waits_to_be_chosen():
    model = get_peft_model(gpt2(), prompt(modules_to_save=["lm_head"]))
    before = trained(model)
    model.add_adapter("b", prompt(modules_to_save=["lm_head", "ln_f"]))
    assert trained(model) == before
    assert model.base_model.transformer.ln_f.active_adapters == []


def test_choosing_a_prompt_takes_the_weight_adapters_out_of_effect():
    model = get_peft_model(gpt2(), lora("c_attn", task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    model.add_adapter("p", prompt())
    model.set_adapter("p")
    y = model(input_ids=IDS[None]).logits
    with model.use("p"):
        torch.testing.assert_close(model(input_ids=IDS[None]).logits, y, rtol=0, atol=0)


def test_the_last_adapter_can_go_and_another_come():
    model = get_peft_model(Net(), lora("q"))
    model.delete_adapter("default")
    assert model.active_adapters == []
    model.add_adapter("b", lora("v"))
    model.set_adapter("b")
    assert model.active_adapters == ["b"]
    assert all("v.lora" in name for name in trained(model))


# torch's own transformer layers


@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], ["out_proj"], "all-linear"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers_of_torch_see_adapters_in_evaluation(targets, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = get_peft_model(
        nn.TransformerEncoder(layer, 2), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = padded
    keep = ~mask[..., None]
    y = model.train()(x, src_key_padding_mask=mask)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(x, src_key_padding_mask=mask) * keep, y * keep, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x, src_key_padding_mask=mask) * keep, y * keep, rtol=1e-4, atol=1e-5)


def test_one_weight_of_torchs_attention_serves_one_adapter_at_a_time():
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True)})
    model = get_peft_model(attention, lora("out_proj"))
    rows = routing.Route(rows=("default", routing.BASE))
    with routing.route(rows), pytest.raises(UnsupportedError, match="reads the weight"):
        _ = model.base_model.model["a"].out_proj.weight


def test_a_file_loads_whether_or_not_other_token_rows_stood_around_the_layer(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4))

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base(), config, adapter_name="a").eval()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [2]}))
    model.set_adapter("a")
    expected = model(torch.arange(12))
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    loaded = PeftModel.from_pretrained(base(), tmp_path / "a")
    torch.testing.assert_close(loaded(torch.arange(12)), expected)


def test_layers_take_their_input_by_name_as_the_base_layers_do():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.mix(input=self.embed(input=ids))
            return self.head(input=self.attend(query=x, key=x, value=x)[0])

    config = LoraConfig(
        r=2, target_modules=["embed", "mix", "attend"], modules_to_save=["head"], init_lora_weights=False
    )
    model = get_peft_model(ByName(), config, "one").eval()
    model.add_adapter("two", config)
    ids = torch.randint(0, 5, (2, 3))
    with torch.no_grad():
        each = []
        for row, name in enumerate(("one", "two")):
            model.set_adapter(name)
            each.append(model(ids)[row])
        torch.testing.assert_close(model(ids, adapter_names=["one", "two"]), torch.stack(each))
        with pytest.raises(TypeError, match="'input'"):
            model.base_model.model.mix()


def test_a_model_that_has_run_and_trained_can_be_copied():
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), config).eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        model(x)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
            with torch.no_grad():
                parameter.mul_(0.5)
    model(x).sum().backward()
    with torch.no_grad():
        expected = model(x)
        for parameter in model.parameters():
            parameter.add_(0)
        assert torch.equal(copy.deepcopy(model)(x), expected)


def test_an_option_that_a_config_does_not_have_is_named_with_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'target_modules'"):
        LoraConfig(target_module=["q_proj"])

    class Own(LoraConfig):
        def __init__(self, note: str, **options) -> None:
            super().__init__(**options)
            self.note = note

    assert Own(note="kept", r=3).r == 3


def test_unloading_lets_go_of_the_old_weights_one_by_one(monkeypatch):
    model = get_peft_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), LoraConfig(r=2, target_modules=r"\d"))
    old = [weakref.ref(layer.base_layer.weight) for layer in model.base_model.model]
    there, merge = [], AdaptedLayer.merge

    def counting(*args, **kwargs):
        merge(*args, **kwargs)
        there.append(sum(reference() is not None for reference in old))

    monkeypatch.setattr(AdaptedLayer, "merge", counting)
    model.merge_and_unload()
    assert there == [5, 4, 3, 2, 1]
    assert not any(reference() for reference in old)
