"""The entry point: how a process of ktmerge ends."""

from __future__ import annotations

import gc
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktmerge import cli
from ktmerge.cli import _exit_code

COMMANDS = ["finetune", "stats", "blend", "extract-lora", "eval", "compare", "report"]
COMMANDS += ["run", "demo", "inspect", "recommend", "doctor", "recipe"]


def test_garbage_is_looked_for_again_once_a_command_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "SPARED_SECONDS", 0.05)
    cli._spare_collections()
    assert not gc.isenabled()
    stop = time.monotonic() + 60
    while not gc.isenabled() and time.monotonic() < stop:
        time.sleep(0.01)
    assert gc.isenabled()


@pytest.mark.every(2)
@pytest.mark.parametrize("number", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_signal_after_the_work_changes_nothing(number: str) -> None:
    """Python puts default handlers back while it shuts down: it would die of a signal though everything is done."""
    code = (
        "import atexit, os, signal\n"
        f"atexit.register(lambda: os.kill(os.getpid(), signal.{number}))\n"
        "from ktmerge.cli import main\n"
        f"class Late:\n    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.{number}): kill(me, number)\n"
        "import sys\nsys.modules['late'] = Late()\n"
        "main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_that_closes_stops_like_ctrl_c(tmp_path: Path) -> None:
    """What is said to it afterwards fails, which must not keep anything from being tidied up."""
    code = (
        "import fcntl, os, pathlib, signal, sys, termios, time, ktmerge.commands\n"
        "from ktmerge.cli import main\n"
        "os.setsid()\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "def work(**_):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('stopping', file=sys.stderr, flush=True)\n"
        "        pathlib.Path('tidy').touch()\n"
        "ktmerge.commands.command_line = lambda words: work\n"
        "main([])\n"
    )
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=its, stdout=its, stderr=its)
    os.close(its)
    assert b"ready" in os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=600) == 130
    assert (tmp_path / "tidy").exists()


def test_a_signal_inside_compiled_text_ends_as_any_other(tmp_path: Path) -> None:
    """Python kills a process started with -m by SIGINT, at its very end, if one was raised in there, even if caught."""
    (tmp_path / "stopped.py").write_text(
        "import ktmerge.commands, rich.console  # any that is imported later would hide it\n"
        "from ktmerge.cli import main\n"
        "def stop(**_): exec('raise KeyboardInterrupt')\n"
        "ktmerge.commands.command_line = lambda words: stop\n"
        "main([])\n"
    )
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was left half-written.\n")


@pytest.mark.every(2)
@pytest.mark.parametrize("number", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_signal_where_python_cannot_raise_is_heard_a_little_later(tmp_path: Path, number: str) -> None:
    """In what it calls when something is collected, as imports do, what is raised is shown and forgotten."""
    (tmp_path / "stopped.py").write_text(
        "import os, signal, time, weakref, ktmerge.commands\n"
        "from ktmerge.cli import main\n"
        "class Thing: pass\n"
        "def work(**_):\n"
        "    thing = Thing()\n"
        f"    seen = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{number}))\n"
        "    del thing\n"
        "    time.sleep(60)\n"
        "ktmerge.commands.command_line = lambda words: work\n"
        "main([])\n"
    )
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was left half-written.\n")


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "moment", ["import ktmerge.console; ktmerge.console.fail = lambda text:", "atexit.register(lambda:"]
)
def test_launchers_that_send_one_signal_after_the_other(moment: str) -> None:
    """The second comes while what was begun is cleared away, while the first is answered, or at Python's end."""
    signals = "[os.kill(os.getpid(), one) for one in (signal.SIGINT, signal.SIGTERM)]"
    code = (
        "import atexit, os, signal, ktmerge.commands\n"
        f"{moment} {signals}{')' * moment.count('(')}\n"
        "def stop(**_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('cleared away')\n"
        "ktmerge.commands.command_line = lambda words: stop\n"
        "from ktmerge.cli import main\n"
        "main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "cleared away\n")
    assert "Traceback" not in done.stderr


def test_a_signal_at_the_start_is_answered_in_a_sentence() -> None:
    """Commands are still being imported then."""
    code = (
        "import os, signal, sys\n"
        "from ktmerge.cli import main\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer' and sys.meta_path.remove(self) is None: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was left half-written.\n")


def test_help_lists_commands_in_the_order_of_the_work() -> None:
    from ktmerge.commands import app

    names = [info.name or info.callback.__name__ for info in app.registered_commands if info.callback is not None]
    names += [group.name for group in app.registered_groups if group.name]
    assert [name for name in names if name in COMMANDS] == COMMANDS


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["blend", "--recipe", "ties", "--density", "0.3"], "--set blend.density=VALUE"),
        (["finetune", "--learning-rate", "2e-5"], "--set learning_rate=VALUE"),
        (["blend", "--experts", "a=b"], "(Possible options: --expert)"),
    ],
)
def test_a_key_that_is_no_option_is_pointed_to_set(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(words) == 2
    said = capsys.readouterr().err
    assert told in said
    assert ("--set" in said) == ("--set" in told)


def test_the_home_folder_in_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").write_text(
        "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    )
    assert _exit_code(["recipe", "import", "mine.yml", "--out=~/recipe.yaml"]) == 0
    assert (tmp_path / "recipe.yaml").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_the_shell_completes_commands_and_options() -> None:
    for words, position, found in (("ktmerge re", "1", "recipe"), ("ktmerge blend --re", "2", "--resume")):
        shell = {"_KTMERGE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
        command = [sys.executable, "-c", "import sys; sys.argv[0] = 'ktmerge'; from ktmerge.cli import main; main()"]
        done = subprocess.run(command, env={**os.environ, **shell}, capture_output=True, text=True, check=False)
        assert found in done.stdout.split(), done


def test_a_recipe_may_be_named_without_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _exit_code(["blend", "mine.yaml", "--out", "out"]) == 2
    assert "mine.yaml: no such recipe file" in capsys.readouterr().err
    assert _exit_code(["blend", "mine.yaml", "-r", "ties", "--out", "out"]) == 2
    assert "names another recipe beside 'mine.yaml'" in capsys.readouterr().err


def test_an_argument_that_is_no_text_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["blend", "-r", "wise-ft", "--base", os.fsdecode(b"caf\xe9"), "--out", "out"]) == 2
    assert r"caf\udce9: is no text in this locale's encoding" in capsys.readouterr().err


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "ties", "--base", LONG, "--expert", "a=b"],
        ["lock", "ties", "--base", "b", "--expert", "a=b", "--out", LONG],
        ["diff", LONG, "ties"],
        ["diff", f"{LONG}.lock.yaml", "ties"],
    ],
)
def test_a_name_that_is_too_long_is_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["recipe", *arguments]) == 2
    assert "too long" in capsys.readouterr().err


def test_a_recipe_whose_data_no_file_can_be_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    tuned = f"finetune: {{experts: {{a: {{data: {LONG}}}}}}}"
    recipe.write_text(f"ktmerge: 1\nbase: {LONG}\nexperts: {{a: {{model: {LONG}}}}}\n{tuned}\n")
    assert _exit_code(["recipe", "check", str(recipe)]) == 2
    assert "x: no such file." in capsys.readouterr().err
    assert _exit_code(["recipe", "explain", str(recipe)]) == 0


def test_a_current_folder_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert _exit_code(["blend", "-r", "wise-ft", "--out", "out"]) == 2
    assert "the current folder was deleted" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_output_on_a_full_disk_is_an_error_in_a_sentence() -> None:
    """Each command in a process of its own, a copy of one that has imported what they need."""
    commands = [["recipe", "show", "ties"], ["recipe", "list", "--json"], ["recipe", "list"]]
    code = (
        "import os, sys\n"
        "from ktmerge.cli import main\n"
        "import ktmerge.api, ktmerge.commands\n"
        f"for command in {commands}:\n"
        "    if not (process := os.fork()): main(command)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=sys.stderr)\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.splitlines() == len(commands) * [
        "error: output cannot be written: No space left on device.",
        "1",
    ]


@pytest.mark.slow
def test_streams_that_are_closed_are_not_asked() -> None:
    code = f'exec {sys.executable} -c \'from ktmerge.cli import main; main(["recipe", "check", "ties"])\' >&- 2>&-'
    assert subprocess.run(["sh", "-c", code], check=False).returncode == 0
