"""Whole blends into folders: endpoints, records, failures and interrupts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import llama_tensors, read, same_bytes, tuned, write

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend, engine
from ktmerge.merge.engine import execute
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.sinks import FileSink
from ktmerge.progress import SILENT

ONE = {"a": ("a", 1.0)}
TWO = {"a": ("a", 1.0), "b": ("b", 1.0)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("lambda_", "same_as"), [(0.0, "base"), (1.0, "a")])
def test_endpoints_are_the_same_file_bytes(
    llamas: Path, tmp_path: Path, recipe_in: Any, rounding: str, lambda_: float, same_as: str
) -> None:
    recipe = recipe_in(llamas, ONE, {"method": "linear", "lambda": lambda_}, output={"rounding": rounding})
    blend(recipe, tmp_path / "out", device="cpu")
    stored = (tmp_path / "out/model.safetensors").read_bytes()
    assert stored == (llamas / same_as / "model.safetensors").read_bytes()


class Told:
    """Keeps the notes that a blend tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def task(self, description: str, total: float | None, unit: str = "items") -> Any:
        return SILENT.task(description, total)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (("a", "b"), []),
        (("base", "b"), ["a adds nothing: it equals the base"]),
        (("base", "base"), ["no weight differs from the base's"]),
        (("alien", "b"), [r"the blend lies \d+% of the base's norm away from it"]),
    ],
    ids=["fine-tunes", "one is the base", "all are the base", "another base"],
)
def test_inputs_that_make_no_sense_together_are_told(
    llamas: Path, tmp_path: Path, recipe_in: Any, models: tuple[str, str], said: list[str]
) -> None:
    """On the terminal and in the record, also where nobody inspected them before."""
    write(tmp_path / "alien", llama_tensors(seed=9))
    places = [str(tmp_path / name if name == "alien" else llamas / name) for name in models]
    experts = {name: (place, 1.0) for name, place in zip("ab", places, strict=True)}
    told = Told()
    report = blend(recipe_in(llamas, experts, {"method": "ties"}), tmp_path / "out", device="cpu", progress=told)
    assert len(report.notes) == len(said)
    for note, expected in zip(report.notes, said, strict=True):
        assert re.match(expected, note)
        assert f"note: {note}" in told.notes
    assert json.loads((tmp_path / "out/ktmerge.json").read_text())["notes"] == report.notes


@pytest.mark.parametrize(("method", "searches"), [("linear", False), ("dare", False), ("ties", True)])
def test_only_kernels_that_are_needed_are_waited_for(
    llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch, method: str, searches: bool
) -> None:
    """Where a linear blend compiled its kernels before, the next one does not say that it compiles."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(engine, "is_compiled", lambda *groups: bool(asked.append(groups)) or True)
    blend(recipe_in(llamas, TWO, {"method": method}), tmp_path / "out", device="cpu")
    assert asked == [("blend", "thresholds") if searches else ("blend",)]


@pytest.mark.slow
def test_blending_back_composes(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    """Half of a half is a quarter, in fp32 (WiSE-FT is linear in its coefficient)."""
    out = {"dtype": "float32"}
    blend(recipe_in(llamas, ONE, {"method": "linear", "lambda": 0.5}, output=out), tmp_path / "half", device="cpu")
    blend(recipe_in(llamas, ONE, {"method": "linear", "lambda": 0.25}, output=out), tmp_path / "quarter", device="cpu")
    again = recipe_in(llamas, {"a": (str(tmp_path / "half"), 1.0)}, {"method": "linear", "lambda": 0.5}, output=out)
    blend(again, tmp_path / "again", device="cpu")
    first, second = read(tmp_path / "quarter"), read(tmp_path / "again")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-8)


def test_the_same_recipe_gives_the_same_folder_and_another_seed_another(
    llamas: Path, tmp_path: Path, recipe_in: Any
) -> None:
    for out, seed in [("x", 1), ("y", 1), ("z", 2)]:
        recipe = recipe_in(llamas, TWO, {"method": "dare"}, seed=seed, output={"rounding": "stochastic"})
        blend(recipe, tmp_path / out, device="cpu")
    assert files(tmp_path / "x") == files(tmp_path / "y")
    assert files(tmp_path / "x")["model.safetensors"] != files(tmp_path / "z")["model.safetensors"]


@pytest.mark.slow
def test_sharding_of_the_inputs_changes_no_tensor(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors()
    section = {"stages": {"transform": [{"trim": {"scope": "global"}}, "dare"], "combine": "elect"}}
    for shards in (1, 3):
        folder = tmp_path / str(shards)
        write(folder / "base", base, shards=shards)
        for number, name in enumerate("ab"):
            write(folder / name, tuned(base, 1e-2, number), shards=shards)
        blend(recipe_in(folder, TWO, section, output={"rounding": "stochastic"}), folder / "out", device="cpu")
    first, second = read(tmp_path / "1/out"), read(tmp_path / "3/out")
    assert first.keys() == second.keys()
    assert all(same_bytes(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_bytes_do_not_depend_on_threads_or_processes(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llamas, TWO, {"method": "dare_ties", "rescale": "l2"}, output={"rounding": "stochastic"})
    report = blend(recipe, tmp_path / "here", device="cpu")
    document = json.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"folder"}))
    script = (
        "import json, sys, torch\nfrom pathlib import Path\nfrom ktmerge.merge import blend\n"
        "from ktmerge.recipes.load import parse_recipe\ntorch.set_num_threads(2)\n"
        f"recipe = parse_recipe(json.loads(sys.argv[1]), 'x', Path({str(llamas)!r}))\n"
        f"print(blend(recipe, Path({str(tmp_path / 'there')!r}), device='cpu').out['model.safetensors'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script, document], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == report.out["model.safetensors"]


def test_the_record_says_how_it_was_made(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    experts = {"a": (str(llamas / "a"), 1.0), "b": ("b", 0.5)}
    recipe = recipe_in(llamas, experts, {"method": "ties", "density": 0.3})
    report = blend(recipe, tmp_path / "out", device="cpu")
    text = (tmp_path / "out/ktmerge.json").read_text()
    record = json.loads(text)
    assert str(llamas) not in text
    assert str(tmp_path) not in text
    assert record["recipe"]["experts"]["a"] == {"model": "a", "weight": 1.0}
    assert record["recipe"]["blend"]["density"] == 0.3
    assert record["methods"] == {"ties": 2}
    digest = hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest()
    assert record["output"]["sha256"] == {"model.safetensors": digest} == report.out
    assert {part["part"] for part in record["parts"]} == {"embed", "llm.layers", "norm"}
    other = blend(recipe_in(llamas, experts, {"method": "ties", "density": 0.31}), tmp_path / "other", device="cpu")
    assert json.loads((tmp_path / "other/ktmerge.json").read_text())["coefficients"] != record["coefficients"]
    assert other.out != report.out


def test_the_report_shows_what_rounding_lost(tmp_path: Path, recipe_in: Any) -> None:
    """One unit in the last place, blended at 0.3: to nearest nothing remains, stochastically all of it does."""
    base = {"model.layers.0.mlp.up_proj.weight": torch.full((200, 100), 1.0, dtype=torch.bfloat16)}
    expert = {name: values + 2.0**-7 for name, values in base.items()}
    write(tmp_path / "base", base)
    write(tmp_path / "a", expert)
    found = {}
    for rounding in ("nearest", "stochastic"):
        recipe = recipe_in(tmp_path, ONE, {"method": "linear", "lambda": 0.3}, output={"rounding": rounding})
        found[rounding] = blend(recipe, tmp_path / rounding, device="cpu").parts()[0]
    assert found["nearest"]["realised"] == 0
    assert found["nearest"]["changed"] == 0
    assert found["stochastic"]["realised"] == pytest.approx(1, abs=0.05)
    assert found["stochastic"]["changed"] == pytest.approx(0.3, abs=0.02)
    assert found["nearest"]["relative_norm"] == pytest.approx(0.3 * 2.0**-7, rel=1e-3)


def test_the_report_tells_the_achieved_density(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    report = blend(recipe_in(llamas, TWO, {"method": "ties", "density": 0.25}), tmp_path / "out", device="cpu")
    for part in report.parts():
        assert part["density"].keys() == {"a", "b"}
    layers = next(part for part in report.parts() if part["part"] == "llm.layers")
    assert layers["density"]["a"] == pytest.approx(0.25, abs=0.005)
    columns, rows, _ = report.table()
    assert all(len(row) == len(columns) for row in rows)


@pytest.mark.parametrize(("dtype", "tag"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_output_type_changes_floats_and_the_config(
    llamas: Path, tmp_path: Path, recipe_in: Any, dtype: str, tag: torch.dtype
) -> None:
    blend(recipe_in(llamas, ONE, {"method": "linear"}, output={"dtype": dtype}), tmp_path / "out", device="cpu")
    assert {values.dtype for values in read(tmp_path / "out").values()} == {tag}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


def test_buffers_are_the_bases_and_differences_are_noted(tmp_path: Path, recipe_in: Any) -> None:
    base = {**llama_tensors(), "model.position_ids": torch.arange(9)}
    write(tmp_path / "base", base)
    write(tmp_path / "a", {**tuned(base, 1e-2, 1), "model.position_ids": torch.arange(9) + 1})
    report = blend(recipe_in(tmp_path, ONE, {"method": "linear"}), tmp_path / "out", device="cpu")
    assert read(tmp_path / "out")["model.position_ids"].equal(torch.arange(9))
    assert any("model.position_ids" in note for note in report.notes)


@pytest.mark.parametrize("where", ["base", "a"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_and_named(
    tmp_path: Path, recipe_in: Any, where: str, value: float
) -> None:
    base = llama_tensors()
    tensors = {"base": base, "a": tuned(base, 1e-2, 1)}
    tensors[where]["model.layers.1.mlp.up_proj.weight"][3, 2:5] = value
    for name, found in tensors.items():
        write(tmp_path / name, found)
    owner = "the base" if where == "base" else "expert 'a'"
    with pytest.raises(KtmergeError, match=rf"{owner}: tensor 'model.layers.1.mlp.up_proj.weight' has 3 values"):
        blend(recipe_in(tmp_path, ONE, {"method": "ties"}), tmp_path / "out", device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_overflow_of_the_output_type_is_found_and_named(tmp_path: Path, recipe_in: Any, rounding: str) -> None:
    base = {"model.layers.0.mlp.up_proj.weight": torch.full((4, 4), 60_000.0)}
    write(tmp_path / "base", base)
    write(tmp_path / "a", {name: values + 9_000 for name, values in base.items()})
    recipe = recipe_in(tmp_path, ONE, {"method": "linear"}, output={"dtype": "float16", "rounding": rounding})
    with pytest.raises(KtmergeError, match=r"up_proj.weight': 16 blended values are beyond the range of F16"):
        blend(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


class Interrupting:
    """A progress that behaves like Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Interrupting]:
        yield self

    def advance(self, amount: float = 1) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass


@pytest.mark.parametrize("after", [0, 3, 10])
def test_an_interrupt_leaves_nothing(llamas: Path, tmp_path: Path, recipe_in: Any, after: int) -> None:
    recipe = recipe_in(llamas, TWO, {"method": "ties"})
    with pytest.raises(KeyboardInterrupt):
        blend(recipe, tmp_path / "out", device="cpu", progress=Interrupting(after))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_old_output(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    blend(recipe_in(llamas, ONE, {"method": "linear"}), tmp_path / "out", device="cpu")
    before = files(tmp_path)
    recipe = recipe_in(llamas, TWO, {"method": "ties"})
    with pytest.raises(UsageError, match="overwrite"):
        blend(recipe, tmp_path / "out", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        blend(recipe, tmp_path / "out", device="cpu", overwrite=True, progress=Interrupting(5))
    assert files(tmp_path) == before
    blend(recipe, tmp_path / "out", device="cpu", overwrite=True)
    assert files(tmp_path) != before


class Meddling(Interrupting):
    """Changes an input while it is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(4)
        self.path = path

    def advance(self, amount: float = 1) -> None:
        self.left -= 1
        if self.left == 0:
            with self.path.open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(b"\1\2\3\4")


def test_an_input_changed_under_the_run_is_noticed(tmp_path: Path, recipe_in: Any) -> None:
    base = llama_tensors()
    write(tmp_path / "base", base)
    write(tmp_path / "a", tuned(base, 1e-2, 1))
    progress = Meddling(tmp_path / "a/model.safetensors")
    with pytest.raises(KtmergeError, match="was changed while it was in use"):
        blend(recipe_in(tmp_path, ONE, {"method": "linear"}), tmp_path / "out", device="cpu", progress=progress)
    assert not (tmp_path / "out").exists()


def test_output_may_not_be_an_input(llamas: Path, recipe_in: Any) -> None:
    for out in ("base", "a", "base/sub"):
        with pytest.raises(UsageError, match="input"):
            blend(recipe_in(llamas, ONE, {"method": "linear"}), llamas / out, device="cpu", overwrite=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_first(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    for device, expected in [("cuda", "no CUDA device"), ("gpu", "unknown"), ("meta", "cpu or cuda")]:
        with pytest.raises(UsageError, match=expected):
            blend(recipe_in(llamas, ONE, {"method": "linear"}), tmp_path / "out", device=device)


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, recipe_in: Any) -> None:
    """A tensor larger than what is held is streamed: no piece handed to the sink is larger than asked for."""
    name = "model.layers.0.mlp.up_proj.weight"
    write(tmp_path / "base", {name: torch.zeros(300, 100)})
    write(tmp_path / "a", {name: torch.ones(300, 100)})
    plan = plan_blend(recipe_in(tmp_path, ONE, {"method": "ties"}))
    sizes: list[int] = []

    class Counting(FileSink):
        def __init__(self) -> None:
            pass

        def write_bytes(self, name: str, data: memoryview, start: int) -> None:
            sizes.append(len(data) // 4)

        def finished(self, name: str) -> None:
            return None

        def finish(self, name: str, report: dict[str, Any]) -> None:
            pass

    execute(plan, Counting(), "cpu", chunk=4096)
    assert sum(sizes) == 30_000
    assert max(sizes) == 4096
