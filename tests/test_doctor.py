"""The doctor names what breaks an install, and says what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktmerge import doctor
from ktmerge.cli import main


def findings(what: str) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine() if finding.what == what]


def test_lists_versions_and_devices() -> None:
    found = {finding.what: finding for finding in doctor.examine()}
    assert found["torch"].level == "ok"
    assert found["torch"].found[0].isdigit()
    assert "cores" in found["cpu"].found


def test_a_torchvision_that_cannot_be_imported_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (found,) = findings("torchvision")
    assert found.broken
    assert "operator torchvision::nms does not exist" in found.found
    assert "pip uninstall torchvision" in found.found


def test_json_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    assert stop.value.code == 0
    assert {"torch", "memory", "python"} <= {entry["what"] for entry in json.loads(capsys.readouterr().out)}


def test_images_need_no_torchvision() -> None:
    (vision,) = findings("extra vision")
    assert "torchvision" not in vision.found
