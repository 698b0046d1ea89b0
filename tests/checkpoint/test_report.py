"""A report names what does not fit, what was meant, and why."""

from __future__ import annotations

import pytest

from peft.checkpoint.report import LoadReport
from peft.errors import LoadError

Shapes = dict[str, tuple[int, ...]]


def lora(layers: int = 2, *, rank: int = 8, size: int = 64, prefix: str = "model.", q: str = "q_proj") -> Shapes:
    names: Shapes = {}
    for i in range(layers):
        for module in (q, "v_proj"):
            names[f"{prefix}layers.{i}.self_attn.{module}.lora_A.weight"] = (rank, size)
            names[f"{prefix}layers.{i}.self_attn.{module}.lora_B.weight"] = (size, rank)
    return names


def hada() -> Shapes:
    return {
        name.replace("lora_A.weight", "hada_w1_a").replace("lora_B.weight", "hada_w1_b"): s
        for name, s in lora().items()
    }


HEAD: Shapes = {"score.weight": (2, 64)}


def test_a_file_that_fits() -> None:
    report = LoadReport.between(lora(), lora())
    assert report.ok
    assert report.cause == ""
    assert "match" in str(report)
    report.raise_if_bad()


@pytest.mark.parametrize(
    ("expected", "found", "cause"),
    [
        (lora(), lora(prefix="base."), "calls 'model' the file calls 'base'"),
        (lora(), lora(prefix=""), "calls 'model.layers…' the file calls 'layers…'"),
        (lora(), lora(q="query"), "calls 'q_proj' the file calls 'query'"),
        (lora(), lora(rank=16), "rank .*16, .* asks for 8"),
        (lora(), lora(size=128), "another base model: .*size 128, .*have 64"),
        (lora(2), lora(4), "model ends at layer 1 and the file goes on to layer 3"),
        (lora(4), lora(2), "file ends at layer 1 and the model goes on to layer 3"),
        (lora(), hada(), "another method: it holds hada_w1_a, hada_w1_b, .* asks for lora_A, lora_B"),
        (lora(), {}, "no tensor of this adapter"),
        ({**lora(), **HEAD}, lora(), "Only the head"),
        (lora(), {**lora(), "classifier.weight": (2, 64)}, "Only the head"),
        ({**lora(), **HEAD}, {**lora(), "score.weight": (3, 64)}, "head has another size"),
        (lora(), {n: s for n, s in lora().items() if "v_proj" not in n}, "config adapts modules that the file"),
        ({n: s for n, s in lora().items() if "v_proj" not in n}, lora(), "file adapts modules that this config"),
        (lora(), {n: (1, *s) for n, s in lora().items()}, "number of dimensions"),
    ],
)
def test_the_cause_is_found(expected: Shapes, found: Shapes, cause: str) -> None:
    report = LoadReport.between(expected, found, "adapter_model.safetensors")
    with pytest.raises(LoadError, match=cause) as caught:
        report.raise_if_bad()
    assert caught.value.report is report
    assert "adapter_model.safetensors" in str(report)


def test_suggestions_keep_the_layer_and_the_slot() -> None:
    report = LoadReport.between(lora(12), lora(12, prefix="decoder.block."))
    assert len(report.suggestions) == 20
    for theirs, ours in report.suggestions.items():
        assert theirs.removeprefix("decoder.block.") == ours.removeprefix("model.")


def test_it_reads_and_unpacks_like_torch_s_pair() -> None:
    report = LoadReport.between({"a": (1,), "b": (1,)}, {"b": (1,), "c": (1,)})
    missing, unexpected = report
    assert missing == report.missing_keys == ["a"]
    assert unexpected == report.unexpected_keys == ["c"]


def test_long_lists_are_cut_and_counted() -> None:
    text = str(LoadReport.between(lora(50), {}))
    assert "200 missing in the file:" in text
    assert "… and 195 more" in text
    assert len(text.splitlines()) < 12


def test_what_is_forgiven_is_said_by_name() -> None:
    names = LoadReport.between({"a": (1,)}, {"b": (1,)})
    sizes = LoadReport.between({"a": (1, 2)}, {"a": (1, 3)})
    names.raise_if_bad(strict=False)
    with pytest.raises(LoadError):
        sizes.raise_if_bad(strict=False)
    sizes.raise_if_bad(strict=True, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError, match="strict=False"):
        names.raise_if_bad()
