"""Filters: which alerts pass, missing values, and errors of compilation."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_filter.packets.batch import UNKNOWN_BAND, AlertBatch
from broker_filter.streaming.expressions import FIELDS, ExpressionError, compile_filter
from broker_filter.streaming.scored import ScoredBatch

OUTPUTS = ("default.real", "other.sn")
NAN = float("nan")


@pytest.fixture
def batch(make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]) -> ScoredBatch:
    alerts = make_alerts(
        [472263571115115000, 472263571115115001, 3],
        object_id=["ZTF18a", "ZTF18b", "ZTF19c"],
        band=[1, 2, UNKNOWN_BAND],
        ra=[10.0, 20.0, 30.0],
        magpsf=[18.0, 19.0, NAN],
        sso=[0.0, 1.0, 0.0],
        ndethist=[0.0, 2.0, 4.0],
    )
    return make_scored(alerts, {"default": [0.9, 0.5, 0.7]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("real > 0.65 and magpsf < 18.5 and not sso", [True, False, False]),
        ("default.real > 0.65", [True, False, True]),
        ("`default.real` > 0.65", [True, False, True]),
        ("0.6 < real <= 0.8 or ra == 10", [True, False, True]),
        ("sso", [False, True, False]),
        ("not sso", [True, False, True]),
        ("not sso and real > 0.8 or sso and real < 0.6", [True, True, False]),
        ('band in ("g", "i")', [True, False, False]),
        ('band not in ("g",)', [False, True, False]),
        ('band != "g"', [False, True, False]),
        ("isnull(band)", [False, False, True]),
        ('object_id == "ZTF18b"', [False, True, False]),
        ('survey == "ztf" and schema_version == "4.02"', [True, True, True]),
        ("ndethist in (2, 4)", [False, True, True]),
        ("abs(ra - 20) < 5", [False, True, False]),
        ("-ra + 2 * +ra / 4 > -10", [True, False, False]),
        ("alert_id == 472263571115115001", [False, True, False]),
        ("alert_id in (472263571115115000, 3)", [True, False, True]),
        ("1 < 2", [True, True, True]),
        ("\n real > 0.65\n and sso == 0\n", [True, False, True]),
    ],
)
def test_alerts_pass_for_which_the_filter_is_true(batch: ScoredBatch, text: str, expected: list[bool]) -> None:
    assert compile_filter(text, FIELDS, OUTPUTS[:1]).evaluate(batch).tolist() == expected


@pytest.mark.parametrize(
    "text",
    [
        "magpsf < 18.5 and ra == 30",
        "not magpsf < 18.5 and ra == 30",
        "(magpsf == magpsf) and ra == 30",
        "magpsf != 5 and ra == 30",
        "not (magpsf in (1, 2)) and ra == 30",
        "magpsf and ra == 30",
        "not magpsf and ra == 30",
        "magpsf + 1 > 0 and ra == 30",
        "abs(magpsf) > 0 and ra == 30",
        "1 / (ra - 30) > 0 and ra == 30",
        'not band == "g" and ra == 30',
    ],
)
def test_a_missing_value_is_neither_true_nor_false(batch: ScoredBatch, text: str) -> None:
    assert not compile_filter(text, FIELDS, OUTPUTS[:1]).evaluate(batch).any()


def test_missing_value_does_not_change_a_result_that_other_values_decide(batch: ScoredBatch) -> None:
    assert compile_filter("magpsf < 18.5 or real > 0.6", FIELDS, OUTPUTS).evaluate(batch).tolist() == [
        True,
        False,
        True,
    ]
    assert compile_filter("not (magpsf < 0 and real > 5)", FIELDS, OUTPUTS).evaluate(batch).all()
    assert compile_filter("isnull(magpsf) and not isnull(ra)", FIELDS, OUTPUTS).evaluate(batch).tolist() == [
        False,
        False,
        True,
    ]


def test_expression_lists_the_fields_and_outputs_that_it_reads() -> None:
    expression = compile_filter("real > 0.5 and (sn < 1 or magpsf < 18 and ra > 0)", FIELDS, OUTPUTS)
    assert expression.names == {"default.real", "other.sn", "magpsf", "ra"}
    assert expression.columns == ["magpsf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("real > 0.65 and magps < 18", r"character 17: unknown name 'magps'; did you mean 'magpsf'\?"),
        ("reel > 1", r"character 1: unknown name 'reel'; did you mean 'real'\?"),
        ("defualt.real > 1", r"did you mean 'default.real'\?"),
        ("`not there` > 1", "character 1: unknown name 'not there'"),
        ("band > 'g'", "character 8: text can only be compared with"),
        ("band == 1", "character 9: text cannot be compared with a number"),
        ("band", "character 1: this is text, but a truth value is needed"),
        ("band + 1 > 2", "character 1: a number is needed here, but this is text"),
        ("(ra > 1) == (dec > 1)", "character 14: true or false cannot be compared"),
        ("-(ra > 1) > 2", "character 3: a number is needed here"),
        ("ra > 1 and", "character 1: invalid syntax"),
        ("ra = 1", "character 4: invalid syntax; `==` compares"),
        ("", "character 1: invalid syntax"),
        ("ra > 1; dec > 1", "invalid syntax"),
        ("sso == True", "True is neither a number nor text"),
        ("band is None", "character 9: filters do not support `is`"),
        ("ra in 5", "character 7: `in` is followed by values"),
        ("ra in ()", "character 7: `in` is followed by values"),
        ("band in (1, 2)", "character 10: text cannot be compared with a number"),
        ("ra ** 2 > 1", "character 1: filters do not support this"),
        ("ra if sso else dec", "character 1: filters do not support this"),
        ("[ra for ra in (1, 2)]", "filters do not support this"),
        ("sqrt(ra) > 1", r"character 1: the only functions are abs\(x\), isnull\(x\), in_moc\(file\)"),
        ("abs(ra, dec) > 1", "the only functions"),
        ("isnull(ra > 1)", "needs a field"),
        ("__import__('os').system('true')", "the only functions"),
        ("().__class__.__bases__", "a name has at most one dot"),
        ("default.real.real > 1", "a name has at most one dot"),
        ("alert_id == 99999999999999999999", "needs more than 64 bits"),
        ("ra > 1j", "neither a number nor text"),
        ("f'{ra}' == 'x'", "filters do not support this"),
        ("not " * 60 + "sso", "nested deeper than 50"),
        ("(" * 500 + "ra" + ")" * 500, "character|not an expression"),
        ("-" * 1900 + "ra > 0", "nested deeper|not an expression"),
        ("ra > 1 or " * 500 + "ra > 1", "at most 2000 are allowed"),
        ("ra > \0", "not an expression|character"),
    ],
)
def test_error_names_the_position_and_a_correction(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        compile_filter(text, FIELDS, OUTPUTS)


def test_label_of_two_models_needs_the_name_of_the_model() -> None:
    outputs = ("default.real", "d6_m7.real")
    with pytest.raises(ExpressionError, match="character 1: more than one model has an output 'real'"):
        compile_filter("real > 0.5", FIELDS, outputs)
    assert compile_filter("d6_m7.real > 0.5", FIELDS, outputs).names == {"d6_m7.real"}


def test_field_has_precedence_over_a_label_of_the_same_name() -> None:
    assert compile_filter("drb > 0.5", FIELDS, ("mine.drb",)).names == {"drb"}


def test_large_integers_do_not_overflow(batch: ScoredBatch) -> None:
    assert compile_filter("alert_id * 100 > 0", FIELDS, OUTPUTS).evaluate(batch).all()


@given(st.text(alphabet="ra >0.5()and orbnm`'\"-+*/!=<,\n", max_size=60))
def test_any_text_compiles_or_is_refused(text: str) -> None:
    with suppress(ExpressionError):
        compile_filter(text, FIELDS, OUTPUTS)


def test_filter_agrees_with_numpy_on_many_alerts(
    make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]
) -> None:
    rng = np.random.default_rng(7)
    magnitude, real = rng.uniform(15, 21, 500), rng.uniform(0, 1, 500)
    magnitude[::7] = NAN
    scored = make_scored(make_alerts(list(range(500)), magpsf=magnitude), {"default": real})
    taken = compile_filter("real > 0.65 and magpsf < 18.5", FIELDS, OUTPUTS).evaluate(scored)
    expected = (real.astype(np.float32) > np.float32(0.65)) & (magnitude < 18.5)
    assert np.array_equal(taken, expected)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("real > 0.5 and band == 'g'", True),
        ("  real >\n  0.5\tand band  == 'g' ", True),
        ("real > 0.50 and band == 'g'", False),
        ("real > 0.5 and band == ' g'", False),
        ("real > 0.5 and band == 'r'", False),
    ],
)
def test_the_revision_changes_with_the_text_but_not_with_white_space(text: str, same: bool) -> None:
    first = compile_filter("real > 0.5 and band == 'g'", FIELDS, OUTPUTS).revision
    assert re.fullmatch("[0-9a-f]{12}", first)
    assert (compile_filter(text, FIELDS, OUTPUTS).revision == first) is same


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (
            "real > 0.6 and (sso or isnull(band)) and not ndethist",
            ["real > 0.6", "sso or isnull(band)", "not ndethist"],
        ),
        (
            "`default.real` > 0.6 and\n object_id == 'é' and `other.sn` > 1",
            ["`default.real` > 0.6", "object_id == 'é'", "`other.sn` > 1"],
        ),
        ("real > 0.6 or sso and ndethist", ["real > 0.6 or sso and ndethist"]),
        ("0.1 < real < 0.95", ["0.1 < real < 0.95"]),
        ("magpsf < 18.5 and magpsf > 0", ["magpsf < 18.5", "magpsf > 0"]),
        ("1 < 2 and real > 0.6", ["1 < 2", "real > 0.6"]),
    ],
)
def test_the_terms_of_a_filter_are_the_operands_of_its_outermost_and(
    batch: ScoredBatch, text: str, terms: list[str]
) -> None:
    expression = compile_filter(text, FIELDS, OUTPUTS)
    assert [term.text for term in expression.terms] == terms
    outputs = batch.scores.columns() | {"other.sn": np.array([2.0, NAN, 0.0], np.float32)}
    values = expression.values(batch.alerts, outputs)
    truths = [term.truth(values, len(batch.alerts)) for term in expression.terms]
    alone = [compile_filter(term, FIELDS, OUTPUTS).holds(batch.alerts, outputs).tolist() for term in terms]
    assert [truth.true.tolist() for truth in truths] == alone
    assert np.all([truth.true for truth in truths], axis=0).tolist() == expression.holds(batch.alerts, outputs).tolist()
    assert not any((truth.true & truth.false).any() for truth in truths)
