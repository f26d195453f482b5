"""Pages that are written partly by hand and partly by a benchmark."""

from __future__ import annotations

from pathlib import Path

MARKERS = ("<!-- results -->\n", "<!-- end of results -->\n")


def fill(page: Path, text: str) -> None:
    """Put what was measured between the markers of a page; a page that isn't there is begun."""
    page.parent.mkdir(parents=True, exist_ok=True)
    start, end = MARKERS
    old = page.read_text(encoding="utf-8") if page.is_file() else f"# Results\n\n{start}{end}"
    before, _, rest = old.partition(start)
    page.write_text(f"{before}{start}\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
