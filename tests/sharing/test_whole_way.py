"""From one machine to another, by the real command line in processes of its own, with HF_ENDPOINT set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_models import RECIPE, SUITE, write_model
from hub_server import TOKEN, Handler, Repository, State, served
from safetensors.numpy import load_file, save_file


@pytest.mark.slow
def test_a_recipe_over_models_of_the_hub(tmp_path: Path) -> None:
    state = State()
    commits = {}
    for seed, name in enumerate(("base", "spam")):
        write_model(tmp_path / "models" / name, seed)
        files = {path.name: path.read_bytes() for path in (tmp_path / "models" / name).iterdir()}
        state.repositories[f"org/{name}"] = Repository()
        commits[name] = state.repositories[f"org/{name}"].commit(files)
    with served(Handler, state=state) as address:
        sender, receiver = (machine(tmp_path / name, address) for name in ("sender", "receiver"))
        (tmp_path / "sender" / "suite.yaml").write_text(SUITE)
        text = RECIPE.replace("base: base", "base: org/base").replace("model: spam", "model: org/spam@main")
        (tmp_path / "sender" / "recipe.yaml").write_text(text)
        sender(0, "blend", "-r", "recipe.yaml", "--out", "blended")
        said = sender(0, "recipe", "push", "recipe.yaml", "me/half", "--blended", "blended").stdout
        assert f"me/half@{state.repositories['me/half'].branches['main']}" in said
        for name in ("base", "spam"):  # others now, under the same name
            other = "spam" if name == "base" else "base"
            files = state.repositories[f"org/{other}"].commits[commits[other]]
            state.repositories[f"org/{name}"].commit({**files, "config.json": b"{}"})
        state.seen.clear()
        asked = receiver(2, "recipe", "pull", "me/half")
        for name in ("base", "spam"):
            assert f"org/{name}@{commits[name]}" in asked.stdout
        assert not [path for _, path, _ in state.seen if "org/" in path]
        receiver(0, "recipe", "pull", "me/half", "--yes", "--out", "theirs")
        receiver(0, "blend", "-r", "theirs/recipe.yaml", "--lock", "theirs/recipe.lock.yaml", "--out", "made")
        one, other_ = (tmp_path / where / "model.safetensors" for where in ("sender/blended", "receiver/made"))
        assert one.read_bytes() == other_.read_bytes()
        refused = receiver(2, "blend", "-r", "theirs/recipe.yaml", "--lock", "theirs/recipe.lock.yaml", "--out", "x",
                           "--base", "org/spam@main")  # fmt: skip
        assert "not what was locked" in refused.stderr


@pytest.mark.slow
def test_a_blend_is_proven_on_another_machine(tmp_path: Path) -> None:
    """Other home, folders, rights and shards, and no place for a cache."""
    here = machine(tmp_path / "here")
    for seed, name in enumerate(("base", "spam")):
        write_model(tmp_path / "here" / name, seed)
    text = RECIPE.replace("eval: {suite: suite.yaml}\n", "output: {rounding: stochastic}\n").replace(
        "linear", "dare_ties"
    )
    (tmp_path / "here" / "recipe.yaml").write_text(text)
    here(0, "blend", "-r", "recipe.yaml", "--out", "blended")
    tensors = load_file(tmp_path / "here" / "spam" / "model.safetensors")
    there = machine(tmp_path / "there", umask=0o077, XDG_CACHE_HOME="no-folder", TMPDIR=str(tmp_path))
    (tmp_path / "there" / "no-folder").touch()
    inputs = tmp_path / "there" / "deep" / "in puts"
    inputs.mkdir(parents=True)
    shutil.move(tmp_path / "here" / "base", inputs / "b+se")
    shutil.move(tmp_path / "here" / "blended", inputs / "out")
    shutil.move(tmp_path / "here" / "spam" / "config.json", inputs / "config.json")
    shutil.rmtree(tmp_path / "here")
    (inputs / "sp").mkdir()
    shutil.move(inputs / "config.json", inputs / "sp" / "config.json")
    files = {
        name: f"model-{number:05}-of-{len(tensors):05}.safetensors" for number, name in enumerate(sorted(tensors), 1)
    }
    for name, file in files.items():
        save_file({name: tensors[name]}, inputs / "sp" / file, metadata={"format": "pt"})
    (inputs / "sp" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for path in inputs.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    models = ["--base", "deep/in puts/b+se", "--expert", "spam=deep/in puts/sp"]
    assert "input spam" in there(1, "recipe", "verify", "deep/in puts/out", *models).stdout
    proven = there(0, "recipe", "verify", "deep/in puts/out", *models, "--rebuild").stdout
    assert "is what its record says" in proven
    (inputs / "b+se" / "config.json").chmod(0o644)
    (inputs / "b+se" / "config.json").write_text("{}")
    there(1, "recipe", "verify", "deep/in puts/out", *models, "--rebuild")
    assert sorted(path.name for path in inputs.iterdir()) == ["b+se", "out", "sp"]


def machine(
    home: Path, address: str = "", umask: int = -1, **more: str
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A command line with a home and caches of its own; ``run(code, *arguments)``."""
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": address, "HF_HOME": str(home / ".hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1,localhost", "HF_HUB_DISABLE_TELEMETRY": "1", "HOME": str(home), **more,
    }  # fmt: skip

    def run(code: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ktmerge", *arguments]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False,
                              stdin=subprocess.DEVNULL, timeout=1200, umask=umask)  # fmt: skip
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run
