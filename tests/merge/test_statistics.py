"""What stages see of measured statistics, and what is said where there are none or others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_memory import EMBED, MATRIX, NORM, Workbench, noise
from merge_models import read, write
from merge_statistics import measure, random

from ktmerge.errors import UsageError
from ktmerge.merge import blend, registry
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.record import origin
from ktmerge.merge.sections import check_recipe
from ktmerge.merge.source import Sources
from ktmerge.merge.stage import Context, Need, Parameters, Promises, Stages
from ktmerge.recipes.load import parse_recipe

NEEDS = [Need("inputs", "base"), Need("fisher", "base"), Need("fisher", "experts")]


class NoParameters(Parameters):
    """None."""


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method ``weighed``: each delta times its expert's Fisher information, element by element."""
    monkeypatch.setattr(registry, "_STAGES", registry.stages())
    monkeypatch.setattr(registry, "_METHODS", registry.methods())

    def weigh(deltas: list[torch.Tensor], parameters: NoParameters, context: Context) -> torch.Tensor:
        """Sum of deltas times Fisher information."""
        assert context.measured is not None
        assert context.measured.fisher_norm("a") == 3.0
        total = torch.zeros_like(deltas[0])
        for name, delta in zip(context.experts, deltas, strict=True):
            total += delta * context.measured.fisher(name)
        return total

    registry.stage("weighed", "combine", NoParameters, needs=lambda parameters: NEEDS)(weigh)
    registry.method(
        "weighed", "Only a test.", "none", Stages(("weighed", {})), promises=Promises(None, "other"),
        otherwise={"vector": Stages(), "embed": Stages()},
    )  # fmt: skip


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    write(folder / "base", noise(0, 1.0))
    write(folder / "experts" / "a", noise(1))
    expert = {"model": "experts/a"}
    return {"ktmerge": 1, "base": "base", "experts": {"a": expert}, "blend": {"method": "weighed"}, **changes}


def refusal(folder: Path, document: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        plan_blend(parse_recipe(document, "recipe", folder))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_stages_are_given_the_piece_that_was_measured(tmp_path: Path, weighed: None) -> None:
    deltas = {name: noise(seed) for seed, name in enumerate("ab")}
    whole = Workbench(tmp_path / "one").merged(deltas, {"method": "weighed"})
    expected = sum(
        delta[MATRIX] * random(f"fisher {name} {MATRIX}", tuple(delta[MATRIX].shape)) for name, delta in deltas.items()
    )
    torch.testing.assert_close(whole[MATRIX], expected)
    pieces = Workbench(tmp_path / "two").merged(deltas, {"method": "weighed"}, chunk=7)
    assert all(whole[name].equal(pieces[name]) for name in whole)


def test_inputs_are_those_of_the_tensor(tmp_path: Path, weighed: None) -> None:
    document = recipe_of(tmp_path)
    document["statistics"] = measure(tmp_path / "base", tmp_path / "stats" / "base")
    document["experts"]["a"]["statistics"] = measure(tmp_path / "experts" / "a", tmp_path / "stats" / "a")
    plan = plan_blend(parse_recipe(document, "recipe", tmp_path))
    tensor = next(one for one in plan.tensors if one.name == MATRIX)
    with Sources(plan) as sources:
        found = sources.measurements(tensor, 0, torch.zeros(12, 10))
        assert found.inputs().equal(random(f"inputs base {MATRIX}", (40, 10)))
        assert found.inputs("a").equal(random(f"inputs a {MATRIX}", (40, 10)))
        part = sources.measurements(tensor, 30, torch.zeros(5)).fisher("a")
        assert part.equal(random(f"fisher a {MATRIX}", (12, 10)).view(-1)[30:35])


def test_without_statistics_the_command_is_named(tmp_path: Path, weighed: None) -> None:
    document = recipe_of(tmp_path)
    said = refusal(tmp_path, document).splitlines()
    assert len(said) == 2
    assert "'ktmerge stats experts/a --data a.jsonl --out stats/a --fisher empirical'" in said[0]
    assert "'experts.a.statistics: stats/a'" in said[0]
    assert "method 'weighed' needs a sample of the inputs and the Fisher information of the base" in said[1]
    assert "'ktmerge stats base --data upstream.jsonl --out stats/base --fisher empirical'" in said[1]
    with pytest.raises(UsageError, match="ktmerge stats base"):
        check_recipe(parse_recipe(document, "recipe", tmp_path))


def test_what_was_measured_in_another_model_is_refused(tmp_path: Path, weighed: None) -> None:
    document = recipe_of(tmp_path)
    document["statistics"] = measure(tmp_path / "experts" / "a", tmp_path / "stats" / "base")
    document["experts"]["a"]["statistics"] = "stats/nowhere"
    said = refusal(tmp_path, document).splitlines()
    assert "statistics: " in said[1]
    assert "another model than the base" in said[1]
    assert "--out stats/base --fisher empirical --overwrite'" in said[1]
    assert "no such folder" in said[0]


def test_statistics_without_what_is_needed_are_refused(tmp_path: Path, weighed: None) -> None:
    document = recipe_of(tmp_path)
    document["statistics"] = measure(tmp_path / "base", tmp_path / "stats" / "base", inputs=False)
    document["experts"]["a"]["statistics"] = measure(tmp_path / "experts" / "a", tmp_path / "stats" / "a", fisher=False)
    said = refusal(tmp_path, document).splitlines()
    assert "has no Fisher information" in said[0]
    assert f"has not a sample of the inputs of 1 tensors that 'weighed' blends ({MATRIX})" in said[1]
    document["blend"]["where"] = [{"match": MATRIX, "method": "linear"}]
    plan = plan_blend(parse_recipe(document, "recipe", tmp_path))
    assert plan.statistics == {}


def test_a_folder_of_something_else_is_refused(tmp_path: Path, weighed: None) -> None:
    document = recipe_of(tmp_path, statistics="base")
    document["experts"]["a"]["statistics"] = {"data": "a.jsonl"}
    said = refusal(tmp_path, document)
    assert "holds no statistics" in said
    assert "is not there yet; 'ktmerge run' and 'ktmerge stats --recipe' make it" in said
    for text in (json.dumps({"ktmerge_statistics": 1}), "[" * 100_000):
        (tmp_path / "base" / "statistics.json").write_text(text)
        assert "not a record of statistics" in refusal(tmp_path, document)


def test_an_output_depends_on_the_statistics(tmp_path: Path, weighed: None) -> None:
    document = recipe_of(tmp_path)
    document["statistics"] = measure(tmp_path / "base", tmp_path / "stats" / "base")
    document["experts"]["a"]["statistics"] = measure(tmp_path / "experts" / "a", tmp_path / "stats" / "a")
    first = origin(plan_blend(parse_recipe(document, "recipe", tmp_path)))
    record = tmp_path / "stats" / "a" / "statistics.json"
    record.write_text(record.read_text().replace("3.0", "4.0"))
    second = origin(plan_blend(parse_recipe(document, "recipe", tmp_path)))
    assert first["statistics"].keys() == {"a", "base"}
    assert first["statistics"]["a"] != second["statistics"]["a"]
    document["blend"] = {"method": "linear"}
    assert "statistics" not in origin(plan_blend(parse_recipe(document, "recipe", tmp_path)))


def test_tensors_of_other_classes_need_nothing(tmp_path: Path, weighed: None) -> None:
    merged = Workbench(tmp_path).merged({"a": noise(1)}, {"method": "weighed"})
    assert merged[NORM].equal(noise(1)[NORM])
    assert merged[EMBED].equal(noise(1)[EMBED])


@pytest.mark.slow
def test_checking_a_recipe_with_statistics_loads_no_torch(tmp_path: Path) -> None:
    document = recipe_of(tmp_path, blend={"method": "regmean_back"})
    document["statistics"] = measure(tmp_path / "base", tmp_path / "stats" / "base")
    document["experts"]["a"]["statistics"] = measure(tmp_path / "experts" / "a", tmp_path / "stats" / "a")
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))
    script = (
        "import sys\nfrom ktmerge.cli import main\ntry:\n    main(['recipe', 'check', 'recipe.yaml'])\n"
        "except SystemExit as stop:\n    sys.exit(stop.code or ('torch' in sys.modules) * 7)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 tensors, a into base" in done.stdout


def test_scales_of_norms_are_fitted_to_what_was_measured(tmp_path: Path) -> None:
    document = recipe_of(tmp_path, blend={"method": "regmean", "vectors": True})
    write(tmp_path / "experts" / "b", noise(2))
    document["experts"]["b"] = {"model": "experts/b"}
    for name, expert in document["experts"].items():
        expert["statistics"] = measure(tmp_path / "experts" / name, tmp_path / "stats" / name, scales=name == "a")
    assert "stats/b does not have what norms scale. Make them again with 'ktmerge stats" in refusal(tmp_path, document)
    measure(tmp_path / "experts" / "b", tmp_path / "more" / "b")
    document["experts"]["b"]["statistics"] = "more/b"
    blend(parse_recipe(document, "recipe", tmp_path), tmp_path / "out", device="cpu")
    base, out = read(tmp_path / "base")[NORM].double(), read(tmp_path / "out")[NORM].double()
    deltas = [read(tmp_path / "experts" / name)[NORM].double() - base for name in "ab"]
    squares = [random(f"fisher scales {name} {NORM}", base.shape).double() for name in "ab"]
    fitted = (squares[0] * deltas[0] + squares[1] * deltas[1]) / (squares[0] + squares[1])
    torch.testing.assert_close(out, base + fitted, rtol=1e-6, atol=1e-6)
    assert (out - base - (deltas[0] + deltas[1]) / 2).abs().max() > 1e-3
