"""Temporary folders: a living run's is left alone, a dead one's is removed by the next run for the same target."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from ktmerge.checkpoints.workroom import workroom

HOLD = """
import sys
from pathlib import Path
from ktmerge.checkpoints.workroom import workroom
with workroom(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"made")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    target = tmp_path / "r.ktr"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with workroom(target) as own, workroom(target) as second:
            assert (theirs / "half").read_bytes() == b"made"
            assert len({own, second, theirs}) == 3
            assert own.parent == theirs.parent == tmp_path
            assert own.stat().st_mode & 0o077 == 0
        assert not own.exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert theirs.exists()
    with workroom(tmp_path / "another.ktr"):
        assert theirs.exists()
    with workroom(target):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []
