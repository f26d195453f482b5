from __future__ import annotations

from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval.items import ChoiceItem, GenerateItem
from ktmerge.eval.rendering import make_items
from ktmerge.eval.templates import Template
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import ChoiceTask, GenerateTask, TextTask


def row(**values: Any) -> Row:
    return Row(4, "x.jsonl:5", values)


def choice(values: dict[str, Any] | None = None, **more: Any) -> ChoiceItem:
    settings = {"prompt": "{{ q }}", "choices": ["yes", "no"], "answer": "{{ a }}"} | more
    task = ChoiceTask(name="facts", kind="choice", data="x.jsonl", **settings)
    (item,) = make_items(task, [row(**({"q": "Q?", "a": 1} | (values or {})))])
    assert isinstance(item, ChoiceItem)
    return item


def test_templates_are_rendered_over_a_row() -> None:
    item = choice({"q": "2 < 3 & so on"}, prompt="Q: {{ q }}\nA:\n")
    assert item == ChoiceItem(4, "Q: 2 < 3 & so on\nA:\n", ("yes", "no"), 1, " ")


def test_choices_from_a_column_a_template_or_a_list_of_templates() -> None:
    values = {"options": ["a", "b", "c"], "x": "left"}
    assert choice(values, choices="options").choices == ("a", "b", "c")
    assert choice(values, choices="{{ options[:2] }}").choices == ("a", "b")
    assert choice(values, choices=["{{ x }}", "right"]).choices == ("left", "right")


@pytest.mark.parametrize(
    ("answer", "choices", "template", "index"),
    [
        (0, ["a", "b"], "{{ a }}", 0),
        (1.0, ["a", "b"], "{{ a }}", 1),
        (True, ["a", "b"], "{{ a }}", 1),
        (True, ["True", "False"], "{{ a }}", 0),
        (False, ["maybe", "Yes ", "no"], "{{ a }}", 2),
        ("1", ["a", "b"], "{{ a }}", 1),
        ("b", ["a", "b"], "{{ a }}", 1),
        (" b ", ["a", "b"], "{{ a }}", 1),
        ("b", [" a", " b"], "{{ a }}", 1),
        ("1", ["2", "1", "0"], "{{ a }}", 1),  # a text is one of the choices before it is an index
        (1, ["2", "0", "1"], "{{ a }}", 1),  # a number is an index
        (1, ["2", "0", "1"], "{{ a | string }}", 2),
        ("C", ["a", "b", "c"], "{{ 'ABC'.index(a) }}", 2),
        ("7", [6, 7], "{{ a }}", 1),
        (7, [6, 7], "{{ a | string }}", 1),
    ],
)
def test_the_answer_is_an_index_or_a_text(answer: Any, choices: list[Any], template: str, index: int) -> None:
    assert choice({"a": answer, "options": choices}, choices="options", answer=template).answer == index


@pytest.mark.parametrize(
    ("values", "settings", "said"),
    [
        ({"a": 2}, {}, "gives index 2; its 2 choices count from 0"),
        ({"a": -1}, {}, "gives index -1"),
        ({"a": None}, {}, "task 'facts', answer: x.jsonl:5 has null, no answer"),
        ({"a": True, "o": ["x", "y", "z"]}, {"choices": "o"}, "gives true, which is none of its choices"),
        ({"a": True, "o": ["x", "no"]}, {"choices": "o"}, "gives true, which is none of its choices"),
        ({"o": ["x", float("nan")]}, {"choices": "o"}, "has the choice nan, which is not a text"),
        ({"q": float("nan")}, {}, "x.jsonl:5: it prints nan, a missing number"),
        ({"q": "a\ud800"}, {}, r"task 'facts': x.jsonl:5 has half a character (\ud800) in a text"),
        ({"o": ["a", "\udfff"]}, {"choices": "o"}, r"x.jsonl:5 has half a character (\udfff)"),
        ({"a": []}, {}, "x.jsonl:5 gives an empty list; at least one answer is needed"),
        ({"a": [0, 2]}, {}, "x.jsonl:5 gives index 2; its 2 choices count from 0"),
        ({"a": [0, "maybe"]}, {}, "x.jsonl:5 gives 'maybe', which is none of its choices"),
        ({"a": [[0]]}, {}, "x.jsonl:5 gives [0], which is none of its choices"),
        ({"a": "maybe"}, {}, "gives 'maybe', which is none of its choices ['yes', 'no']"),
        ({"a": 1, "o": [1, 2]}, {"choices": "o"}, "the choices are numbers too"),
        ({"a": "2", "o": ["3", "8"]}, {"choices": "o"}, "'2', which is none of its choices ['3', '8']; write"),
        ({"o": []}, {"choices": "o"}, "has 0, at least 2 are needed"),
        ({"o": ["x"]}, {"choices": "o"}, "has 1, at least 2 are needed"),
        ({"o": ["x", ""]}, {"choices": "o"}, "has an empty choice"),
        ({"o": "xy"}, {"choices": "o"}, "gives 'xy', a list of texts is needed"),
        ({"o": ["x", None]}, {"choices": "o"}, "has the choice None, which is not a text"),
        ({}, {"choices": "optoins"}, "no column 'optoins'"),
        ({}, {"prompt": "{{ question }}"}, "x.jsonl:5 has no column 'question'; its columns are: q, a."),
        ({"question": ""}, {"prompt": "{{ qestion }}"}, "Did you mean 'question'?"),
        ({}, {"answer": "{{ gold }}"}, "task 'facts', answer: x.jsonl:5 has no column 'gold'"),
        ({"q": {"x": 1}}, {"prompt": "{{ q.y }}"}, "'dict object' has no attribute 'y'"),
        ({}, {"prompt": "{{ q / 2 }}"}, "the template fails on x.jsonl:5"),
        ({}, {"prompt": "{{ q"}, "task 'facts', prompt: not a valid template"),
        ({}, {"prompt": "{{ q.__class__.__mro__ }}"}, "the template"),
        (
            {},
            {"prompt": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
            "x.jsonl:5: its ranges count further than 100,000 in all",
        ),
        ({}, {"prompt": "{{ range(10 ** 12) }}"}, "x.jsonl:5: its ranges count further"),
        ({}, {"prompt": "{{ 9 ** 99999999 }}"}, "x.jsonl:5: '**' makes something too large"),
        ({}, {"prompt": "{{ 'x' * 10 ** 10 }}"}, "x.jsonl:5: '*' makes something too large"),
        ({}, {"prompt": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "x.jsonl:5: it calls itself endlessly"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        choice(values, **settings)
    assert said in str(caught.value)
    assert "task 'facts'" in str(caught.value)


def test_the_default_separator_knows_its_place() -> None:
    assert choice().continuations() == [" yes", " no"]
    assert choice(choices=[" yes", " no"]).continuations() == [" yes", " no"]
    assert choice(chat=True).continuations() == ["yes", "no"]
    assert choice(choices=[" yes", " no"], separator=" ").continuations() == ["  yes", "  no"]
    assert choice(chat=True, separator="\n").continuations() == ["\nyes", "\nno"]


def test_several_choices_may_be_right() -> None:
    item = choice({"a": ["no", 0, "yes"]})
    assert (item.answer, item.right) == (1, (1, 0))
    assert item.worked.answer == " no"
    assert choice({"a": [1]}).right == (1,)


def test_templates_count_anew_over_every_row() -> None:
    counting = "{% for i in range(60000) %}{% endfor %}{{ 2 ** 10 * 3 }}{{ 'ab' * 2 }}{{ 1.5 * 2 }}"
    for _ in range(3):
        assert choice(prompt=counting).prompt == "3072abab3.0"


def test_optional_columns_may_be_tested_for() -> None:
    assert choice(prompt="{% if hint is defined %}{{ hint }} {% endif %}{{ q }}").prompt == "Q?"


def test_generate_and_text_items() -> None:
    generate = GenerateTask(name="g", kind="generate", data="x.jsonl", prompt="{{ q }}", answer="{{ n }}")
    assert make_items(generate, [row(q="a", n=3)]) == [GenerateItem(4, "a", ("3",))]
    with pytest.raises(UsageError, match="no column 'text'"):
        make_items(TextTask(name="t", kind="text", data="x.jsonl"), [row(q="a")])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"x.jsonl:5: it prints null where text is needed; .* \(null stands in 'a'\)"),
        (float("nan"), "it prints nan, a missing number"),
        (["x", float("nan")], "has nan among its answers"),
        ({"a": 1}, "it prints a mapping"),
        ([None, "x"], r"x.jsonl:5 has None among its answers"),
        ([{"answer": "x"}], "among its answers; texts are needed"),
        ([], "gives an empty list"),
    ],
)
def test_answers_that_are_no_texts_are_refused(value: Any, said: str) -> None:
    task = GenerateTask(name="say", kind="generate", data="x.jsonl", prompt="Q", answer="{{ a }}")
    with pytest.raises(UsageError, match=said):
        make_items(task, [row(a=value)])


def test_what_is_no_text_stands_in_a_prompt_only_where_that_is_said() -> None:
    for value, kind in ((None, "null"), (["a", "b"], "a list"), ({"a": 1}, "a mapping")):
        with pytest.raises(UsageError, match=f"task 'facts', prompt: .* x.jsonl:5: it prints {kind}"):
            choice({"q": value})
    assert choice({"q": ["a", "b"]}, prompt="{{ q | string }} {{ q | join(' or ') }} {{ 3 }}").prompt == (
        "['a', 'b'] a or b 3"
    )


def test_a_template_that_fills_the_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="it makes something too large"):
        Template("{{ '%99999999999s' % x }}", "task 't', prompt").text(Row(0, "x:1", {"x": 1}))
