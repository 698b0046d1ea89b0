"""torch.compile: whole graphs, and none compiled again for adapters that were seen or prepared for."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from peft import LoraConfig, PeftModel, get_peft_model
from peft.errors import ConfigError, LoadError, StateError
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tests.models import build, example


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})


@pytest.mark.parametrize("dora", [False, True])
def test_one_graph_per_adapter_and_no_breaks(dora):
    model = get_peft_model(build("llama"), lora(use_dora=dora))
    model.add_adapter("other", lora(use_dora=dora, lora_alpha=3))
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = example("llama")
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        found = compiled(**inputs).logits
        torch.testing.assert_close(found, model(**inputs).logits)
        found.sum().backward()
    assert graphs() == 2


def test_training_is_compiled_once():
    model = get_peft_model(build("llama"), lora(lora_dropout=0.1)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for between in (lambda: None, lambda: model(**example("llama")), model.train, lambda: model.eval().train()):
        compiled(**example("llama")).logits.sum().backward()
        between()
    compiled(**example("llama")).logits.sum().backward()
    assert graphs() == 1


@pytest.fixture
def folders(tmp_path):
    """Adapters of several ranks and scalings: {folder: logits of the model with it}."""
    found = {}
    for index, options in enumerate(({"r": 2}, {"r": 8, "lora_alpha": 3}, {"r": 3, "rank_pattern": {"q_proj": 6}})):
        torch.manual_seed(index)
        model = get_peft_model(build("llama"), lora(**options)).eval()
        model.save_pretrained(tmp_path / str(index))
        found[tmp_path / str(index)] = model(**example("llama")).logits.detach()
    return found


def test_hotswap_compiles_once(folders, tmp_path):
    first, *others = folders
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for folder in (first, *others, first):
        hotswap_adapter(compiled, folder, "default")
        torch.testing.assert_close(compiled(**example("llama")).logits, folders[folder])
    assert graphs() == 1
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "again").eval()
    assert again.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0] == 2
    torch.testing.assert_close(again(**example("llama")).logits, folders[first])


def test_hotswap_without_compilation_takes_any_rank(folders):
    first, second, third = folders
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    for folder in (second, third, first):
        hotswap_adapter(model, folder, "default")
        torch.testing.assert_close(model(**example("llama")).logits, folders[folder])


def test_hotswap_refuses_before_it_writes(folders):
    first, second, _ = folders
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    before = model(**example("llama")).logits
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(StateError, match="target_rank=8"):
        hotswap_adapter(compiled, second, "default")
    with pytest.raises(LoadError, match="unexpected keys found"):
        hotswap_adapter_from_state_dict(model, {"lora_A.weight": torch.ones(2, 2)}, "default", lora())
    assert torch.equal(model(**example("llama")).logits, before)


def test_layers_that_the_new_adapter_leaves_alone_get_zeros(folders):
    model = PeftModel.from_pretrained(build("llama"), next(iter(folders))).eval()
    hotswap_adapter_from_state_dict(model, {}, "default", lora())
    torch.testing.assert_close(model(**example("llama")).logits, build("llama")(**example("llama")).logits)


def test_preparation_comes_before_compilation_and_knows_ranks():
    model = get_peft_model(build("llama"), lora(r=4))
    with pytest.raises(ConfigError, match="original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    prepare_model_for_compiled_hotswap(model, config=lora(r=4, rank_pattern={"v_proj": 7}))
    attention = model.get_base_model().model.layers[0].self_attn
    assert [m.lora_A["default"].weight.shape[0] for m in (attention.q_proj, attention.v_proj)] == [4, 7]
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=8)
    with pytest.raises(ValueError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(build("mlp"), target_rank=8)


def test_configs_that_compute_differently_are_incompatible():
    check_hotswap_configs_compatible(lora(r=2), lora(r=9, lora_alpha=1))
    with pytest.raises(ValueError, match="use_dora"):
        check_hotswap_configs_compatible(lora(), lora(use_dora=True))
