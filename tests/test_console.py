"""Progress is quiet off a terminal; results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

import pytest
from rich.text import Text

from ktmerge import cli, console


def test_no_bars_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = console.TerminalProgress()
    with progress.task("blend", 100, "bytes") as step:
        step.advance(50)
    progress.note("half way [done]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "half way [done]\n"


def test_a_note_that_nobody_hears_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends ``2>&1 | tee log``, too; the work that is stopped has yet to be saved."""
    listener, speaker = os.pipe()
    os.close(listener)
    with open(speaker, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console.TerminalProgress().note("stopping: this step is finished and saved first")
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def test_bars_show_bytes_and_time_left_once_work_is_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SHOW_AFTER_SECONDS", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    progress = console.TerminalProgress()
    with progress.task("blend", 2e9, "bytes") as step:
        step.advance(1e9)
    drawn = capsys.readouterr().err
    assert "1.00/2.00 GB" in drawn
    assert "left" in drawn


def test_errors_keep_brackets_and_stand_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail("blend.where[0]: no such part\nseed: too small")
    assert capsys.readouterr().err.splitlines() == ["error: blend.where[0]: no such part", "error: seed: too small"]


def test_a_name_that_would_fill_the_screen_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail(f"e1: lacks a{'x' * 100_000}z, b.")
    assert capsys.readouterr().err.strip() == f"error: e1: lacks a{'x' * 199}...{'x' * 198}z, b."


def test_names_with_colons_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail("e1:x: no such folder")
    console.TerminalProgress().note("a :bug: b")
    console.print_table(["name"], [["runs:fire:"]])
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["error: e1:x: no such folder", "a :bug: b"]
    assert "runs:fire:" in captured.out
    console.print_table(["[/a]"], [["[/b]"]], "[/c]")
    assert [word for word in capsys.readouterr().out.split() if "/" in word] == ["[/c]", "[/a]", "[/b]"]


def test_words_are_not_searched_for_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patterns of that search take minutes on one word of a stranger's that fills a recipe."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.print_pairs({"recipe": "12 'b' True"})
    assert capsys.readouterr().out == "recipe  12 'b' True\n"


def test_names_cannot_steer_the_terminal_or_break_it(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\u202e\udcff"
    console.TerminalProgress().note(name)
    assert capsys.readouterr().err == r"a\x1b[2J\u202e\udcff" + "\n"
    console.stdout().print(Text(name))
    assert capsys.readouterr().out == r"a\x1b[2J\u202e\udcff" + "\n"
    console.print_table(["file"], [[name]])
    console.print_pairs({"file": name})
    console.print_json({"file": name})
    printed = capsys.readouterr().out
    assert printed.count(r"a\x1b[2J\u202e\udcff") == 2
    assert json.loads(printed[printed.index("{") :]) == {"file": name}
    printed.encode("utf-8")
    console.print_json({"file": "\x9b2J\u202e\U000e0001 🐟 ü"})
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    assert "🐟 ü" in printed
    assert json.loads(printed) == {"file": "\x9b2J\u202e\U000e0001 🐟 ü"}


def test_words_that_a_locale_has_no_letters_for(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli._escape_what_has_no_letters()
    console.print_pairs({"recipe": "Grüße"})
    console.print_table(["recipe"], [["Grüße"]])
    sys.stdout.flush()
    assert raw.getvalue().count(rb"Gr\xfc\xdfe") == 2
    raw.truncate(raw.seek(0))
    console.print_json({"recipe": "Grüße"})
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"recipe": "Grüße"}


def test_trained_tokens_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    from ktmerge.tuners import PreviewSample

    tokens = [("Q: ", False), ("yes", True), ("<end>", True), ("\n", False)]
    console.print_preview([PreviewSample(tokens, "train.jsonl, row 1", dropped=False)])
    printed = capsys.readouterr().out
    assert "train.jsonl, row 1: 4 tokens, 2 trained" in printed
    assert "Q: ⟦yes<end>⟧" in printed
