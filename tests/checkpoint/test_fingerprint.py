"""A base is recognised through casts, and told from others that look alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.checkpoint import fingerprint
from peft.errors import CorruptFileError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def base(seed: int = 0, count: int = 6, scale: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.q_proj.weight": torch.randn(32, 48, generator=generator) * scale for i in range(count)}


def cast(tensors: dict[str, torch.Tensor], *dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    for dtype in dtypes:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors


def stored(tensors: dict[str, torch.Tensor | None], shapes: dict | None = None) -> dict:
    found = fingerprint.decode(fingerprint.encode(fingerprint.sketch(tensors, shapes or {})))
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_casts_do_not_matter(
    seed: int, scale: float, first: torch.dtype, left: torch.dtype, right: torch.dtype
) -> None:
    published = cast(base(seed, 2, scale), first)
    assert fingerprint.compare(stored(cast(published, left)), stored(cast(published, right))) == []


@given(st.integers(0, 1000), st.integers(1001, 2000))
@settings(max_examples=30, deadline=None)
def test_other_weights_do(left: int, right: int) -> None:
    differences = fingerprint.compare(stored(base(left)), stored(base(right)))
    assert {difference.what for difference in differences} == {"values"}
    assert len(differences) == 6


def test_a_fine_tune_of_the_same_model_is_another_model() -> None:
    tuned = {name: tensor + 0.002 * torch.randn(tensor.shape) for name, tensor in base().items()}
    assert fingerprint.compare(stored(base()), stored(tuned))


def test_layouts_do_not_matter() -> None:
    strided = {name: tensor.T.contiguous().T for name, tensor in base().items()}
    assert fingerprint.compare(stored(base()), stored(strided)) == []


def test_shapes_and_missing_tensors_are_named() -> None:
    current = base()
    del current["layers.1.q_proj.weight"]
    current["layers.2.q_proj.weight"] = torch.zeros(8, 8)
    differences = fingerprint.compare(stored(base()), stored(current))
    assert [(d.name, d.what) for d in differences] == [
        ("layers.1.q_proj.weight", "missing"),
        ("layers.2.q_proj.weight", "shape"),
    ]
    text = fingerprint.explain(differences, limit=1)
    assert text.startswith("2 of the base tensors")
    assert text.endswith("… and 1 more")


def test_quantised_is_told_from_not_and_harmless() -> None:
    packed = {name: torch.zeros(32 * 24, 1, dtype=torch.uint8) for name in base()}
    shapes = {name: tensor.shape for name, tensor in base().items()}
    differences = fingerprint.compare(stored(packed, shapes), stored(base()))
    assert [(d.what, d.saved, d.current) for d in differences] == [("precision", "quantized", "float")] * 6
    assert fingerprint.explain(differences) == ""


@pytest.mark.parametrize("device", ["meta", None])
def test_what_can_not_be_read_is_compared_by_shape(device: str | None) -> None:
    unread = {name: tensor.to(device) if device else None for name, tensor in base().items()}
    shapes = {name: tensor.shape for name, tensor in base().items()}
    assert fingerprint.compare(stored(unread, shapes), stored(base())) == []
    shapes["layers.0.q_proj.weight"] = torch.Size((1, 2))
    assert [d.what for d in fingerprint.compare(stored(unread, shapes), stored(base()))] == ["shape"]


def test_large_models_stay_small_and_compare_by_the_names_that_were_kept() -> None:
    many = {
        f"layers.{i}.experts.{j}.weight": torch.full((4, 4), float(i * 100 + j)) for i in range(32) for j in range(64)
    }
    saved = stored(many)
    assert len(fingerprint.names(saved)) == fingerprint.MAX_TENSORS
    assert len(fingerprint.encode(saved)) < 40_000
    current = fingerprint.sketch(many, {}, only=fingerprint.names(saved))
    assert fingerprint.compare(saved, current) == []
    few = fingerprint.names(saved)[:3]
    assert {d.what for d in fingerprint.compare(saved, fingerprint.sketch(many, {}, only=few))} == {"missing"}


def test_scalars_vectors_and_infinities() -> None:
    odd = {"a": torch.tensor(3.0), "b": torch.tensor([1.0, float("inf")]), "c": torch.empty(0, 3)}
    assert fingerprint.compare(stored(odd), stored(odd)) == []
    assert [d.name for d in fingerprint.compare(stored(odd), stored({**odd, "a": torch.tensor(4.0)}))] == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"version":1}',
        '{"version":1,"tensors":{"a":[[1],"float"]}}',
        '{"version":1,"tensors":{"a":[[1],"x",null]}}',
    ],
)
def test_damaged_fingerprints_are_refused(text: str) -> None:
    with pytest.raises(CorruptFileError):
        fingerprint.decode(text)


def test_a_later_version_is_not_judged() -> None:
    assert fingerprint.decode('{"version":99,"anything":[]}') is None
    assert fingerprint.decode(None) is None


@given(
    st.text(max_size=30)
    | st.from_regex(r'\{"version":1,"tensors":\{"a":\[\[[0-9,]{0,3}\],"float",[\[\]0-9.,a-z]{0,9}\]\}\}')
)
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        found = fingerprint.decode(text)
    except CorruptFileError:
        return
    assert found is None or isinstance(fingerprint.compare(found, stored(base())), list)
