"""``python -m ktmerge``."""

from __future__ import annotations

from ktmerge.cli import main

main()
