"""Whole sweeps of a tiny model, by the command: found, killed and resumed, shared, rebuilt bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from ktmerge.errors import UsageError

ARGUMENTS = ["--range", "blend.lambda=0:1.2", "--keep-upstream", "0.6", "--finalists", "2", "--share", "0.6"]


def sweep(world, out: Path, *more: str, **how):  # type: ignore[no-untyped-def]
    """Run the command; what it printed."""
    command = [sys.executable, "-m", "ktmerge", "sweep", str(world.recipe), *ARGUMENTS, "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=world.folder, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def settings_of(world, folder: Path):  # type: ignore[no-untyped-def]
    """A small sweep with its journal in a folder."""
    from ktmerge.recipes.load import load_recipe, load_suite
    from ktmerge.sweep import Range, SweepSettings

    suite = load_suite(world.suite)
    return SweepSettings(
        load_recipe(world.recipe), (Range.parse("lambda=0:1.2"),), (), suite, suite, ("selection", "report"),
        str(folder / "journal.log"), trials=4, finalists=2, keep=0.5, bootstrap=100,
    )  # fmt: skip


def trials_of(storage: str) -> list:  # type: ignore[type-arg]
    """All trials of the sweep's study, those that do not count included."""
    import optuna

    from ktmerge.sweep.storage import open_storage, study_names

    opened = open_storage(storage)
    (name,) = [one for one in study_names(opened) if not one.endswith("-tasks")]
    return optuna.load_study(study_name=name, storage=opened).get_trials()


def counted(trials: list) -> list:  # type: ignore[type-arg]
    return [one for one in trials if "void" not in one.user_attrs]


@pytest.mark.slow
def test_a_sweep_in_this_process_chooses_by_its_rule_and_every_trial_is_rebuilt(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    from ktmerge import Pristine, api
    from ktmerge.checkpoints.checkpoint import Checkpoint

    out = tmp_path / "found"
    methods, ranges = ["ties", "linear"], ["blend.lambda=0:1.2", "blend.density=0.2:1"]
    outcome = api.sweep(
        world.recipe, out, ranges=ranges, methods=methods, trials=6, sampler="grid", keep_upstream=0.6, finalists=2
    )
    keeping = [one for one in outcome.finals if one.retention >= 60]
    assert outcome.chosen is not None
    assert max(one.gain for one in keeping) == next(
        one.gain for one in keeping if one.candidate.number == outcome.chosen.number
    )
    document = json.loads((out / "result.json").read_text())
    assert document["chosen"] == outcome.chosen.number
    assert "max downstream subject to upstream >= 60 % of base" in " ".join(document["statement"])
    assert (out / "front.png").stat().st_size > 5000
    assert len((out / "candidates.csv").read_text().splitlines()) == 7
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    sources = Pristine()
    digests = {one.candidate.number: one.digest for one in outcome.finals}
    for one in outcome.candidates:
        recipe = api.trial_recipe(out, one.number)
        api.blend_into(model, recipe, sources)
        live = model.state_dict()
        blended = tmp_path / f"trial-{one.number}"
        api.blend(recipe, blended)
        with Checkpoint.open(blended).reader() as reader:
            for name, info in Checkpoint.open(blended).tensors.items():
                on_disk = reader.read(name).float().view(info.shape)
                assert torch.equal(on_disk, live[name]), (one.number, name)
        if one.number in digests:
            assert digests[one.number] == Checkpoint.open(blended).content_digest()
            assert api.compare_with_trial(out, one.number, blended)
    chosen = tmp_path / "chosen"
    api.blend(out / "chosen.yaml", chosen)
    assert Checkpoint.open(chosen).content_digest() == digests[outcome.chosen.number]
    with pytest.raises(UsageError, match="add --resume"):
        api.sweep(
            world.recipe, out, ranges=ranges, methods=methods, trials=6, sampler="grid", keep_upstream=0.6, finalists=2
        )
    with pytest.raises(UsageError, match="another sweep"):
        api.sweep(world.recipe, out, ranges=ranges, methods=methods, trials=6, keep_upstream=0.5, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "screen", "low", "keep"),
    [("tpe", "subset", 0, 0.1), ("gp", "full", 0.1, 1.5), ("qmc", "divergence", 0, 0.1), ("nsga2", "subset", 0, 0.1)],
)
def test_every_sampler_and_screen_comes_to_an_end(world, tmp_path: Path, sampler, screen, low, keep) -> None:  # type: ignore[no-untyped-def]
    from ktmerge import api

    outcome = api.sweep(
        world.recipe, tmp_path / "o", ranges=[f"blend.lambda={low}:1.2"], trials=4, sampler=sampler, screen=screen,
        keep_upstream=keep, finalists=2,
    )  # fmt: skip
    assert len(outcome.candidates) == 4
    assert len({one.first for one in outcome.candidates}) > 1
    if screen == "full":  # nobody keeps 150 % of what the base gets right everywhere
        assert outcome.chosen is None
        assert "No recipe found" in outcome.statement()[0]
        assert not (tmp_path / "o" / "chosen.yaml").exists()


@pytest.mark.slow
def test_a_trial_is_held_to_what_was_loaded_where_some_of_it_was_not(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """As transformers leaves out `mtp.*`."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from ktmerge import api
    from ktmerge.errors import KtmergeError

    for name, folder in (("base", world.base), ("expert", world.expert)):
        shutil.copytree(folder, tmp_path / name)
        save_file({"mtp.fc.weight": np.full((4, 4), len(name), np.float32)}, tmp_path / name / "mtp.safetensors")
        weights = load_names(tmp_path / name)
        index = {"metadata": {}, "weight_map": weights}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
    models = {"base": str(tmp_path / "base"), "experts": [f"e={tmp_path / 'expert'}"]}
    recipe = api.load_recipe(world.recipe, **models)
    out = tmp_path / "found"
    outcome = api.sweep(recipe, out, ranges=["lambda=0.4:1"], trials=2, sampler="grid", finalists=1, keep_upstream=0.3)
    assert outcome.finals[0].left_out == ["mtp.fc.weight"]
    number = outcome.finals[0].candidate.number
    api.blend(api.trial_recipe(out, number), tmp_path / "blended")
    assert load_file(tmp_path / "blended" / "mtp.safetensors")["mtp.fc.weight"].shape == (4, 4)
    (note,) = api.compare_with_trial(out, number, tmp_path / "blended")
    assert note == f"every tensor but 'mtp.fc.weight', not loaded then, has the bits that were scored as trial {number}"
    api.blend(api.load_recipe(world.recipe, overrides=["blend.lambda=0.123"], **models), tmp_path / "other")
    with pytest.raises(KtmergeError, match="differs from the model that was scored"):
        api.compare_with_trial(out, number, tmp_path / "other")


def load_names(folder: Path) -> dict[str, str]:
    """The files of a folder's tensors, by name."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as opened:
            found |= dict.fromkeys(opened.keys(), path.name)
    return found


def test_what_is_missing_or_too_much_is_said(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from ktmerge import api

    suite = yaml.safe_load(world.suite.read_text())
    del suite["selection"]
    (world.folder / "whole.yaml").write_text(yaml.safe_dump(suite))
    knob = ["blend.lambda=0:1"]
    with pytest.raises(UsageError, match="keeps no rows for choosing"):
        api.sweep(world.recipe, tmp_path / "o", ranges=knob, suite=world.folder / "whole.yaml")
    with pytest.raises(UsageError, match="Did you mean 'nsga2'"):
        api.sweep(world.recipe, tmp_path / "o", ranges=knob, sampler="nsga3")
    with pytest.raises(UsageError, match="trials"):
        api.sweep(world.recipe, tmp_path / "o", ranges=knob, trials=0)
    with pytest.raises(UsageError, match="workers: must be 1 or more"):
        api.sweep(world.recipe, tmp_path / "o", ranges=knob, workers=0)
    for wrong, said in (
        ({"seed": -1}, "--seed: must be 0 or more"),
        ({"grace": 0}, "--grace: must be seconds"),
        ({"slurm": True, "ray": True}, "leave one out"),
        ({"held_out": world.suite, "suite": world.folder / "whole.yaml"}, "among those that choose the recipe"),
        ({"sampler": "grid", "trials": 1}, "the coarsest grid of these ranges has 2 recipes"),
        ({"sampler": "curve", "methods": ["ties", "linear"]}, "follows a single number"),
    ):
        with pytest.raises(UsageError, match=said):
            api.sweep(world.recipe, tmp_path / "o", **{"ranges": knob, **wrong})
    assert not (tmp_path / "o").exists()
    with pytest.raises(UsageError, match="no sweep"):
        api.trial_recipe(tmp_path, 0)
    with pytest.raises(UsageError, match="both --trial and --study"):
        api.trial_to_blend(tmp_path, None)
    with pytest.raises(UsageError, match="--set"):
        api.trial_to_blend(tmp_path, 1, besides={"--base": None, "--set": ["a=1"]})


@pytest.mark.parametrize(("kind", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_nothing_is_written_where_jobs_cannot_be_submitted(  # type: ignore[no-untyped-def]
    world, tmp_path: Path, kind: str, package: str, monkeypatch
) -> None:
    from ktmerge import api

    found = tmp_path / "found"
    found.mkdir()
    definition = {"ktmerge_sweep": 1, "study": "s", "storage": None, "recipes from": "."}
    (found / "sweep.json").write_text(json.dumps(definition))
    monkeypatch.setenv("PATH", "")  # no srun
    for out, said in ((tmp_path / "none", None), (found, None), (tmp_path / "none", f"--{kind} needs {package}")):
        if said:
            monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=said or f"--{kind}"):
            api.sweep(world.recipe, out, ranges=["blend.lambda=0:1"], overwrite=True, **{kind: True})
    assert [path.name for path in found.iterdir()] == ["sweep.json"]
    assert json.loads((found / "sweep.json").read_text()) == definition
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "found"
    command = [sys.executable, "-m", "ktmerge", "sweep", str(world.recipe), *ARGUMENTS, "--out", str(out)]
    journal = out / "journal.log"
    running = subprocess.Popen([*command, "--trials", "30"], cwd=world.folder, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (journal.exists() and journal.read_text().count('"round 0"') >= 3):
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = counted(trials_of(str(journal)))
    assert 2 <= len(before) < 30
    said = sweep(world, out, "--trials", "8", "--resume")
    after = counted(trials_of(str(journal)))
    assert len(after) == max(8, len(before))
    finished = {one.number: one.values for one in before if one.values}
    assert {one.number: one.values for one in after if one.number in finished} == finished
    assert len({one.params["blend.lambda"] for one in after}) == len(after)
    assert "chosen" in said
    blended = tmp_path / "blended"
    number = json.loads((out / "result.json").read_text())["chosen"]
    done = subprocess.run(
        [sys.executable, "-m", "ktmerge", "blend", "--trial", str(number), "--study", str(out),
         "--out", str(blended), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"every tensor has the bits that were scored as trial {number}" in done.stdout


def is_free(storage: str) -> bool:
    """Whether a worker that was stopped keeps nobody from the database."""
    if not storage.startswith("sqlite"):
        return True
    with closing(sqlite3.connect(storage.removeprefix("sqlite:///"), timeout=0)) as database:
        try:
            database.execute("begin exclusive")
        except sqlite3.OperationalError:
            return False
        return True


PASSWORD = b"geheim"
"""Of the database, which asks for none."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_workers_share_a_sweep_and_one_that_is_killed_is_replaced(world, tmp_path: Path, kind: str, request) -> None:  # type: ignore[no-untyped-def]
    storage = f"sqlite:///{tmp_path}/shared.db" if kind == "sqlite" else request.getfixturevalue("postgresql")
    command = [
        sys.executable, "-m", "ktmerge", "sweep", str(world.recipe), *ARGUMENTS, "--trials", "12", "--storage", storage,
    ]  # fmt: skip

    def start(i: int) -> subprocess.Popen[str]:
        own = [*command, "--out", str(tmp_path / f"w{i}")]
        return subprocess.Popen(own, cwd=world.folder, stderr=subprocess.PIPE, text=True)

    victim = start(0)
    while victim.poll() is None:
        try:
            mine = [one for one in trials_of(storage) if f"/{victim.pid}/" in one.user_attrs.get("worker", "")]
        except Exception:  # the tables are being made
            mine = []
        if mine and mine[-1].state.name == "RUNNING" and "recipe" in mine[-1].user_attrs:
            os.kill(victim.pid, signal.SIGSTOP)  # so that it does not finish meanwhile
            if is_free(storage) and trials_of(storage)[mine[-1].number].state.name == "RUNNING":
                break
            os.kill(victim.pid, signal.SIGCONT)
        time.sleep(0.02)
    others = [start(i) for i in (1, 2)]
    while any(other.poll() is None for other in others) and {
        one.user_attrs["worker"] for one in trials_of(storage) if "recipe" in one.user_attrs
    } == {mine[-1].user_attrs["worker"]}:  # until another is at work
        time.sleep(0.02)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    for other in others:
        _, said = other.communicate(timeout=1200)
        assert other.returncode == 0, said
    trials = trials_of(storage)
    lost = [one for one in trials if one.user_attrs.get("void") == "its worker died"]
    assert [one.number for one in lost] == [mine[-1].number]
    (heir,) = [one for one in counted(trials) if one.user_attrs.get("taken up from") == mine[-1].number]
    assert heir.params == lost[0].params
    assert heir.state.name == "COMPLETE"
    assert len(counted(trials)) == 12
    results = [(tmp_path / f"w{i}" / "result.json").read_bytes() for i in (1, 2)]
    assert results[0] == results[1]
    told = [file.read_bytes() for i in (1, 2) for file in (tmp_path / f"w{i}").iterdir()]
    assert not any(PASSWORD in content for content in told)


@pytest.mark.slow
def test_jobs_of_submitit_share_a_sweep(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("submitit")
    from ktmerge.sweep.launch import launch

    settings = settings_of(world, tmp_path)
    outcome = launch(settings, 2, "local jobs", tmp_path / "jobs")
    assert len(outcome.candidates) == 4
    assert {one.user_attrs["worker"].split("/")[1] for one in trials_of(settings.storage)} - {str(os.getpid())}


@pytest.mark.slow
def test_a_ray_cluster_that_has_died_is_not_waited_for(world, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("ray")
    from ktmerge.sweep.launch import launch

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(UsageError, match=f"no Ray cluster answers at .*:{port}, where"):
        launch(settings_of(world, tmp_path), 2, "ray", tmp_path / "jobs")


@pytest.mark.slow
def test_actors_of_a_ray_cluster_share_a_sweep(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("ray")
    from ktmerge.sweep.launch import launch

    settings = settings_of(world, tmp_path)
    with pytest.raises(UsageError, match="no Ray cluster"):
        launch(settings, 2, "ray", tmp_path / "jobs")
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--port=0",
        "--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    cluster = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert cluster.stdout is not None
        for line in cluster.stdout:
            if "Ray runtime started" in line:
                break
        outcome = launch(settings, 2, "ray", tmp_path / "jobs")
    finally:
        os.killpg(cluster.pid, signal.SIGTERM)
        cluster.wait(timeout=1200)
    assert len(outcome.candidates) == 4
    assert {one.user_attrs["worker"].split("/")[1] for one in trials_of(settings.storage)} - {str(os.getpid())}
