"""YAML text to plain data, safely (no code, no repeated keys, no alias bombs, no endless files), and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ktmerge.checkpoints.regular import read_regular
from ktmerge.errors import UsageError, printable

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 100
_MAX_DIGITS = 100
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
# Many times as fast, where PyYAML was built with libyaml, as its wheels are.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _StrictLoader(_SafeLoader):  # type: ignore[misc]
    """Safe loading, plus: keys are texts and stand there once, ``1e-4`` is a number, and nothing is a date."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = printable(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "[...]"
            if key_node.tag != _TEXT or key in seen:
                problem = "stands twice" if key in seen else "is no text to YAML; put it in quotes"
                raise _problem(f"the key '{key}' {problem}", key_node)
            seen.add(key)
        self.flatten_mapping(node)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _require_plain(node)
        number: int = super().construct_yaml_int(node)
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        _require_plain(node)
        number: float = super().construct_yaml_float(node)
        return number

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> Any:
        raise _problem(f"{node.value} is a date to YAML; put it in quotes", node)


def _problem(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _require_plain(node: yaml.ScalarNode) -> None:
    """Refuse numbers that Python would not show, and those that YAML 1.1 reads to base 60 (``1:30``) or 8 (``010``)."""
    if len(node.value) > _MAX_DIGITS:
        problem = f"a number of more than {_MAX_DIGITS} digits"
    elif ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
        problem = f"{node.value} is not the number it looks like in YAML; write it out, or put it in quotes"
    else:
        return
    raise _problem(problem, node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", _StrictLoader.construct_yaml_timestamp)

# YAML 1.1 reads 1e-4 as text because it has no dot; people write learning rates that way.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document.

    Raises:
        UsageError: not YAML, a repeated key, deeper than ``MAX_DEPTH``, more than ``MAX_NODES`` values, or aliases that
            grow past as many.
    """
    try:
        root = compose(text)
        count, depth = (0, 0) if root is None else _extent(root)
        if count > MAX_NODES or depth > MAX_DEPTH:
            what = f"more than {MAX_NODES} values" if count > MAX_NODES else "nested too deeply"
            raise UsageError(f"{where}: {what} once aliases are expanded; write it without them.")
        return None if root is None else _construct(root)
    except EndlessError as error:
        raise UsageError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not valid YAML: {_first_problem(error, text)}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # a number that is none
        raise UsageError(f"{where}: not valid YAML: a value is not what it looks like or is tagged: {error}.") from None


def yaml_text(document: Any) -> str:
    """Plain data as YAML, in its own order."""
    text: str = yaml.dump(document, Dumper=_SafeDumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def read_yaml(path: Path) -> Any:
    """Parse the YAML file at ``path``.

    Raises:
        UsageError: missing, unreadable, larger than ``MAX_BYTES``, or not YAML.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(f"{path}: {size} bytes; a recipe or suite has at most {MAX_BYTES}.")
        content = read_regular(path)
        if content.startswith(b"PK\x03\x04"):
            raise UsageError(f"{path}: is a bundle; 'ktmerge recipe unpack {path} --out FOLDER' gives its recipe.")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file in UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    return parse_yaml(text, str(path))


class EndlessError(ValueError):
    """A document that nobody writes by hand: too deep, or too long."""


def compose(text: str) -> yaml.Node | None:
    """The nodes of one YAML document, each with its place in the text.

    Whether it is too deep or too long shows in its events, before anything is built of them.

    Raises:
        EndlessError: deeper than ``MAX_DEPTH`` or of more than ``MAX_NODES`` values.
        yaml.YAMLError: not YAML.
    """
    depth = count = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        tag = getattr(event, "tag", None)
        if tag is not None:
            problem = f"a recipe or suite has no tags such as {printable(tag)[:80]}"
            raise yaml.parser.ParserError(None, None, problem, event.start_mark)  # type: ignore[arg-type]
        count += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise EndlessError("nested too deeply to be a recipe.")
        if count > MAX_NODES:
            raise EndlessError(f"more than {MAX_NODES} values; a recipe or suite has fewer.")
    return yaml.compose(text, Loader=_StrictLoader)


def _construct(root: yaml.Node) -> Any:
    loader = _StrictLoader("")
    try:
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _extent(root: yaml.Node) -> tuple[int, int]:
    """How many nodes there are, and how deep, as if every alias were written out, without writing them out."""
    measured: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) in open_nodes:
            return MAX_NODES + 1, 0  # an alias inside its own anchor
        if id(node) not in measured:
            open_nodes.add(id(node))
            children: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                children = [child for pair in node.value for child in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = list(node.value)
            counts, depths = zip((0, 0), *map(measure, children), strict=True)
            measured[id(node)] = min(1 + sum(counts), MAX_NODES + 1), bool(children) + max(depths)
            open_nodes.discard(id(node))
        return measured[id(node)]

    return measure(root)


def _first_problem(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark and text[mark.index : mark.index + 1] == "\t":
        return f"a tab at the beginning of a line; indent with spaces (line {mark.line + 1}, column {mark.column + 1})"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', None) or 'something else was expected'}, {problem}"
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
