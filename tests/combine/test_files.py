"""Adapters combined as files: the same sums, and files that say what they are."""

from __future__ import annotations

import json
import math

import pytest
import torch

from peft.checkpoint import files, tensors
from peft.combine.files import combine_files
from peft.combine.linear import add
from peft.combine.terms import COMBINATION_TYPES, SUMS
from peft.errors import ConfigError, PeftWarning, UnsupportedError
from peft.methods.lora.config import LoraConfig
from tests.reference.actions import Case, Config

SHAPES = {"a.fc": (6, 8), "b.fc": (6, 8), "out": (8, 5)}
PREFIX = "base_model.model."


def write(place, config, seed, shapes=SHAPES, metadata=None, dtype=torch.float64, **extra):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    state = dict(extra)
    for name, (n, out) in shapes.items():
        r = config.rank_pattern.get(name, config.r)
        state |= {f"{PREFIX}{name}.lora_A.weight": normal(r, n), f"{PREFIX}{name}.lora_B.weight": normal(out, r)}
        if config.lora_bias:
            state[f"{PREFIX}{name}.lora_B.bias"] = normal(out)
    files.save(
        place,
        {files.CONFIG_NAME: config.to_json_string(), files.SAFETENSORS_NAME: tensors.encode(state, metadata)},
    )
    return state


def change(state, name, scale):
    return scale * state[f"{PREFIX}{name}.lora_B.weight"] @ state[f"{PREFIX}{name}.lora_A.weight"]


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["fc", "out"], **options})


def read(place):
    return json.loads((place / "adapter_config.json").read_text()), tensors.read(place / files.SAFETENSORS_NAME)


@pytest.mark.parametrize("kind", SUMS)
def test_the_sum_of_files_is_the_sum(tmp_path, kind):
    one = write(tmp_path / "one", config(use_rslora=True), 0)
    two = write(tmp_path / "two", config(rank_pattern={"out": 2}, alpha_pattern={"a.fc": 3}), 1)
    report = combine_files([tmp_path / "one", tmp_path / "two"], [1.5, -0.5], tmp_path / "new", kind)
    new, state = read(tmp_path / "new")
    scales = {"a.fc": 3 / 4, "b.fc": 2.0, "out": 8 / 2}
    for name in SHAPES:
        expected = 1.5 * change(one, name, 8 / math.sqrt(4)) - 0.5 * change(two, name, scales[name])
        assert torch.allclose(change(state, name, 1.0), expected, atol=1e-10)
    assert report.error < 1e-10
    assert (new["use_rslora"], new["target_modules"]) == (False, ["fc", "out"])
    for name, rank in report.ranks.items():
        assert new["rank_pattern"].get(name, new["r"]) == new["alpha_pattern"].get(name, new["lora_alpha"]) == rank


def test_biases_add_with_their_scales(tmp_path):
    one = write(tmp_path / "one", config(lora_bias=True), 0)
    write(tmp_path / "two", config(), 1, {"b.fc": (6, 8), "c.fc": (6, 8)})
    combine_files([tmp_path / "one", tmp_path / "two"], [0.5, 1.0], tmp_path / "new")
    new, state = read(tmp_path / "new")
    assert new["lora_bias"]
    assert torch.allclose(state[f"{PREFIX}out.lora_B.bias"], 0.5 * 2.0 * one[f"{PREFIX}out.lora_B.bias"])
    assert not state[f"{PREFIX}c.fc.lora_B.bias"].any()


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_every_type_runs_on_files_and_cuts_to_the_rank(tmp_path, kind):
    for i in range(2):
        write(tmp_path / str(i), config(), i)
    choice = {} if kind in SUMS else {"density": 0.5}
    report = combine_files([tmp_path / "0", tmp_path / "1"], [1.0, 1.0], tmp_path / "new", kind, svd_rank=2, **choice)
    assert set(report.ranks.values()) == {2}
    assert read(tmp_path / "new")[0]["r"] == 2


def test_different_targets_are_united(tmp_path):
    write(tmp_path / "one", config(target_modules=["out"]), 0, {"out": (8, 5)})
    write(tmp_path / "two", config(target_modules=["a.fc"]), 1, {"a.fc": (6, 8)})
    combine_files([tmp_path / "one", tmp_path / "two"], [1.0, 1.0], tmp_path / "new")
    assert read(tmp_path / "new")[0]["target_modules"] == ["a.fc", "out"]


def test_a_regex_and_a_list_become_the_modules_by_name(tmp_path):
    write(tmp_path / "one", config(), 0)
    write(tmp_path / "two", config(target_modules=".*fc"), 1, {"a.fc": (6, 8), "b.fc": (6, 8)})
    combine_files([tmp_path / "one", tmp_path / "two"], [1.0, 1.0], tmp_path / "new")
    assert read(tmp_path / "new")[0]["target_modules"] == sorted(SHAPES)


def test_one_file_may_be_replaced_by_the_result_and_metadata_that_agrees_stays(tmp_path):
    for i in range(2):
        write(tmp_path / str(i), config(), i, metadata={"base": "x", "run": str(i)})
    combine_files([tmp_path / "0", tmp_path / "1"], [1.0, 1.0], tmp_path / "0")
    metadata = tensors.header(tmp_path / "0" / files.SAFETENSORS_NAME).metadata
    assert metadata.pop(tensors.CHECKSUM_KEY)
    assert metadata == {"format": "pt", "base": "x"}


REFUSED = {
    "dora": (config(use_dora=True), {}, "add_weighted_adapter"),
    "pissa": (config(init_lora_weights="pissa"), {}, "moves a part of the base"),
    "kasa": (config(kasa_config={}), {}, "truncates"),
    "modules": (config(modules_to_save=["head"]), {}, "modules_to_save"),
    "other tensors": (config(), {f"{PREFIX}head.weight": torch.ones(2)}, "head.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_sum_is_refused_and_nothing_is_written(tmp_path, name):
    setup, extra, message = REFUSED[name]
    write(tmp_path / "one", setup, 0, **extra)
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        combine_files([tmp_path / "one"] * 2, [1.0, 1.0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_adapters_that_differ_in_meaning_are_refused(tmp_path):
    write(tmp_path / "one", config(), 0)
    write(tmp_path / "two", config(alora_invocation_tokens=[1, 2]), 1)
    with pytest.raises(ConfigError, match="agree in alora_invocation_tokens"):
        combine_files([tmp_path / "one", tmp_path / "two"], [1.0, 1.0], tmp_path / "new")
    with pytest.raises(ConfigError, match="one weight per adapter"):
        combine_files([tmp_path / "one"], [1.0, 1.0], tmp_path / "new")


def test_other_bases_are_said_out_loud(tmp_path):
    for i in range(2):
        write(tmp_path / str(i), config(base_model_name_or_path=f"base-{i}"), i)
    with pytest.warns(PeftWarning, match="base-0"):
        combine_files([tmp_path / "0", tmp_path / "1"], [1.0, 1.0], tmp_path / "new")


def test_tensors_of_linear_methods_add_and_positions_have_to_agree():
    one, two = ({"w": torch.full((2,), v), "shira_indices": torch.tensor([0, 1])} for v in (1.0, 2.0))
    assert torch.equal(add([one, two], [1.0, -2.0])["w"], torch.full((2,), -3.0))
    with pytest.raises(ConfigError, match="different places"):
        add([one, {**two, "shira_indices": torch.tensor([0, 2])}], [1.0, 1.0])
    with pytest.raises(ConfigError, match="'more' differs"):
        add([one, {**two, "more": torch.ones(1)}], [1.0, 1.0])


COMBINED = """(lambda m: (
    m.load_adapter(places[1], adapter_name="b"),
    m.add_weighted_adapter(["default", "b"], weights, "new", combination_type=kind, **options),
    m.set_adapter("new"),
    models.run(m.eval(), models.example("mlp")),
)[-1])(peft.PeftModel.from_pretrained(models.build("mlp"), places[0]))"""


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_files_combined_here_for_the_reference_run_there_as_its_own(reference, tmp_path, kind):
    options = {} if kind in SUMS else {"density": 0.5}
    places = []
    for i, alpha in enumerate((8, 2)):
        case = Case(str(i), "mlp", Config("LoraConfig", {"r": 2, "lora_alpha": alpha, "target_modules": ["lin0"]}))
        places.append(str(tmp_path / str(i)))
        reference.ask("write", case, places[-1])
    theirs = reference.ask("call", COMBINED, places=places, weights=[1.5, -0.5], kind=kind, options=options)
    combine_files(places, [1.5, -0.5], tmp_path / "new", kind, reference=True, **options)
    ours = reference.ask("read", case, str(tmp_path / "new"))["output"]
    assert torch.allclose(ours, theirs, atol=1e-5)
