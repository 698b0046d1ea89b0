"""What other libraries rely on beyond signatures: names of parameters, types of containers, what a call changes."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.functional import delete_adapter
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from tests import models

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["lin0"], "init_lora_weights": False}


@pytest.fixture
def model():
    return get_peft_model(models.build("mlp"), LoraConfig(**LORA, modules_to_save=["lin1"])).eval()


@pytest.fixture
def layer(model) -> LoraLayer:
    return model.base_model.model.lin0


@pytest.fixture
def wrapper(model) -> ModulesToSaveWrapper:
    return model.base_model.model.lin1


def _run(model) -> torch.Tensor:
    return models.run(model, models.example("mlp"))


class TestNames:
    def test_lora(self, model):
        assert {name for name, _ in model.named_parameters()} == {
            "base_model.model.lin0.base_layer.weight",
            "base_model.model.lin0.base_layer.bias",
            "base_model.model.lin0.lora_A.default.weight",
            "base_model.model.lin0.lora_B.default.weight",
            "base_model.model.lin1.original_module.weight",
            "base_model.model.lin1.original_module.bias",
            "base_model.model.lin1.modules_to_save.default.weight",
            "base_model.model.lin1.modules_to_save.default.bias",
        }

    def test_embedding_and_magnitude(self):
        config = LoraConfig(target_modules=["emb", "conv1d"], use_dora=True)
        names = {name for name, _ in get_peft_model(models.build("embconv1d"), config).named_parameters()}
        assert "base_model.model.emb.lora_embedding_A.default" in names
        assert "base_model.model.emb.lora_embedding_B.default" in names
        assert "base_model.model.emb.lora_magnitude_vector.default.weight" in names
        assert "base_model.model.conv1d.lora_magnitude_vector.default.weight" in names

    def test_another_adapter_lies_beside_the_first(self, model):
        model.add_adapter("ref", LoraConfig(**LORA))
        name = "base_model.model.lin0.lora_A.default.weight"
        assert model.get_parameter(name.replace(".default.", ".ref.")).shape == model.get_parameter(name).shape

    def test_prefix(self, model):
        assert model.prefix == "lora_"


class TestLayer:
    def test_containers(self, layer):
        for name in ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"):
            assert isinstance(getattr(layer, name), nn.ModuleDict), name
        for name in ("lora_embedding_A", "lora_embedding_B"):
            assert isinstance(getattr(layer, name), nn.ParameterDict), name
        for name in ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias"):
            assert list(getattr(layer, name)) == ["default"], name
        assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (4, 8, 2.0)

    def test_classes(self, layer):
        assert isinstance(layer, BaseTunerLayer)
        assert isinstance(layer, LoraLayer)
        assert LoraLayer.adapter_layer_names[:2] == ("lora_A", "lora_B")

    def test_active_adapter_is_a_list(self, model, layer):
        assert layer.active_adapter == ["default"]
        assert layer.active_adapters == ["default"]
        model.add_adapter("b", LoraConfig(**LORA))
        model.add_adapter("a", LoraConfig(**LORA))
        layer.set_adapter(["b", "a"])
        assert layer.active_adapters == ["b", "a"]

    @pytest.mark.parametrize("name", ["active_adapter", "disable_adapters", "merged"])
    def test_read_only(self, layer, name):
        with pytest.raises(AttributeError):
            setattr(layer, name, True)

    def test_enable_adapters(self, model, layer):
        with_adapter = _run(model)
        layer.enable_adapters(enabled=False)
        assert layer.disable_adapters is True
        assert not torch.allclose(_run(model), with_adapter)
        layer.enable_adapters(enabled=True)
        assert torch.equal(_run(model), with_adapter)

    def test_merged_adapters_is_an_assignable_list(self, layer):
        assert layer.merged_adapters == []
        layer.merge()
        assert layer.merged
        assert layer.merged_adapters == ["default"]
        layer.unmerge()
        layer.merged_adapters = []
        assert not layer.merged

    def test_merge_takes_adapter_names(self, layer):
        assert list(inspect.signature(layer.merge).parameters) == ["safe_merge", "adapter_names"]

    def test_merging_keeps_the_output_and_unmerging_the_bits(self, model, layer):
        before, weight = _run(model), layer.get_base_layer().weight.clone()
        layer.merge()
        assert not torch.equal(layer.get_base_layer().weight, weight)
        torch.testing.assert_close(_run(model), before)
        layer.unmerge()
        assert torch.equal(layer.get_base_layer().weight, weight)

    def test_scaling_is_read_at_call_time(self, model, layer):
        with model.disable_adapter():
            bare = layer(torch.ones(1, 10))
        full = layer(torch.ones(1, 10))
        layer.scaling["default"] *= 0.5
        torch.testing.assert_close(layer(torch.ones(1, 10)) - bare, (full - bare) / 2)

    def test_weights_are_read_at_call_time(self, model, layer):
        layer.lora_B["default"].weight = nn.Parameter(torch.zeros(20, 4))
        with model.disable_adapter():
            bare = _run(model)
        assert torch.equal(_run(model), bare)

    def test_scale_methods(self, layer):
        layer.scale_layer(3.0)
        assert layer.scaling["default"] == 6.0
        layer.unscale_layer(1.5)
        assert layer.scaling["default"] == 4.0
        layer.unscale_layer(None)
        assert layer.scaling["default"] == 2.0
        layer.set_scale("default", 0.25)
        assert layer.scaling["default"] == 0.5

    def test_set_adapter_moves_requires_grad_and_takes_unknown_names(self, layer):
        layer.set_adapter("elsewhere")
        assert layer.active_adapters == ["elsewhere"]
        assert not layer.lora_A["default"].weight.requires_grad
        layer.set_adapter("default")
        assert layer.lora_A["default"].weight.requires_grad

    def test_delete_adapter(self, model, layer):
        model.add_adapter("other", LoraConfig(**LORA))
        layer.delete_adapter("other")
        for name in ("lora_A", "lora_B", "lora_dropout", "scaling", "r", "lora_alpha"):
            assert list(getattr(layer, name)) == ["default"], name

    def test_get_delta_weight(self, layer):
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected)

    def test_stands_in_for_the_base_layer(self, layer):
        assert layer.weight is layer.get_base_layer().weight
        assert layer.bias is layer.get_base_layer().bias
        assert (layer.in_features, layer.out_features) == (10, 20)

    def test_input_casting_can_be_switched_off(self, layer):
        layer.get_base_layer().to(torch.float64)
        layer.lora_A.to(torch.float64), layer.lora_B.to(torch.float64)
        with disable_input_dtype_casting(layer):
            assert layer(torch.ones(1, 10, dtype=torch.float64)).dtype == torch.float64


class TestModulesToSave:
    def test_active_adapter_is_a_key(self, wrapper):
        assert wrapper.active_adapter == "default"
        assert wrapper.modules_to_save[wrapper.active_adapter] is not wrapper.original_module
        assert isinstance(wrapper, AuxiliaryTrainingWrapper)

    def test_one_active_at_a_time(self, model, wrapper):
        model.add_adapter("other", LoraConfig(**LORA, modules_to_save=["lin1"]))
        wrapper.set_adapter(["other"])
        assert wrapper.active_adapter == "other"
        with pytest.raises(ValueError):
            wrapper.set_adapter(["default", "other"])

    def test_load_map(self, wrapper):
        assert wrapper.adapter_state_dict_load_map("default") == {
            "bias": "modules_to_save.default.bias",
            "weight": "modules_to_save.default.weight",
        }

    def test_disabling_reaches_it(self, model, wrapper):
        before = _run(models.build("mlp"))
        with torch.no_grad():
            wrapper.modules_to_save["default"].weight.add_(1.0)
        with model.disable_adapter():
            assert torch.equal(_run(model), before)
        assert not torch.equal(_run(model), before)


class TestModel:
    def test_active_adapters(self, model):
        assert model.active_adapter == "default"
        assert model.active_adapters == ["default"]
        model.add_adapter("other", LoraConfig(**LORA, modules_to_save=["lin1"]))
        assert model.active_adapter == "default", "adding must not activate"
        assert list(model.peft_config) == ["default", "other"]
        model.set_adapter("other")
        assert model.active_adapter == "other"
        assert model.active_peft_config is model.peft_config["other"]

    def test_set_adapter_trains_the_active_one_only(self, model):
        model.add_adapter("other", LoraConfig(**LORA))
        model.set_adapter("other")
        trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        assert trained == {"other"}

    def test_set_adapter_for_inference(self, model):
        model.set_adapter("default", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
    def test_unknown_adapters_are_refused(self, model, call):
        with pytest.raises((ValueError, KeyError), match="nope"):
            getattr(model, call)("nope")

    def test_disable_adapter_nests_with_set_adapter(self, model):
        model.add_adapter("other", LoraConfig(**LORA, modules_to_save=["lin1"]))
        first, base = _run(model), _run(models.build("mlp"))
        model.set_adapter("other")
        second = _run(model)
        with model.disable_adapter():
            assert torch.equal(_run(model), base)
            model.set_adapter("default")
        assert torch.equal(_run(model), first)
        assert not torch.equal(first, second)

    def test_disable_adapter_survives_an_exception(self, model):
        before = _run(model)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            raise ZeroDivisionError
        assert torch.equal(_run(model), before)

    def test_attributes_of_the_base_model_show_through(self):
        base = models.build("llama")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
        assert model.config is base.config
        assert model.device == base.device
        assert callable(model.enable_input_require_grads)
        assert callable(model.merge_and_unload)
        assert model.model is base.model or model.model is base
        assert not hasattr(model, "no_such_attribute")
        with pytest.raises(AttributeError, match="no_such_attribute"):
            _ = model.no_such_attribute

    @pytest.mark.parametrize(
        ("task", "name", "expected"),
        [
            ("CAUSAL_LM", "llama", "PeftModelForCausalLM"),
            ("SEQ_2_SEQ_LM", "t5", "PeftModelForSeq2SeqLM"),
            ("SEQ_CLS", "bert", "PeftModelForSequenceClassification"),
            ("TOKEN_CLS", "bert_tokens", "PeftModelForTokenClassification"),
            ("QUESTION_ANS", "bert_qa", "PeftModelForQuestionAnswering"),
            ("FEATURE_EXTRACTION", "bert_features", "PeftModelForFeatureExtraction"),
            (None, "llama", "PeftModel"),
        ],
    )
    def test_task_classes(self, task, name, expected):
        model = get_peft_model(models.build(name), LoraConfig(task_type=task))
        assert type(model).__name__ == expected
        assert type(model) is getattr(peft, expected)
        assert isinstance(model, PeftModel)

    def test_counting(self, model, capsys):
        trainable, total = model.get_nb_trainable_parameters()
        assert trainable == 4 * 10 + 20 * 4 + 20 * 2 + 2
        assert total == trainable + sum(p.numel() for p in models.build("mlp").parameters())
        model.print_trainable_parameters()
        assert capsys.readouterr().out.startswith(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%:"
        )

    def test_base_model_comes_back(self, model):
        base = models.build("mlp")
        unloaded = model.unload()
        assert type(unloaded) is type(base)
        assert not any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in unloaded.modules())

    def test_generate(self):
        base = models.build("llama")
        inputs = models.example("llama")
        expected = base.generate(**inputs, max_new_tokens=4, do_sample=False)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), expected)


class TestFiles:
    def test_folders(self, model, tmp_path):
        model.add_adapter("other", LoraConfig(**LORA))
        model.save_pretrained(tmp_path)
        files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
        adapter = {"adapter_config.json", "adapter_model.safetensors"}
        assert files == {"README.md", *adapter, *(f"other/{name}" for name in adapter)}
        assert "library_name: peft" in (tmp_path / "README.md").read_text()

    def test_selected_adapters(self, model, tmp_path):
        model.add_adapter("other", LoraConfig(**LORA))
        model.save_pretrained(tmp_path, selected_adapters=["other"], safe_serialization=False)
        assert not (tmp_path / "adapter_config.json").exists()
        assert (tmp_path / "other" / "adapter_model.bin").exists()

    def test_only_the_main_process_writes(self, model, tmp_path):
        model.save_pretrained(tmp_path / "out", is_main_process=False)
        assert not list((tmp_path / "out").glob("adapter_model*"))

    def test_given_state_dict_is_what_is_saved(self, model, tmp_path):
        state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=state)
        assert all(not tensor.any() for tensor in peft.load_peft_weights(str(tmp_path), device="cpu").values())

    def test_model_card_can_be_written_alone(self, model, tmp_path):
        model.create_or_update_model_card(str(tmp_path))
        assert "library_name: peft" in (tmp_path / "README.md").read_text()

    def test_loading_onto_an_existing_name_reloads_in_place(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        before = _run(model)
        parameter = model.get_parameter("base_model.model.lin0.lora_B.default.weight")
        with torch.no_grad():
            parameter.zero_()
        result = model.load_adapter(str(tmp_path), "default", is_trainable=True)
        assert torch.equal(_run(model), before)
        assert model.get_parameter("base_model.model.lin0.lora_B.default.weight") is parameter
        assert not result.unexpected_keys

    def test_trainable_or_not_after_loading(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        frozen = PeftModel.from_pretrained(models.build("mlp"), tmp_path)
        trainable = PeftModel.from_pretrained(models.build("mlp"), tmp_path, is_trainable=True)
        assert not any(p.requires_grad for p in frozen.parameters())
        assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
        assert frozen.peft_config["default"].inference_mode
        assert not trainable.peft_config["default"].inference_mode

    def test_state_dict_keys(self, model):
        assert set(peft.get_peft_model_state_dict(model)) == {
            "base_model.model.lin0.lora_A.weight",
            "base_model.model.lin0.lora_B.weight",
            "base_model.model.lin1.weight",
            "base_model.model.lin1.bias",
        }

    def test_state_dict_of_a_plain_model_has_no_prefix(self):
        plain = peft.inject_adapter_in_model(LoraConfig(**LORA), models.build("mlp"), "given")
        state = peft.get_peft_model_state_dict(plain, adapter_name="given")
        assert set(state) == {"lin0.lora_A.weight", "lin0.lora_B.weight"}
        result = peft.set_peft_model_state_dict(plain, state, adapter_name="given")
        assert result.unexpected_keys == []
        assert result.missing_keys == []

    def test_unexpected_keys_are_named(self, model):
        state = {**peft.get_peft_model_state_dict(model), "base_model.model.nowhere.lora_A.weight": torch.zeros(1)}
        result = peft.set_peft_model_state_dict(model, state)
        assert any("nowhere" in key for key in result.unexpected_keys)

    def test_mismatched_sizes(self, model):
        state = peft.get_peft_model_state_dict(model)
        state["base_model.model.lin0.lora_A.weight"] = torch.zeros(3, 10)
        with pytest.raises(RuntimeError, match=r"size|shape"):
            peft.set_peft_model_state_dict(model, state)


class TestInjection:
    def test_in_place(self):
        base = models.build("mlp")
        config = LoraConfig(**LORA)
        assert peft.inject_adapter_in_model(config, base, "given") is base
        assert base.peft_config == {"given": config}
        assert isinstance(base.lin0, LoraLayer)

    def test_targets_by_model_type(self):
        base = peft.inject_adapter_in_model(LoraConfig(), models.build("llama"))
        assert isinstance(base.model.layers[0].self_attn.q_proj, LoraLayer)

    @pytest.mark.filterwarnings("ignore:.*state_dict")
    def test_targets_from_a_state_dict(self):
        base = peft.inject_adapter_in_model(LoraConfig(**LORA), models.build("mlp"))
        state = peft.get_peft_model_state_dict(base)
        again = peft.inject_adapter_in_model(
            LoraConfig(r=4, target_modules=["lin1"]), models.build("mlp"), state_dict=state
        )
        assert isinstance(again.lin0, LoraLayer)
        assert not isinstance(again.lin1, LoraLayer)

    def test_low_cpu_mem_usage_leaves_the_adapter_on_meta(self):
        base = peft.inject_adapter_in_model(LoraConfig(**LORA), models.build("mlp"), low_cpu_mem_usage=True)
        assert base.lin0.lora_A["default"].weight.is_meta
        assert not base.lin0.get_base_layer().weight.is_meta

    def test_functional_delete_adapter(self):
        base = peft.inject_adapter_in_model(LoraConfig(**LORA), models.build("mlp"), "one")
        peft.inject_adapter_in_model(LoraConfig(**LORA), base, "two")
        assert delete_adapter(base, adapter_name="two", prefix="lora_") == ["one"]
        assert set(base.peft_config) == {"one", "two"}
        assert list(base.lin0.lora_A) == ["one"]


class TestConfig:
    def test_round_trip_through_a_dict(self):
        config = LoraConfig(r=3, target_modules=["a", "b"], rank_pattern={"x": 2}, task_type="CAUSAL_LM")
        again = LoraConfig(**config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert LoraConfig(**dataclasses.asdict(config)).to_dict() == config.to_dict()
        assert config.target_modules == {"a", "b"}
        json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()})

    def test_unknown_arguments_are_type_errors(self):
        with pytest.raises(TypeError, match="rank"):
            LoraConfig(rank=4)

    def test_type(self):
        config = LoraConfig()
        assert config.peft_type is peft.PeftType.LORA
        assert config.peft_type == "LORA"
        assert config.peft_type.value == "LORA"
        assert config.is_prompt_learning is False

    def test_from_pretrained_returns_the_concrete_class(self, tmp_path):
        config = LoraConfig(r=3, target_modules=["q", "v"], base_model_name_or_path="some/model")
        config.save_pretrained(tmp_path / "sub")
        again = PeftConfig.from_pretrained(str(tmp_path), subfolder="sub")
        assert type(again) is LoraConfig
        assert (again.r, again.target_modules, again.base_model_name_or_path) == (3, {"q", "v"}, "some/model")

    def test_dataclass_subclasses(self, tmp_path):
        @dataclasses.dataclass
        class Extended(LoraConfig):
            lorap_lr_ratio: float | None = None

        config = Extended(r=2, target_modules=["lin0"], lorap_lr_ratio=4.0)
        assert config.peft_type == "LORA"
        assert isinstance(get_peft_model(models.build("mlp"), config).base_model.model.lin0, LoraLayer)

    def test_fields_are_settable(self):
        config = LoraConfig()
        config.inference_mode, config.base_model_name_or_path, config.task_type = True, "x", "SEQ_CLS"
        assert config.to_dict()["base_model_name_or_path"] == "x"

    def test_a_config_is_not_shared_between_models(self):
        config = LoraConfig(task_type="CAUSAL_LM")
        get_peft_model(models.build("llama"), config)
        get_peft_model(models.build("gpt2"), LoraConfig(task_type="CAUSAL_LM"))
        assert LoraConfig().target_modules is None
