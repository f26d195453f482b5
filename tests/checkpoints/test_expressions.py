"""Part expressions: Python's slices, and clear refusals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktmerge.checkpoints.expressions import PartExpression
from ktmerge.errors import UsageError

LANGUAGE = ["llm", "llm.layers[0]", "llm.layers[11]", "embed", "head", "norm"]
VISION = ["vision", "vision.layers[0]", "vision.head"]
REST = ["connector", "other", "audio", "audio.layers[0]", "encoder", "encoder.layers[1]"]
ALL = [*LANGUAGE, *VISION, *REST]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("llm", LANGUAGE),
        ("vision", VISION),
        ("connector", ["connector"]),
        ("embed", ["embed"]),
        ("head", ["head", "vision.head"]),
        ("norm", ["norm"]),
        ("other", ["other"]),
        ("audio", ["audio", "audio.layers[0]"]),
        ("encoder", ["encoder", "encoder.layers[1]"]),
        ("llm.layers", ["llm.layers[0]", "llm.layers[11]"]),
        ("llm.layers[:]", ["llm.layers[0]", "llm.layers[11]"]),
        ("llm.layers[0]", ["llm.layers[0]"]),
        ("llm.layers[1]", []),
        ("llm.layers[-1]", ["llm.layers[11]"]),
        ("vision.layers", ["vision.layers[0]"]),
        (" vision.layers , norm,connector ", ["vision.layers[0]", "norm", "connector"]),
    ],
)
def test_matches(text: str, parts: list[str]) -> None:
    expression = PartExpression.parse(text)
    counts = {"llm": 12, "vision": 1, "audio": 1, "encoder": 2}
    assert [part for part in ALL if expression.matches(part, counts)] == [part for part in ALL if part in parts]


BOUND = st.none() | st.integers(-15, 15)


@settings(max_examples=40, deadline=None)
@given(start=BOUND, stop=BOUND, step=st.none() | st.integers(1, 5), count=st.integers(1, 12))
def test_slices_are_pythons(start: int | None, stop: int | None, step: int | None, count: int) -> None:
    def shown(bound: int | None) -> str:
        return "" if bound is None else str(bound)

    text = f"llm.layers[{shown(start)}:{shown(stop)}" + (f":{step}]" if step else "]")
    expression = PartExpression.parse(text)
    found = [i for i in range(count) if expression.matches(f"llm.layers[{i}]", {"llm": count})]
    assert found == list(range(count))[slice(start, stop, step)]
    if (start or 0) >= 0 and (stop or 0) >= 0:
        assert found == [i for i in range(count) if expression.matches(f"llm.layers[{i}]")]


@pytest.mark.parametrize("text", ["llm.layers[-1]", "llm.layers[-3:]", "llm.layers[:-1]"])
def test_counting_from_an_unknown_end_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="counted from its end"):
        PartExpression.parse(text).matches("llm.layers[0]")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "part expression is empty.*e.g. 'vision'"),
        ("  ", "empty"),
        ("llm,", "can't read ''.*e.g. 'vision'"),
        ("llm.layers[0:8", r"can't read 'llm\.layers\[0:8'"),
        ("llm[3]", r"can't read 'llm\[3\]'"),
        ("llm.layers[a]", r"can't read the layers '\[a\]'"),
        ("llm.layers[]", r"can't read the layers '\[\]'"),
        ("llm.layers[1:2:0]", "can't read the layers"),
        ("llm.layers[1:2:-1]", "can't read the layers"),
        ("llm.layers[1:2:3:4]", "can't read the layers"),
        ("llm.layers[99999999999999999999]", "can't read the layers"),
        ("llm.layers[1, 2]", "can't read"),
        ("vison", "there is no part 'vison'. Did you mean 'vision'"),
        ("conector, llm", "Did you mean 'connector'"),
        ("zzz", "there is no part 'zzz'. Valid: audio, connector"),
        ("embed.layers[0]", "'embed' has no layers; only llm, vision"),
    ],
)
def test_malformed(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        PartExpression.parse(text)
