"""A PostgreSQL server of the tests' own, where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAMES = ("initdb", "pg_ctl", "psql")


def missing() -> str | None:
    """Why there can be none."""
    programs = [name for name in _NAMES if shutil.which(name) is None]
    if programs:
        return f"{', '.join(programs)} not installed: apt install postgresql"
    if os.geteuid() == 0 and _owner() is None:
        return "a server refuses to run as root, and there is no user postgres"
    return None


@contextmanager
def running() -> Iterator[str]:
    """The URL of an empty database of a server on this machine, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # not below a folder that only root may enter
    owner = _owner()
    if os.geteuid() == 0 and owner is not None:
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    data = folder / "data"
    try:
        _call("initdb", "-D", str(data), "-A", "trust", "-U", "sweeper", "--no-sync")
        options = f"-h '' -k {folder} -F"  # a port might be taken by somebody else meanwhile
        _call("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-w", "-t", "600", "-o", options, "start")
        try:
            _call("psql", "-h", str(folder), "-U", "sweeper", "-d", "postgres", "-c",
                  "create database sweeps")  # fmt: skip
            yield f"postgresql://sweeper:geheim@/sweeps?host={folder}"
        finally:
            _call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(*command: str) -> None:
    owner = _owner() if os.geteuid() == 0 else None
    # Output goes to a file: the server would hold a pipe open.
    with tempfile.TemporaryFile() as out:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", timeout=1200,
            **({} if owner is None else {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}),
        )  # fmt: skip
        out.seek(0)
        assert done.returncode == 0, out.read().decode()


def _owner() -> pwd.struct_passwd | None:
    with suppress(KeyError):
        return pwd.getpwnam("postgres")
    return None
