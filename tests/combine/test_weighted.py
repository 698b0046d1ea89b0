"""The eleven combination types: a sum is the sum, every error is measured, the reference's numbers come on demand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.combine import merge, weighted
from peft.combine.factored import Factors
from peft.combine.prune import prune
from peft.combine.terms import COMBINATION_TYPES, SUMS, Term
from peft.combine.weighted import combine
from peft.errors import ConfigError, UnsupportedError

WEIGHTS = [1.5, -0.7]
PRUNING = [kind for kind in COMBINATION_TYPES if kind not in SUMS]


def term(rank=4, scale=2.0, out=12, n=10, blocks=1, seed=0, bias=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(blocks, rank, n, generator=g, dtype=dtype)
    b = torch.randn(blocks, out, rank, generator=g, dtype=dtype)
    return Term(Factors(a, b), scale, torch.randn(out, generator=g, dtype=dtype) if bias else None)


def dense(term):
    return term.factors.dense() * term.scale


def options(kind, density=0.5):
    return {} if kind in SUMS else {"density": density}


@pytest.mark.parametrize("kind", SUMS)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    blocks=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_a_weighted_sum_is_the_sum(kind, ranks, weights, blocks):
    terms = [term(r, scale=0.5 + i, blocks=blocks, seed=i, bias=i > 0) for i, r in enumerate(ranks)]
    weights = weights[: len(terms)]
    new, report = combine({"fc": terms}, weights, kind)
    expected = sum(w * dense(t) for w, t in zip(weights, terms, strict=True))
    assert torch.allclose(new["fc"].factors.dense(), expected, atol=1e-10, rtol=1e-10)
    assert report.error < 1e-10
    if len(terms) > 1:
        bias = sum(w * t.scale * t.bias for w, t in zip(weights, terms, strict=True) if t.bias is not None)
        assert torch.allclose(new["fc"].bias, bias, atol=1e-12)


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_one_adapter_of_weight_one_and_density_one_is_itself(kind):
    one = term(bias=True)
    new, report = combine({"fc": [one]}, [1.0], kind, **options(kind, 1.0))
    assert torch.allclose(new["fc"].factors.dense(), dense(one), atol=1e-10)
    assert torch.allclose(new["fc"].bias, one.scale * one.bias)
    assert new["fc"].factors.rank == 4
    assert report.error < 1e-10


@pytest.mark.parametrize("kind", [k for k in COMBINATION_TYPES if "ties" not in k])
def test_full_density_is_the_sum(kind):
    terms = [term(), term(3, scale=0.25, seed=1)]
    new, _ = combine({"fc": terms}, WEIGHTS, kind, **options(kind, 1.0))
    expected = sum(w * dense(t) for w, t in zip(WEIGHTS, terms, strict=True))
    assert torch.allclose(new["fc"].factors.dense(), expected, atol=1e-10)


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_opposite_weights_of_negated_adapters_agree(kind):
    terms = [term(), term(seed=1)]
    negated = [terms[0], Term(terms[1].factors.scaled(-1.0), terms[1].scale)]
    draws = [{"generator": torch.Generator().manual_seed(7)} for _ in range(2)]
    one, _ = combine({"fc": terms}, [1.0, -0.5], kind, svd_rank=12, **options(kind), **draws[0])
    two, _ = combine({"fc": negated}, [1.0, 0.5], kind, svd_rank=12, **options(kind), **draws[1])
    assert torch.allclose(one["fc"].factors.dense(), two["fc"].factors.dense(), atol=1e-9)


@pytest.mark.parametrize(
    "kind", ["ties", "ties_svd", "dare_ties", "dare_ties_svd", "magnitude_prune_svd", "dare_linear_svd"]
)
def test_what_works_on_the_change_itself_does_so(kind):
    terms = [term(), term(3, seed=1)]
    new, report = combine(
        {"fc": terms}, [1.5, 0.7], kind, svd_rank=10, density=0.5, generator=torch.Generator().manual_seed(7)
    )
    function = getattr(merge, kind.removesuffix("_svd"))
    draws = {"generator": torch.Generator().manual_seed(7)} if "dare" in kind else {}
    by_hand = function([dense(t)[0] for t in terms], torch.tensor([1.5, 0.7], dtype=torch.float64), 0.5, **draws)
    assert torch.allclose(new["fc"].factors.dense()[0], by_hand, atol=1e-9)
    assert report.error < 1e-9


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_the_error_of_a_cut_is_the_measured_one(kind):
    terms = [term(blocks=2), term(3, seed=1, blocks=2)]
    runs = [
        combine(
            {"fc": terms}, WEIGHTS, kind, svd_rank=rank, generator=torch.Generator().manual_seed(0), **options(kind)
        )
        for rank in (10, 2)
    ]
    whole, cut = (new["fc"].factors.dense() for new, _ in runs)
    measured = float((whole - cut).norm() / whole.norm())
    assert measured > 0.01
    assert runs[1][1].error == pytest.approx(measured, rel=1e-6)
    assert runs[1][1].ranks == {"fc": 2}


def test_dropped_factors_are_the_sum_on_average():
    terms = [term(), term(3, seed=1)]
    g = torch.Generator().manual_seed(0)
    draws = [combine({"fc": terms}, WEIGHTS, "dare_linear", density=0.8, generator=g)[0]["fc"] for _ in range(400)]
    mean = torch.stack([d.factors.dense() for d in draws]).mean(0)
    expected = sum(w * dense(t) for w, t in zip(WEIGHTS, terms, strict=True))
    assert (mean - expected).norm() / expected.norm() < 0.1


def test_magnitude_prune_prunes_the_factors():
    one = term()
    new, _ = combine({"fc": [one]}, [1.0], "magnitude_prune", density=0.5)
    by_hand = prune(one.factors.B, 0.5, "magnitude") @ prune(one.factors.A, 0.5, "magnitude") * one.scale
    assert torch.allclose(new["fc"].factors.dense(), by_hand)


def test_a_dense_change_is_added_as_it_is():
    delta = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    odd = Term(term(seed=1).factors, delta=lambda: delta)
    new, report = combine({"fc": [term(), odd]}, WEIGHTS, "linear", svd_rank=10)
    assert torch.allclose(new["fc"].factors.dense()[0], 1.5 * dense(term())[0] - 0.7 * delta)
    _, cut = combine({"fc": [term(), odd]}, WEIGHTS, "linear")
    assert report.error < 1e-12
    assert cut.ranks == {"fc": 8}
    assert cut.error > 1e-3


def test_layers_that_only_some_adapters_have():
    new, report = combine({"a": [term(), None], "b": [None, term(3)], "c": [term(), term(3, seed=1)]}, WEIGHTS, "cat")
    assert report.ranks == {"a": 4, "b": 3, "c": 7}
    assert torch.allclose(new["b"].factors.dense(), -0.7 * dense(term(3)))


def test_layers_may_come_one_at_a_time(monkeypatch):
    events = []
    monkeypatch.setattr(
        weighted, "combine_layer", lambda *args, f=weighted.combine_layer: events.append("done") or f(*args)
    )

    def layers():
        for i in range(2):
            events.append(f"read l{i}")
            yield f"l{i}", [term(seed=i)]

    combine(layers(), [1.0], "ties", density=0.5)
    assert events == ["read l0", "done", "read l1", "done"]


def test_clamping_is_by_the_quantile_of_the_entries():
    free, _ = combine({"fc": [term()]}, [1.0], "svd")
    new, report = combine({"fc": [term()]}, [1.0], "svd", svd_clamp=0.9)
    f, c = free["fc"].factors, new["fc"].factors
    high = torch.quantile(torch.cat([f.B.flatten(), f.A.flatten()]), 0.9)
    assert torch.equal(c.A, f.A.clamp(-high, high))
    assert report.error == pytest.approx(float((f.dense() - c.dense()).norm() / f.dense().norm()), rel=1e-6)


def test_the_report_speaks():
    _, report = combine({"a": [term()], "b": [term(seed=2)]}, [1.0], "svd", svd_rank=1)
    assert report.worst(1)[0][1] == max(report.errors.values())
    assert str(report).startswith("svd: 2 layers, rank 1, relative error 0.")
    total = math.sqrt(
        sum((report.errors[k] * report.norms[k]) ** 2 for k in "ab") / sum(n**2 for n in report.norms.values())
    )
    assert report.error == pytest.approx(total)


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_half_precision_stays_half_precision(kind):
    terms = [term(dtype=torch.bfloat16), term(seed=1, dtype=torch.bfloat16, bias=True)]
    new, report = combine({"fc": terms}, [1.0, 1.0], kind, **options(kind))
    assert {new["fc"].factors.A.dtype, new["fc"].factors.B.dtype, new["fc"].bias.dtype} == {torch.bfloat16}
    if kind in SUMS:
        assert report.error < 0.01


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_meta_tensors_give_the_shapes_of_real_ones(kind):
    terms = [term(bias=True), term(3, seed=1)]
    meta = [Term(t.factors.to("meta"), t.scale, None if t.bias is None else t.bias.to("meta")) for t in terms]
    real, _ = combine({"fc": terms}, WEIGHTS, kind, **options(kind))
    new, report = combine({"fc": meta}, WEIGHTS, kind, **options(kind))
    assert new["fc"].factors.A.is_meta
    assert new["fc"].factors.B.shape == real["fc"].factors.B.shape
    assert new["fc"].bias.shape == real["fc"].bias.shape
    assert math.isnan(report.error)


def test_what_is_wrong_is_said():
    one = {"fc": [term()]}
    with pytest.raises(ConfigError, match="Did you mean 'ties_svd'"):
        combine(one, [1.0], "ties_svdd")
    with pytest.raises(ConfigError, match="needs `density`"):
        combine(one, [1.0], "ties")
    with pytest.raises(ConfigError, match="one weight per adapter"):
        combine(one, [1.0, 2.0], "svd")
    with pytest.raises(ConfigError, match="finite"):
        combine(one, [math.nan], "svd")
    with pytest.raises(ConfigError, match="quantile"):
        combine(one, [1.0], "svd", svd_clamp=2.0)
    with pytest.raises(ConfigError, match="one rank"):
        combine({"fc": [term(), term(3)]}, WEIGHTS, "linear", reference=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        combine({"fc": [Term(term().factors, delta=lambda: term().block(0))]}, [1.0], "svd", reference=True)


# ---------------------------------------------------------------- the reference


def test_the_reference_is_far_from_the_sum_and_says_so():
    terms = {"fc": [term(), term(seed=1)]}
    _, theirs = combine(terms, WEIGHTS, "linear", reference=True)
    assert theirs.error > 0.3
    assert combine(terms, WEIGHTS, "cat", reference=True)[1].error < 1e-12


ADAPTERS = """(
    lambda m: (
        [torch.nn.init.normal_(p) for n, p in m.named_parameters() if "lora_" in n],
        torch.manual_seed(0),
        m.base_model.add_weighted_adapter(["default", "b"], weights, "new", combination_type=kind, **options),
        {k: v.detach() for k, v in m.state_dict().items() if "lora_" in k},
    )[-1]
)((
    lambda config: (
        lambda m: (m.add_adapter("b", peft.LoraConfig(**{**config, "lora_alpha": 2})), m)[1]
    )(peft.get_peft_model(models.build("mlp"), peft.LoraConfig(**config)))
)(dict(r=2, lora_alpha=8, target_modules=["lin0"])))"""


@pytest.mark.parametrize("kind", [k for k in COMBINATION_TYPES if "dare" not in k])
def test_numbers_of_the_reference(reference, kind):
    choice = options(kind)
    state = reference.ask("call", ADAPTERS, weights=WEIGHTS, kind=kind, options=choice)

    def factors(name):
        (a,), (b,) = ([v for k, v in state.items() if f"lora_{x}.{name}." in k] for x in "AB")
        return Factors(a, b)

    terms = [Term(factors("default"), 4.0), Term(factors("b"), 1.0)]
    new, _ = combine({"lin0": terms}, WEIGHTS, kind, reference=True, **choice)
    theirs, ours = factors("new"), new["lin0"].factors
    assert torch.allclose(ours.dense(), theirs.dense(), atol=1e-5)
    if not kind.endswith("svd"):  # the SVD leaves the signs free
        assert torch.allclose(ours.A, theirs.A, atol=1e-6)
        assert torch.allclose(ours.B, theirs.B, atol=1e-6)
