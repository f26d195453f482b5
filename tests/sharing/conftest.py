"""Models, a recipe over them, and its bundle."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside these tests

from bundle_models import RECIPE, SUITE, write_model
from hub_server import TOKEN, Handler, State, served

from ktmerge import api


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``spam``, ``recipe.yaml``, ``suite.yaml``, and the bundle ``r.ktr`` of them. Read-only."""
    folder = tmp_path_factory.mktemp("sharing")
    write_model(folder / "base", 0)
    write_model(folder / "spam", 1)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "suite.yaml").write_text(SUITE)
    api.pack(folder / "recipe.yaml", folder / "r.ktr")
    return folder


@pytest.fixture
def place(packed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``packed_once`` that a test may change, and works in."""
    folder = tmp_path / "work"
    shutil.copytree(packed_once, folder)
    monkeypatch.chdir(folder)
    return folder


@dataclass
class Hub:
    """A running hub."""

    address: str
    state: State


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, with a token that it accepts."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    state = State()
    with served(Handler, state=state) as address:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr("ktmerge.sharing.retrying._FIRST", 0.01)
        yield Hub(address, state)


Ktmerge = Callable[..., int]


@pytest.fixture
def ktmerge() -> Ktmerge:
    """The command line in this process; the exit code."""
    from ktmerge.cli import _exit_code

    return lambda *arguments: _exit_code(list(map(str, arguments)))
