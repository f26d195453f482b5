"""mergekit's YAML to recipes: what it says, what cannot be said, and the same numbers out of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_memory import MATRIX, Workbench, noise
from merge_models import llama_tensors, tuned, write

from ktmerge.api.gallery import import_recipe
from ktmerge.errors import UsageError
from ktmerge.merge.importer import import_mergekit
from ktmerge.merge.planning import plan_blend
from ktmerge.recipes.load import parse_recipe

TWO = [{"model": "org/a@v1", "parameters": {"weight": 1.0}}, {"model": "runs/b", "parameters": {"weight": 0.5}}]


def imported(**document: Any) -> tuple[dict[str, Any], list[str]]:
    return import_mergekit(yaml.safe_dump(document))


def test_ties_with_everything_said() -> None:
    recipe, differences = imported(
        merge_method="ties", base_model="org/base", models=[{"model": "org/base"}, *TWO],
        parameters={"density": 0.3, "lambda": 0.8, "normalize": True, "int8_mask": True},
        dtype="float32", out_dtype="bfloat16", tokenizer_source="base",
    )  # fmt: skip
    assert recipe["base"] == "org/base"
    assert recipe["experts"] == {"a": {"model": "org/a@v1", "weight": 1.0}, "b": {"model": "runs/b", "weight": 0.5}}
    assert recipe["blend"] == {"method": "ties", "aggregate": "wmean", "tie": "plus", "density": 0.3, "lambda": 0.8}
    assert recipe["output"] == {"dtype": "bfloat16"}
    assert any("equal magnitudes" in line for line in differences)
    parse_recipe(recipe, "imported", Path())


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("task_arithmetic", {}, {"method": "task_arithmetic", "lambda": 1.0}),
    ("task_arithmetic", {"normalize": True, "lambda": 0.5}, {"method": "linear", "lambda": 0.5}),
    (
        "ties",
        {"normalize": False},
        {"method": "ties", "aggregate": "sum", "tie": "plus", "density": 1.0, "lambda": 1.0},
    ),
    ("dare_linear", {"density": 0.4}, {"method": "dare", "rescale": "l1", "density": 0.4, "lambda": 1.0}),
    (
        "dare_ties",
        {"density": 0.4, "rescale": False, "normalize": True},
        {"method": "dare_ties", "rescale": "none", "aggregate": "wmean", "tie": "plus", "density": 0.4, "lambda": 1.0},
    ),
    ("della", {"density": 0.5, "epsilon": 0.1}, {"method": "mergekit:della", "density": 0.5, "epsilon": 0.1}),
    ("ties", {"rescale": True, "density": 0.5}, {"method": "mergekit:ties", "rescale": True, "density": 0.5}),
]


@pytest.mark.parametrize(("method", "parameters", "expected"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)])
def test_methods(method: str, parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe, _ = imported(merge_method=method, base_model="base", models=TWO, parameters=parameters)
    assert recipe["blend"] == expected


def test_densities_that_differ_run_in_mergekit() -> None:
    models = [{"model": name, "parameters": {"weight": 1, "density": d}} for name, d in [("a", 0.2), ("b", 0.4)]]
    recipe, _ = imported(merge_method="ties", base_model="base", models=models)
    assert recipe["blend"] == {"method": "mergekit:ties", "density": {"a": 0.2, "b": 0.4}}


def test_linear_counts_the_base_among_the_models() -> None:
    models = [{"model": name, "parameters": {"weight": w}} for name, w in [("base", 1), ("a", 2), ("b", 1)]]
    recipe, _ = imported(merge_method="linear", base_model="base", models=models)
    assert recipe["blend"] == {"method": "linear", "lambda": 0.75}
    without, _ = imported(merge_method="linear", models=models)
    assert without["base"] == "base"
    assert without["blend"] == recipe["blend"]


def layered(folder: Path) -> Path:
    base = llama_tensors(layers=5)
    write(folder / "base", base)
    write(folder / "a", tuned(base, 1e-2, 1))
    return folder


@pytest.mark.slow
def test_gradients_and_filters_become_rules_with_the_same_values(tmp_path: Path) -> None:
    """Held against mergekit's own resolution of the same setting for every tensor."""
    from mergekit.config import MergeConfiguration, evaluate_setting

    folder = layered(tmp_path)
    setting = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 1]},
        {"filter": "mlp", "value": [1, 0.5]},
        {"value": [0.2, 0.7]},
    ]
    document = {
        "merge_method": "slerp", "base_model": str(folder / "base"), "models": [{"model": str(folder / "a")}],
        "parameters": {"t": setting},
    }  # fmt: skip
    recipe, _ = import_mergekit(yaml.safe_dump(document))
    plan = plan_blend(parse_recipe(recipe, "imported", folder))
    theirs = MergeConfiguration.model_validate(document).parameters["t"]  # type: ignore[index]
    for tensor in plan.tensors:
        layer = int(tensor.part.partition("[")[2].rstrip("]")) if "[" in tensor.part else 0
        expected = evaluate_setting(tensor.name, theirs, layer / 4, validate=float)
        assert tensor.pipeline is not None
        assert tensor.pipeline.parameters()["t"] == pytest.approx(expected, abs=1e-12), tensor.name


def test_a_weight_that_varies_is_lambda_if_there_is_one_expert(tmp_path: Path) -> None:
    folder = layered(tmp_path)
    weight = [{"filter": "mlp", "value": 0.4}, {"value": 0.0}]
    models = [{"model": str(folder / "a"), "parameters": {"weight": weight}}]
    recipe, _ = imported(
        merge_method="task_arithmetic", base_model=str(folder / "base"), models=models, parameters={"lambda": 0.5}
    )
    assert recipe["blend"] == {"method": "task_arithmetic", "lambda": 0.0, "where": [{"match": "*mlp*", "lambda": 0.2}]}
    plan_blend(parse_recipe(recipe, "imported", folder))
    with pytest.raises(UsageError, match="weight varies over layers or tensors"):
        imported(merge_method="task_arithmetic", base_model="base", models=[*models, *TWO])


def test_gradients_need_the_base(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gradients need the number of layers"):
        imported(merge_method="ties", base_model="org/far", models=TWO, parameters={"density": [0.1, 0.9]})


def sliced(folder: Path, *ranges: list[int]) -> dict[str, Any]:
    """The file that most guides to mergekit's slerp begin with."""
    sources = [
        {"model": str(folder / name), "layer_range": one} for name, one in zip(("base", "a"), ranges, strict=True)
    ]
    return {
        "slices": [{"sources": sources}], "merge_method": "slerp", "base_model": str(folder / "base"),
        "parameters": {"t": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]},
    }  # fmt: skip


def test_a_slice_of_all_layers_is_a_list_of_models(tmp_path: Path) -> None:
    folder = layered(tmp_path)
    document = sliced(folder, [0, 5], [0, 5])
    models = [{"model": str(folder / name)} for name in ("base", "a")]
    assert imported(**document) == imported(**{k: v for k, v in document.items() if k != "slices"}, models=models)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        (([0, 5], [0, 4]), "but for one that takes all layers"),
        (([1, 5], [1, 5]), "but for one that takes all layers"),
        (([0, 4], [0, 4]), "takes 4 layers, and .*base has 5"),
    ],
)
def test_other_slices_are_refused(tmp_path: Path, ranges: tuple[list[int], list[int]], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        imported(**sliced(layered(tmp_path), *ranges))


def test_layers_of_a_base_that_is_not_here_are_taken_on_trust() -> None:
    _, differences = imported(**sliced(Path("org"), [0, 5], [0, 5]))
    assert any("its slice of 5 layers is taken for all" in line for line in differences)


def test_paths_of_the_working_folder_are_written_as_the_recipe_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    models = [{"model": "models/base"}, {"model": "org/a"}]
    Path("mine.yaml").write_text(
        yaml.safe_dump(
            {"merge_method": "ties", "base_model": "models/base", "models": models, "parameters": {"weight": 1}}
        )
    )
    import_recipe(Path("mine.yaml"), Path("recipes/mine.yaml"))
    written = yaml.safe_load(Path("recipes/mine.yaml").read_text())
    assert (written["base"], written["experts"]["a"]["model"]) == ("../models/base", "org/a")


def test_the_file_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("merge_method: passthrough\nslices: []\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: mergekit file: 'slices'"):
        import_recipe(tmp_path / "mine.yaml", None)


def test_an_adapter_stays_an_adapter() -> None:
    models = [{"model": "org/x+runs/lora", "parameters": {"weight": 1, "density": 0.5}}]
    recipe, _ = imported(merge_method="ties", base_model="org/x", models=models)
    assert [(name, one["model"]) for name, one in recipe["experts"].items()] == [("lora", "org/x+runs/lora")]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"slices": []}, "'slices' cannot be said in a recipe"),
    ({"models": None, "slices": [{"sources": []}]}, "'slices' cannot be said in a recipe"),
    ({"modules": {}}, "'modules' cannot be said in a recipe"),
    ({"tokenizer": {}}, "'tokenizer' cannot be said"),
    ({"tokenizer_source": "union"}, "'tokenizer_source' cannot be said"),
    ({"chat_template": "auto"}, "'chat_template' cannot be said"),
    ({"paramters": {}}, "unknown key 'paramters'. Did you mean 'parameters'?"),
    ({"models": []}, "has no models"),
    ({"models": [{"modle": "x"}]}, r"models\[0\] names no model"),
    ({"models": [{"model": "x", "params": {}}]}, "unknown key 'params'"),
    ({"models": [{"model": {"model": "x", "lora": "y"}}]}, "an adapter as 'model\\+adapter'"),
    ({"models": [{"model": "base"}]}, "no model besides the base"),
    ({"models": [{"model": "x"}]}, "ties needs weight for x"),
    ({"base_model": None}, "ties without base_model"),
    ({"dtype": "float64"}, "dtype float64 cannot be written"),
    ({"parameters": {"density": {"vaule": 1}}}, "a case has a value"),
    ({"parameters": {"normalize": [True, False]}}, "normalize varies"),
    ({"parameters": {"lambda": []}}, "can't read"),
    ({"merge_method": 3}, "has no merge_method"),
    (
        {"models": [{"model": "x", "parameters": {"weight": -1}}, {"model": "y", "parameters": {"weight": 1}}]},
        "negative weights turn votes around",
    ),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_cannot_be_said_is_refused_with_the_reason(change: dict[str, Any], expected: str) -> None:
    document = {"merge_method": "ties", "base_model": "base", "models": TWO, **change}
    with pytest.raises(UsageError, match=expected):
        imported(**document)


@pytest.mark.parametrize("text", ["", "- 1", "merge_method: [", "a: 1\n---\nb: 2"])
def test_files_of_another_kind(text: str) -> None:
    with pytest.raises(UsageError, match="mergekit file"):
        import_mergekit(text)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4, "normalize": True, "lambda": 0.8}),
        ("ties", {"density": 0.4, "normalize": False, "lambda": 0.8}),
        ("task_arithmetic", {"normalize": True}),
        ("linear", {}),
        ("sce", {"select_topk": 0.6}),
    ],
)
def test_imported_recipes_give_mergekits_numbers(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    from mergekit.merge_methods.api import merge_tensors

    base = noise(0, 1.0)
    experts = {name: {key: base[key] + 0.1 * v for key, v in noise(n + 1, 1.0).items()} for n, name in enumerate("ab")}
    weights = {"a": 0.8, "b": 0.4}
    models = [{"model": f"experts/{name}", "parameters": {"weight": w}} for name, w in weights.items()]
    recipe, _ = imported(merge_method=method, base_model="base", models=models, parameters=parameters)
    stored = Workbench(tmp_path).blend(
        base, experts, recipe["blend"], weights={k: v["weight"] for k, v in recipe["experts"].items()}
    )
    with_base = method != "linear"
    given = {**parameters, **({} if method == "sce" else {"weight": weights})}
    for key in (MATRIX,):
        tensors = [*([base[key]] if with_base else []), *(experts[name][key] for name in weights)]
        ids = [*(["base"] if with_base else []), *weights]
        expected = merge_tensors(tensors, method, parameters=given, ids=ids, base_index=0 if with_base else None)
        torch.testing.assert_close(stored[key], expected, rtol=1e-6, atol=1e-6)
