"""LoRA's variants and data-free initialisations against the reference, on the layers where it has them right.

A variant that is not there yet says so when it is used (`UnsupportedError`, a `NotImplementedError`), and is skipped
here until then.
"""

from __future__ import annotations

import pytest

from tests.interop import compare
from tests.reference.actions import Case, Config

TOLERANCE = 1e-5

DENSE = ["L.Linear", "L.Linear_tall", "L.Conv1D", "L.Conv1D_wide", "llama", "gpt2"]
LINEAR = ["L.Linear", "L.Linear_tall", "llama"]

BLOCK_DIAGONAL = Config(
    "BdLoraConfig", {"target_modules_bd_a": ["q_proj", "tgt"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
)

VARIANTS = {
    "pissa": ({"init_lora_weights": "pissa"}, DENSE),
    "pissa_dora": ({"init_lora_weights": "pissa", "use_dora": True}, LINEAR),
    "olora": ({"init_lora_weights": "olora"}, LINEAR),
    "mica": ({"init_lora_weights": "mica"}, [*DENSE, "L.Embedding"]),
    "bdlora": ({"use_bdlora": BLOCK_DIAGONAL}, LINEAR),
    "velora": ({"velora_config": Config("VeloraConfig", {"num_groups": 4})}, DENSE),
    "monteclora": ({"monteclora_config": Config("MontecloraConfig", {"num_samples": 2})}, DENSE),
    "kasa": ({"kasa_config": Config("KasaConfig")}, LINEAR),
    "alora": ({"alora_invocation_tokens": [5, 6]}, ["llama"]),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, ["llama"]),
}

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
UNMERGEABLE = ("alora", "layer_replication")


def _cases() -> list[Case]:
    cells = [(name, options, model) for name, (options, models) in VARIANTS.items() for model in models]
    return [
        Case(
            f"{name}-{model}",
            model,
            Config(
                "LoraConfig",
                {
                    "r": 4,
                    "lora_alpha": 8,
                    **({"task_type": TASKS[model]} if model in TASKS else {"target_modules": ["tgt"]}),
                    **options,
                },
            ),
            mergeable=name not in UNMERGEABLE,
        )
        for name, options, model in cells
    ]


@pytest.fixture(params=_cases(), ids=lambda case: case.name)
def case(request, pair):
    try:
        pair.ours.ask("birth", request.param)
    except NotImplementedError as missing:
        pytest.skip(str(missing))
    return request.param


def test_born_alike(pair, case):
    compare.check_birth(pair, case)


def test_written_alike(pair, case):
    compare.check_files(pair, case)


def test_reads_what_the_reference_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.reference, reader=pair.ours, tolerance=TOLERANCE)


def test_the_reference_reads_what_we_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.ours, reader=pair.reference, tolerance=TOLERANCE)


#: Contradictions and impossibilities that the reference refuses with a ValueError (or a TypeError), as must we.
REFUSALS = {
    "r=0": ("mlp", {"r": 0, "target_modules": ["lin0"]}),
    "no such module": ("mlp", {"target_modules": ["nope"]}),
    "everything excluded": ("mlp", {"target_modules": ["lin0"], "exclude_modules": ["lin0"]}),
    "no default targets": ("mlp", {}),
    "unknown init": ("mlp", {"target_modules": ["lin0"], "init_lora_weights": "nope"}),
    "unknown bias": ("mlp", {"target_modules": ["lin0"], "bias": "some"}),
    "layer norm": ("L.LayerNorm", {"target_modules": ["tgt"]}),
    "batch norm": ("L.BatchNorm1d", {"target_modules": ["tgt"]}),
    "container": ("llama", {"target_modules": ["self_attn"]}),
    "regex with layers": ("llama", {"target_modules": ".*q_proj", "layers_to_transform": [0]}),
    "pattern without layers": ("llama", {"target_modules": ["q_proj"], "layers_pattern": "layers"}),
    "biases of B on an embedding": ("embconv1d", {"target_modules": ["emb"], "lora_bias": True}),
    "two variants": ("mlp", {"target_modules": ["lin0"], "use_dora": True, "alora_invocation_tokens": [1]}),
    "experts with dropout": ("experts", {"target_parameters": ["experts.w1"], "lora_dropout": 0.1}),
    "experts with biases of B": ("experts", {"target_parameters": ["experts.w1"], "lora_bias": True}),
    "no such parameter": ("experts", {"target_parameters": ["experts.w9"]}),
    "unknown task": ("mlp", {"target_modules": ["lin0"], "task_type": "NOPE"}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_alike(pair, name):
    model, options = REFUSALS[name]
    case = Case(name, model, Config("LoraConfig", options))
    ours, reference = (side.ask("error", "birth", case) for side in (pair.ours, pair.reference))
    assert reference, "the reference takes it"
    assert {reference[0], "ValueError"} & set(ours), f"the reference raises {reference[0]}, ours {ours}"
