"""Plans: what a recipe means for every tensor, and every mistake found before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import llama_tensors, read, same_bytes, tuned, write

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend
from ktmerge.merge.needs import needs_of
from ktmerge.merge.plan import Plan
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.sections import check_recipe
from ktmerge.merge.settings import blend_setting
from ktmerge.recipes import gallery, load_recipe
from ktmerge.recipes.load import parse_recipe

ONE = {"a": ("a", 1.0)}
TWO = {"a": ("a", 1.0), "b": ("b", 1.0)}


def by_name(plan: Plan) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in plan.tensors}


def test_first_matching_rule_decides(llamas: Path, recipe_in: Any) -> None:
    rules = [
        {"match": "*layers.0.mlp*", "keep": "b"},
        {"part": "llm.layers[0]", "class": "matrix", "lambda": 0.25, "density": 0.5},
        {"class": "vector", "method": "linear"},
        {"part": "embed", "keep": "base"},
    ]
    plan = by_name(
        plan_blend(recipe_in(llamas, TWO, {"method": "ties", "density": 0.1, "lambda": 0.5, "where": rules}))
    )
    kept = plan["model.layers.0.mlp.up_proj.weight"]
    assert (kept.action, kept.expert, kept.rule) == ("expert", "b", 0)
    slower = plan["model.layers.0.self_attn.q_proj.weight"]
    assert (slower.lambda_, slower.pipeline.parameters()["density"], slower.rule) == (0.25, 0.5, 1)
    norm = plan["model.layers.0.input_layernorm.weight"]
    assert (norm.method, norm.lambda_, norm.rule) == ("linear", 0.5, 2)
    assert plan["model.embed_tokens.weight"].method == "keep base"
    other = plan["model.layers.1.mlp.up_proj.weight"]
    assert (other.method, other.lambda_, other.pipeline.parameters()["density"], other.rule) == ("ties", 0.5, 0.1, None)


def test_kept_tensors_are_copied_bit_for_bit(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    rules = [{"part": "llm.layers[1]", "keep": "b"}, {"part": "embed, norm", "keep": "base"}]
    recipe = recipe_in(llamas, TWO, {"method": "linear", "where": rules}, output={"rounding": "stochastic"})
    blend(recipe, tmp_path / "out", device="cpu")
    stored, base, b = read(tmp_path / "out"), read(llamas / "base"), read(llamas / "b")
    for name, values in stored.items():
        if "layers.1." in name:
            assert same_bytes(values, b[name])
        elif "embed" in name or name == "model.norm.weight":
            assert same_bytes(values, base[name])
        else:
            assert not same_bytes(values, base[name])


def test_kept_tensors_are_rounded_once_where_types_differ(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors(torch.float32)
    write(tmp_path / "base", base)
    write(tmp_path / "a", tuned(base, 1e-2, 1))
    rules = [{"part": "embed", "keep": "a"}, {"part": "norm", "keep": "base"}]
    recipe = recipe_in(tmp_path, ONE, {"method": "linear", "where": rules}, output={"dtype": "bfloat16"})
    blend(recipe, tmp_path / "out", device="cpu")
    stored, a = read(tmp_path / "out"), read(tmp_path / "a")
    assert stored["model.embed_tokens.weight"].equal(a["model.embed_tokens.weight"].bfloat16())
    assert stored["model.norm.weight"].equal(base["model.norm.weight"].bfloat16())


def test_dare_leaves_norms_and_embeddings_whole(llamas: Path, recipe_in: Any) -> None:
    plan = by_name(plan_blend(recipe_in(llamas, TWO, {"method": "dare", "density": 0.3})))
    assert len(plan["model.layers.0.mlp.up_proj.weight"].pipeline.transforms) == 1
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert plan[name].pipeline.transforms == ()
    spelled = {"stages": {"transform": {"dare": {"density": 0.3}}, "combine": "sum"}}
    assert all(
        len(t.pipeline.transforms) == 1 for t in plan_blend(recipe_in(llamas, TWO, spelled)).tensors if t.pipeline
    )


def test_stages_spelled_out_equal_the_method(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    spelled = {
        "stages": {"transform": [{"trim": {"density": 0.3}}], "combine": {"elect": {"tie": "plus"}}},
        "lambda": 0.9,
    }
    named = {"method": "ties", "density": 0.3, "tie": "plus", "lambda": 0.9}
    for number, section in enumerate((spelled, named)):
        blend(recipe_in(llamas, TWO, section), tmp_path / str(number), device="cpu")
    first, second = read(tmp_path / "0"), read(tmp_path / "1")
    assert all(same_bytes(first[name], second[name]) for name in first)


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": "tiess"}, ["blend.method: there is no method 'tiess'. Did you mean 'ties'?"]),
    ({"method": "svc"}, ["blend.method: 'svc' is no method but a calibrate stage; write it under stages."]),
    ({"method": "ties", "densty": 0.2}, ["blend: method 'ties' has no parameter 'densty'. Did you mean 'density'?"]),
    ({"method": "ties", "density": 1.2}, ["blend.density: must be a number of at least 0 and at most 1, not 1.2."]),
    ({"method": "ties", "density": "0.2"}, ["blend.density: must be a number of at least 0 and at most 1, not '0.2'."]),
    ({"method": "ties", "scope": "globl"}, ["blend.scope: must be one of tensor, row, global, not 'globl'."]),
    (
        {"method": "ties", "density": -1, "elect": 3},
        ["blend.density: must be", "blend.elect: must be one of weighted, mass, count, not 3."],
    ),
    ({"method": "trim"}, ["blend: method 'trim' takes 1 expert, not 2."]),
    ({"stages": {"transfrm": ["trim"]}}, ["blend.stages: unknown key 'transfrm'. Did you mean 'transform'?"]),
    (
        {"stages": {"transform": ["trm"]}},
        ["blend.stages.transform: there is no transform stage 'trm'. Did you mean 'trim'?"],
    ),
    ({"stages": {"transform": ["elect"]}}, ["'elect' is a combine stage; write it under combine, not transform."]),
    (
        {"stages": {"transform": [{"trim": {"dens": 1}}]}},
        ["stage 'trim' has no parameter 'dens'. Did you mean 'density'?"],
    ),
    ({"stages": {"combine": ["sum", "mean"]}}, ["exactly one stage combines"]),
    ({"stages": {"transform": ["trim", "dare"]}, "density": 0.1}, ["blend.density: could be meant for trim or dare"]),
    ({"method": "linear", "where": [{"part": "visoin", "keep": "base"}]}, ["blend.where[0]", "Did you mean 'vision'?"]),
    (
        {"method": "linear", "where": [{"part": "vision", "keep": "base"}]},
        ["matches no tensor of this model", "llm.layers"],
    ),
    (
        {"method": "linear", "where": [{"match": "*nowhere*", "lambda": 0}]},
        ["blend.where[0]: matches no tensor that an earlier rule has not taken (match: *nowhere*)."],
    ),
    (
        {"method": "linear", "where": [{"part": "llm", "lambda": 0}, {"part": "norm", "lambda": 1}]},
        ["blend.where[1]: matches no tensor"],
    ),
    (
        {"method": "dare", "where": [{"class": "vector", "density": 0.1}]},
        ["blend.where[0].density: does nothing here: 'dare' does not use it for tensors of class vector."],
    ),
    (
        {"method": "linear", "where": [{"part": "norm", "method": "trim"}]},
        ["blend.where[0]: method 'trim' takes 1 expert, not 2."],
    ),
    (
        {"method": "ties", "where": [{"part": "norm", "method": "linear", "density": 0.1}]},
        ["blend.where[0]: method 'linear' has no parameter 'density'."],
    ),
    (
        {"method": "tie", "where": [{"match": "*zzz*", "lambda": 0}]},
        ["there is no method 'tie'"],
    ),
]


@pytest.mark.parametrize(("section", "expected"), MISTAKES, ids=[str(number) for number in range(len(MISTAKES))])
def test_mistakes_in_the_blend_section(
    llamas: Path, recipe_in: Any, section: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        plan_blend(recipe_in(llamas, TWO, section))
    for text in expected:
        assert text in str(error.value)


def test_all_mistakes_are_reported_together(llamas: Path, recipe_in: Any) -> None:
    rules = [{"part": "llm", "densty": 1}, {"part": "connektor", "keep": "base"}, {"match": "*none*", "lambda": 2}]
    experts = {"a": ("a", 1.0), "b": ("nope", 1.0)}
    with pytest.raises(UsageError) as error:
        plan_blend(recipe_in(llamas, experts, {"method": "ties", "where": rules}))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "experts.b.model" in str(error.value)
    assert "densty" in str(error.value)
    assert "connektor" in str(error.value)


@pytest.mark.parametrize(
    ("blend_section", "weights", "expected"),
    [
        ({"method": "linear"}, (1.0, -1.0), "sum of the expert weights, which is 0"),
        ({"method": "ties"}, (1.0, -1.0), "0 or more, one of them positive"),
        ({"method": "ties", "aggregate": "mean"}, (1.0, 0.5), "would ignore the unequal expert weights"),
        ({"method": "ties", "aggregate": "max"}, (1.0, 0.5), "would ignore the unequal expert weights"),
    ],
)
def test_weights_that_a_method_cannot_take(
    llamas: Path, recipe_in: Any, blend_section: dict[str, Any], weights: tuple[float, float], expected: str
) -> None:
    experts = {"a": ("a", weights[0]), "b": ("b", weights[1])}
    with pytest.raises(UsageError, match=expected):
        plan_blend(recipe_in(llamas, experts, blend_section))


def test_base_and_experts_must_be_named(recipe_in: Any, llamas: Path) -> None:
    with pytest.raises(UsageError, match=r"experts: the recipe names none"):
        plan_blend(recipe_in(llamas, {}, {"method": "linear"}))
    recipe = recipe_in(llamas, ONE, {"method": "linear"})
    with pytest.raises(UsageError, match="base: the recipe names none"):
        plan_blend(recipe.model_copy(update={"base": None}))
    with pytest.raises(UsageError, match="no blend section"):
        plan_blend(recipe.model_copy(update={"blend": None}))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors()
    write(tmp_path / "base", base)
    less = {name: values for name, values in base.items() if name != "model.norm.weight"}
    write(tmp_path / "less", less)
    write(tmp_path / "more", {**base, "model.extra.weight": torch.ones(3)})
    write(tmp_path / "wrong", {**base, "model.norm.weight": torch.ones(3)})
    for name, expected in [
        ("less", "model.norm.weight"),
        ("more", "model.extra.weight"),
        ("wrong", "model.norm.weight"),
    ]:
        with pytest.raises(UsageError, match=expected):
            plan_blend(recipe_in(tmp_path, {"a": (name, 1.0)}, {"method": "linear"}))


def test_what_a_fine_tune_was_saved_without_may_be_kept(tmp_path: Path, recipe_in: Any) -> None:
    """Libraries drop what they do not run, such as the layers that guess tokens ahead, when they save."""
    less = llama_tensors()
    base = {**less, "mtp.fc.weight": torch.full((4, 4), 0.5, dtype=torch.bfloat16)}
    write(tmp_path / "base", base)
    write(tmp_path / "a", tuned(less, 3e-3, seed=1))
    write(tmp_path / "b", tuned(base, 3e-3, seed=2))
    two = {"a": ("a", 1.0), "b": ("b", 1.0)}
    with pytest.raises(
        UsageError, match=r"^experts\.a: lacks 1 .*: mtp\.fc\.weight\. .*by a where rule \(keep: base\)"
    ):
        plan_blend(recipe_in(tmp_path, two, {"method": "linear"}))
    with pytest.raises(UsageError, match=r"^experts.a: lacks 1"):
        plan_blend(recipe_in(tmp_path, two, {"method": "linear", "where": [{"match": "mtp.*", "keep": "a"}]}))
    for keep in ("base", "b"):
        rules = [{"match": "mtp.*", "keep": keep}]
        blend(recipe_in(tmp_path, two, {"method": "linear", "where": rules}), tmp_path / f"{keep} kept", device="cpu")
        kept, stored = read(tmp_path / keep), read(tmp_path / f"{keep} kept")
        assert stored.keys() == base.keys()
        assert same_bytes(stored["mtp.fc.weight"], kept["mtp.fc.weight"])


def test_weights_beside_a_model_that_are_not_its_own_are_named(tmp_path: Path, recipe_in: Any) -> None:
    for name in ("base", "a"):
        write(tmp_path / name, llama_tensors())
    write(tmp_path / "base" / "other", llama_tensors())
    (tmp_path / "base" / "consolidated.safetensors").write_bytes(b"whatever")
    plan = plan_blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, {"method": "linear"}))
    assert [note for note in plan.notes if "neither read nor carried" in note] == [
        "base: consolidated.safetensors and 1 more: no part of its weights; neither read nor carried."
    ]


def test_quantised_tensors_are_refused_unless_kept(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors()
    packed = {**base, "model.layers.0.mlp.up_proj.weight": torch.zeros(32, 16, dtype=torch.int8)}
    config = {"quantization_config": {"quant_method": "x"}}
    for name in ("base", "a"):
        write(tmp_path / name, packed, config)
    with pytest.raises(UsageError, match=r"quantised by x \(model.layers.0.mlp.up_proj.weight"):
        plan_blend(recipe_in(tmp_path, ONE, {"method": "linear"}))
    rules = [{"match": "*layers.0.mlp.up_proj*", "keep": "base"}]
    blend(recipe_in(tmp_path, ONE, {"method": "linear", "where": rules}), tmp_path / "out", device="cpu")
    assert read(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


TIED = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 48}


def test_a_tied_head_gets_what_its_embedding_gets(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors()
    stored_head = {**base, "lm_head.weight": base["model.embed_tokens.weight"].clone()}
    write(tmp_path / "base", stored_head, TIED)
    a, b = tuned(base, 1e-2, 1), tuned(base, 1e-2, 2)
    write(tmp_path / "a", {**a, "lm_head.weight": a["model.embed_tokens.weight"].clone()}, TIED)
    write(tmp_path / "b", b, TIED)
    section = {"stages": {"transform": ["trim", {"dare": {"density": 0.5}}], "combine": "sum"}}
    recipe = recipe_in(tmp_path, TWO, section, output={"rounding": "stochastic"})
    plan = plan_blend(recipe)
    assert any("lm_head.weight" in note for note in plan.notes)
    blend(recipe, tmp_path / "out", device="cpu")
    stored = read(tmp_path / "out")
    assert same_bytes(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert not same_bytes(stored["lm_head.weight"], base["model.embed_tokens.weight"])


def test_a_superfluous_head_must_equal_the_embedding(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors()
    write(tmp_path / "base", base, TIED)
    a = tuned(base, 1e-2, 1)
    write(tmp_path / "a", {**a, "lm_head.weight": a["model.embed_tokens.weight"].clone()}, TIED)
    write(tmp_path / "b", {**a, "lm_head.weight": base["model.embed_tokens.weight"].clone()}, TIED)
    blend(recipe_in(tmp_path, ONE, {"method": "linear"}), tmp_path / "out", device="cpu")
    assert "lm_head.weight" not in read(tmp_path / "out")
    with pytest.raises(UsageError, match="differs from its"):
        blend(recipe_in(tmp_path, {"b": ("b", 1.0)}, {"method": "linear"}), tmp_path / "out2", device="cpu")
    assert not (tmp_path / "out2").exists()


def test_what_only_claims_to_be_tied_stays_two(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors()
    base["lm_head.weight"] = base["model.embed_tokens.weight"] + 1
    write(tmp_path / "base", base, TIED)
    write(tmp_path / "a", tuned(base, 1e-2, 1), TIED)
    recipe = recipe_in(tmp_path, ONE, {"method": "linear", "lambda": 1})
    assert any("they stay two" in note for note in plan_blend(recipe).notes)
    blend(recipe, tmp_path / "out", device="cpu")
    stored, wanted = read(tmp_path / "out"), read(tmp_path / "a")
    assert all(same_bytes(stored[name], wanted[name]) for name in wanted)


def test_a_tie_that_only_the_first_rows_hold_is_refused(tmp_path: Path, recipe_in: Any) -> None:
    base = {**llama_tensors(), "model.embed_tokens.weight": torch.zeros(8192, 16)}
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    base["lm_head.weight"][-1] = 1
    config = {**TIED, "vocab_size": 8192}
    write(tmp_path / "base", base, config)
    write(tmp_path / "a", tuned(base, 1e-2, 1), config)
    with pytest.raises(KtmergeError, match=r"the base: 'lm_head.weight' differs"):
        blend(recipe_in(tmp_path, ONE, {"method": "linear"}), tmp_path / "out", device="cpu")


def test_the_plan_shows_itself(llavas: Path, recipe_in: Any) -> None:
    rules = [{"part": "vision", "keep": "base"}]
    plan = plan_blend(recipe_in(llavas, TWO, {"method": "ties", "where": rules}))
    columns, rows, title = plan.table()
    assert all(len(row) == len(columns) for row in rows)
    assert sum(int(row[columns.index("tensors")]) for row in rows) == len(plan.tensors)
    assert f"{len(plan.tensors)} tensors" in title
    shown = {cell for row in rows for cell in row}
    assert "keep base" in shown
    assert any("density=0.2" in cell for cell in shown)
    assert json.loads(json.dumps(plan.to_json()))["experts"] == {"a": 1.0, "b": 1.0}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", gallery.names())
def test_gallery_recipes_are_right(name: str, llavas: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert recipe.base is None
    check_recipe(recipe)
    assert recipe.blend is not None
    setting = blend_setting(recipe.blend)
    least, most = setting.method.experts
    count = 1 if name == "mergekit-slerp" else max(least, min(2, most or 2))
    ready = load_recipe(name, base=str(llavas / "base"), experts=[f"{x}={llavas / x}" for x in "abc"[:count]])
    if any(needs_of(pipeline) for pipeline in setting.pipelines.values()):
        with pytest.raises(UsageError, match="ktmerge stats"):
            plan_blend(ready)
    else:
        plan_blend(ready)


def test_check_without_checkpoints_finds_the_same_words(recipe_in: Any, tmp_path: Path) -> None:
    section = {"method": "ties", "densty": 1}
    with pytest.raises(UsageError, match="densty"):
        check_recipe(recipe_in(tmp_path, {}, section))
    rules = {"method": "ties", "where": [{"part": "visoin", "keep": "base"}]}
    with pytest.raises(UsageError, match="Did you mean 'vision'"):
        check_recipe(recipe_in(tmp_path, {}, rules))


def test_an_expert_that_the_recipe_makes_is_said_to_be_missing_so(llamas: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llamas, {"new": ("new", 1.0)}, {"method": "linear"})
    document = recipe.model_dump(mode="json", by_alias=True) | {"finetune": {"experts": {"new": {"data": "d.jsonl"}}}}
    with pytest.raises(UsageError, match="run 'ktmerge finetune --recipe' or 'ktmerge run' first"):
        plan_blend(parse_recipe(document, "r.yaml", recipe.folder))
