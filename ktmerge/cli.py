"""The entry point: run a command, answer every end of it with an exit code."""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, TextIO

from ktmerge.checkpoints.signals import STOPPING, answer_stopping, leave_terminal
from ktmerge.errors import KtmergeError, ToldElsewhereError, UsageError

__all__ = ["main"]

AGAIN = signal.SIGALRM
"""Sent by this process to itself."""
AGAIN_SECONDS = 0.02

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What standard output answers if it goes into a file that can't grow; failures of other files name them."""

SPARED_SECONDS = 1.0
"""Before, while modules are loaded, there is no garbage, and to look for it would take a tenth of a short command."""

SAME_SECONDS = 0.5
"""Signals that come so close together are one wish: launchers like torchrun pass on what a terminal sent to all."""

_stopped: list[float] = []
"""When this process was asked to stop."""

_over = False
"""Whether all is done but to say how it went."""


def _stop(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _over or (number != AGAIN and _stopped and now - _stopped[-1] < SAME_SECONDS):
        return
    _stopped.append(now)
    if number == signal.SIGHUP:
        leave_terminal()
    raise KeyboardInterrupt


def _unheard(event: Any) -> None:
    """Stop a little later: raised in what Python calls by itself, as imports make it do, it would be shown and lost."""
    if not issubclass(event.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(event)
    elif not _over:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit code 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    global _over
    _over = False
    try:
        answer_stopping(_stop)
        signal.signal(AGAIN, _stop)
        sys.unraisablehook = _unheard
        _prepare()
        code = _exit_code(arguments)
        _over = True
    except KeyboardInterrupt:
        _over = True  # no signal is looked at between being here and this
        code = _interrupted()
    # Python, shutting down, would put back the default: die of the signal.
    for number in (*STOPPING, AGAIN):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _prepare() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # to look for some reads every installed package
    _spare_collections()
    if sys.stdout is None or _is_one_of_several():
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    _escape_what_has_no_letters()


def _escape_what_has_no_letters() -> None:
    """Recipes are UTF-8, and not every locale is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _spare_collections() -> None:
    """Look for garbage only in commands that take longer, and never among what they began with."""
    gc.disable()
    later = threading.Timer(SPARED_SECONDS, _collect)
    later.daemon = True
    later.start()


def _collect() -> None:
    gc.freeze()
    gc.enable()


def _exit_code(arguments: list[str] | None) -> int:
    try:
        from ktmerge.commands import command_line  # only now: a signal while it is imported is answered like any other

        given = [_at_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
        _require_names(given)
        result: Any = command_line(given)(args=given, standalone_mode=False)
        sys.stdout.flush()
    except KtmergeError as error:
        if _stopped:
            return _interrupted()
        if not isinstance(error, ToldElsewhereError) and not _is_an_echo():
            from ktmerge import console

            console.fail(str(error))
        return error.exit_code
    except BrokenPipeError:
        _give_up_on_stdout()
        return 1
    except OSError as error:
        from ktmerge import console

        if error.errno == errno.ENAMETOOLONG:  # wherever it was looked up: there is no such file
            console.fail(f"{error.filename}: its name is too long.")
            return 2
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        console.fail(f"output cannot be written: {error.strerror}.")
        _give_up_on_stdout()
        return 1
    except (Exception, SystemExit) as error:
        # typer leaves by itself, and some libraries fail oddly when stopped while they are imported
        if _stopped or _is_abort(error):
            return _interrupted()
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        if not _is_an_echo():
            _point_to_set(error)
            error.show()  # a usage error of the command line itself
        return int(error.exit_code)
    if _stopped:
        return _interrupted()
    return result if isinstance(result, int) else 0


def _point_to_set(error: Any) -> None:
    """An option that there is none of, such as ``--density`` or ``--learning-rate``, is likely a key of the recipe."""
    import difflib

    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or context is None or not any("--set" in one.opts for one in context.command.params):
        return
    if context.info_name == "eval":  # whose keys stand in the suite
        return
    above = "" if context.info_name in ("finetune", "stats") else "blend."
    if option.startswith("--") and not difflib.get_close_matches(option, error.possibilities or (), cutoff=0.8):
        key = option.lstrip("-").replace("-", "_")
        error.possibilities = []
        error.message += f". Keys of the recipe are set as --set {above}{key}=VALUE"


def _give_up_on_stdout() -> None:
    """Python, shutting down, would try once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require_names(arguments: list[str]) -> None:
    """Refuse what has no name that could be written down, before any work is done."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UsageError(
                f"{ascii(argument)[1:-1]}: is no text in this locale's encoding ({sys.getfilesystemencoding()}); set a "
                "UTF-8 locale (LC_ALL=C.UTF-8), or rename it."
            )
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder was deleted; go to one that is there.") from None


def _at_home(argument: str) -> str:
    """``--out=~/blended``: not every shell expands the tilde inside a word, and a folder named ``~`` is a trap."""
    option, equals, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and option.startswith("--") else argument


def _is_abort(error: BaseException) -> bool:
    """Whether a question on the terminal was left without an answer."""
    typer = sys.modules.get("typer")
    return typer is not None and isinstance(error, typer.Abort)


def _interrupted() -> int:
    global _over
    _over = True
    # One that was raised inside compiled text (imports do that a lot) Python would otherwise take for never caught,
    # and under -m it would, after all is done, die of SIGINT. Any other text makes it forget.
    eval("None")  # noqa: S307
    if not _is_one_of_several():
        from ktmerge import console

        console.fail("interrupted; nothing was left half-written.")
    return 130


def _is_one_of_several() -> bool:
    """Whether this is a process of a run by torchrun or the like, and not the first of them, which prints."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def _is_an_echo() -> bool:
    """Whether the first process fails with the same words: until they have joined, all do the same."""
    distributed = sys.modules.get("torch.distributed")
    return _is_one_of_several() and not (distributed and distributed.is_available() and distributed.is_initialized())
