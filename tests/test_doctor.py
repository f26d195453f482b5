"""The doctor names what breaks an install, and says what to do about it."""

from __future__ import annotations

import json
from email.message import Message
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


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ["optuna>=5; extra == 'sweep'", "torch>=2.6", "numpy>=1; extra == 'here'", "numpy>=99; extra == 'late'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: told)
    extras = Message()
    for name in ("sweep", "here", "late", "dev"):
        extras["Provides-Extra"] = name
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: extras)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "optuna" else "2.4.6")
    found = {finding.what: finding for finding in doctor.examine() if finding.what.startswith("extra ")}
    assert set(found) == {"extra sweep", "extra here", "extra late"}
    assert found["extra here"].found == "installed"
    assert "optuna>=5" in found["extra sweep"].found
    assert "pip install 'ktmerge[sweep]'" in found["extra sweep"].found
    assert "numpy>=99" in found["extra late"].found
