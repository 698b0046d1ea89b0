"""Several adapters on one model, and the other doors in and out, against the reference."""

from __future__ import annotations

import pytest

from tests.interop import compare
from tests.reference.actions import Case, Config

TOLERANCE = 1e-6
NAMES = ["default", "other", "third"]

CASES = {
    "mlp": Case("several-mlp", "mlp", Config("LoraConfig", {"r": 2, "target_modules": ["lin0", "lin1"]})),
    "dora": Case("several-dora", "mlp", Config("LoraConfig", {"target_modules": ["lin0"], "use_dora": True})),
    "llama": Case("several-llama", "llama", Config("LoraConfig", {"r": 4, "task_type": "CAUSAL_LM"})),
    "gpt2": Case("several-gpt2", "gpt2", Config("LoraConfig", {"r": 4, "task_type": "CAUSAL_LM"})),
    "bert": Case("several-bert", "bert", Config("LoraConfig", {"r": 4, "task_type": "SEQ_CLS"})),
    "embedding": Case("several-embedding", "embconv1d", Config("LoraConfig", {"target_modules": ["emb", "conv1d"]})),
}

every_case = pytest.mark.parametrize("name", CASES)


def _places(directory, names=NAMES):
    return {name: str(directory if name == "default" else directory / name) for name in names}


@pytest.mark.parametrize("active", ["default", "other", ["other", "third"]], ids=str)
@pytest.mark.parametrize("name", ["mlp", "llama", "embedding"])
def test_active_adapters(pair, tmp_path, name, active):
    case = CASES[name]
    theirs = pair.reference.ask("several", case, NAMES, active, str(tmp_path / "theirs"))
    ours = pair.ours.ask("several", case, NAMES, active, str(tmp_path / "ours"))
    assert ours["trainable"] == theirs["trainable"]
    compare.assert_close({"disabled": ours["disabled"]}, {"disabled": theirs["disabled"]}, TOLERANCE)

    read_by_us = pair.ours.ask("read_several", case, _places(tmp_path / "theirs"), active)
    read_by_them = pair.reference.ask("read_several", case, _places(tmp_path / "ours"), active)
    compare.assert_close({"output": read_by_us["output"]}, {"output": theirs["output"]}, TOLERANCE)
    compare.assert_close({"output": read_by_them["output"]}, {"output": ours["output"]}, TOLERANCE)
    compare.assert_close({"merged": read_by_us["merged"]}, {"merged": theirs["output"]}, 1e-5)


@pytest.mark.parametrize(
    "names", [["default", "other", "__base__", "other"], ["third"], ["__base__", "__base__"]], ids=str
)
@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "embedding"])
def test_an_adapter_for_each_sample(pair, tmp_path, name, names):
    pair.reference.ask("several", CASES[name], NAMES, "default", str(tmp_path))
    ours, reference = (
        side.ask("mixed_batch", CASES[name], _places(tmp_path), names) for side in (pair.ours, pair.reference)
    )
    compare.assert_close(ours, reference, TOLERANCE)


@every_case
def test_same_folders(pair, tmp_path, name):
    for side in (pair.ours, pair.reference):
        side.ask("several", CASES[name], NAMES, "other", str(tmp_path / side.name))
    files = {
        side: sorted(str(p.relative_to(tmp_path / side)) for p in (tmp_path / side).rglob("*") if p.is_file())
        for side in ("ours", "reference")
    }
    assert files["ours"] == files["reference"]
    for folder in ("", "other", "third"):
        ours, reference = tmp_path / "ours" / folder, tmp_path / "reference" / folder
        assert compare.tensors_in(ours) == compare.tensors_in(reference)
        # The reference notes the layout of Conv1D weights in the first adapter's config only.
        configs = [{**compare.config_in(place), "fan_in_fan_out": None} for place in (ours, reference)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "embedding"])
def test_inject(pair, name):
    ours, reference = (side.ask("inject", CASES[name]) for side in (pair.ours, pair.reference))
    ours.pop("change", None), reference.pop("change", None)
    assert ours == reference


@every_case
def test_status(pair, name):
    ours, reference = (side.ask("status", CASES[name]) for side in (pair.ours, pair.reference))
    assert ours == reference


#: Ways to combine adapters. The SVD and the random ones agree in shape; their values have a freedom (signs, draws).
COMBINATIONS = [
    {"combination_type": "linear"},
    {"combination_type": "cat"},
    {"combination_type": "svd"},
    {"combination_type": "svd", "svd_rank": 2},
    {"combination_type": "ties", "density": 0.5},
    {"combination_type": "ties", "density": 0.5, "majority_sign_method": "frequency"},
    {"combination_type": "ties_svd", "density": 0.5},
    {"combination_type": "dare_linear", "density": 1.0},
    {"combination_type": "dare_ties", "density": 1.0},
    {"combination_type": "magnitude_prune", "density": 0.5},
    {"combination_type": "magnitude_prune_svd", "density": 0.5},
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_add_weighted_adapter(pair, tmp_path, name, options):
    pair.reference.ask("several", CASES[name], NAMES, "default", str(tmp_path))
    places = _places(tmp_path)
    weights = [0.7, 0.2, -0.4]
    reference = pair.reference.ask("combine", CASES[name], places, weights, **options)
    ours = pair.ours.ask("combine", CASES[name], places, weights, reference=True, **options)
    assert ours["state_dict"] == reference["state_dict"]
    compare.assert_close({"output": ours["output"]}, {"output": reference["output"]}, 1e-5)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_of_new_adapters(pair, dtype, autocast):
    expression = (
        "{n: str(p.dtype) for n, p in peft.get_peft_model(models.build('mlp').to(getattr(torch, dtype)),"
        " peft.LoraConfig(target_modules=['lin0']), autocast_adapter_dtype=autocast).named_parameters()}"
    )
    ours, reference = (
        side.ask("call", expression, dtype=dtype, autocast=autocast) for side in (pair.ours, pair.reference)
    )
    assert ours == reference


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_without_memory_for_it_twice(pair, low_cpu_mem_usage):
    case = CASES["llama"]
    place, expected = pair.written(pair.reference, case)
    got = pair.ours.ask("read", case, str(place), low_cpu_mem_usage=low_cpu_mem_usage)
    compare.assert_close(got, expected, TOLERANCE)


def test_reads_pickled_weights(pair, tmp_path):
    write = (
        "peft.get_peft_model(models.build('mlp'), peft.LoraConfig(target_modules=['lin0'], init_lora_weights=False))"
        ".save_pretrained(place, safe_serialization=False)"
    )
    pair.reference.ask("call", write, place=str(tmp_path))
    assert (tmp_path / "adapter_model.bin").exists()
    case = Case("bin", "mlp", Config("LoraConfig", {"target_modules": ["lin0"]}))
    ours, reference = (side.ask("read", case, str(tmp_path)) for side in (pair.ours, pair.reference))
    compare.assert_close(ours, reference, TOLERANCE)
