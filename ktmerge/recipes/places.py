"""Where in a YAML file a key stands, for messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from ktmerge.checkpoints.regular import read_regular
from ktmerge.recipes.document import compose


class Places:
    """The lines of a YAML file's keys; one that can't be read, or is read no longer as it was, has none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._root = compose(read_regular(path).decode("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            self._root = None

    def at(self, location: Sequence[str | int]) -> str:
        """``file:line`` of a key, as in ``("blend", "where", 0)``; of what holds it, where it doesn't stand there."""
        if self._root is None or not location:
            return str(self._path)
        node, line = self._root, self._root.start_mark.line
        for step in location:
            if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line
            elif isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == step:
                        node, line = value, key.start_mark.line
        return f"{self._path}:{line + 1}"
