"""The house's two structural promises: imports point one way, and light commands stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ktmerge"

# room -> rooms it may import; every room may import itself, drawing, errors and progress.
ALLOWED = {
    "checkpoints": set(),
    "recipes": {"checkpoints"},
    "merge": {"recipes", "checkpoints"},
    "adapters": {"checkpoints"},
    "tuners": {"adapters", "recipes", "checkpoints"},
    "eval": {"adapters", "recipes", "checkpoints"},
    "sweep": {"merge", "eval", "recipes", "checkpoints"},
    "measurement": {"tuners", "recipes", "checkpoints"},
    "staging": {"tuners", "recipes", "checkpoints"},
    "pipeline": {"measurement", "staging", "merge", "tuners", "eval", "recipes", "checkpoints"},
    "api": {
        "sharing",
        "deltas",
        "measurement",
        "staging",
        "pipeline",
        "sweep",
        "merge",
        "tuners",
        "eval",
        "recipes",
        "checkpoints",
    },
    "demo": {"api", "staging", "pipeline", "merge", "tuners", "eval", "recipes", "checkpoints"},
    "deltas": {"checkpoints"},
    "sharing": {"deltas", "merge", "eval", "recipes", "checkpoints"},
    "doctor": {"checkpoints"},
    "console": {"tuners"},
    "commands": {"allocation", "api", "console", "demo", "doctor"},
    "cli": {"checkpoints", "commands", "console"},
    "__init__": {"api"},
    "__main__": {"cli"},
    "allocation": set(),
    "drawing": set(),
    "errors": set(),
    "markdown": set(),
    "progress": set(),
}
SHARED = {"drawing", "errors", "markdown", "progress", "__version__"}
HEAVY = ("torch", "transformers", "mergekit", "datasets", "matplotlib", "pandas", "pyarrow", "scipy", "optuna")


def room_of(module: Path) -> str:
    relative = module.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


# Of ktmerge or relative ones, wherever they stand; reading only these is ten times as fast as reading all code.
IMPORT = re.compile(r"^ *((?:from (?:ktmerge|\.)[\w.]* import (?:\([^)]*\)|.*))|import ktmerge.*)$", re.MULTILINE)


def imported_rooms(module: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.parse("\n".join(IMPORT.findall(module.read_text(encoding="utf-8")))).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            # `from ktmerge import x` imports the room x
            names = (
                [f"ktmerge.{alias.name}" for alias in node.names] if node.module == "ktmerge" else [node.module or ""]
            )
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("ktmerge.")}
    return rooms


@pytest.mark.parametrize("room", sorted({room_of(module) for module in PACKAGE.rglob("*.py")}))
def test_imports_point_one_way(room: str) -> None:
    allowed = ALLOWED[room] | SHARED | {room}
    modules = [module for module in sorted(PACKAGE.rglob("*.py")) if room_of(module) == room]
    found = {str(module.relative_to(PACKAGE)): sorted(imported_rooms(module) - allowed) for module in modules}
    assert not {module: rooms for module, rooms in found.items() if rooms}, f"{room} must not import these"


def loaded_by(commands: list[list[str]]) -> dict[str, set[str]]:
    """Heavy packages in memory after each command, all run one after the other in a process of their own."""
    script = (
        "import sys\nfrom ktmerge.cli import main\n"
        f"for command in {commands!r}:\n"
        "    try:\n        main(command)\n    except SystemExit as stop:\n        code = stop.code or 0\n"
        f"    loaded = ' '.join(m for m in {HEAVY!r} if m in sys.modules)\n"
        "    sys.stderr.write(f'\\nCODE {code} LOADED {loaded}\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told = [line.split() for line in done.stderr.splitlines() if line.startswith("CODE ")]
    assert [words[1] for words in told] == ["0"] * len(commands), done.stderr + done.stdout
    return {" ".join(command): set(words[3:]) for command, words in zip(commands, told, strict=True)}


@pytest.mark.slow
def test_light_commands_load_nothing_heavy(toy_pair: tuple[Path, Path]) -> None:
    base, tuned = map(str, toy_pair)
    loaded = loaded_by(
        [
            ["--help"],
            ["suite", "list"],
            ["recipe", "list"],
            ["recipe", "check", "ties"],
            ["recipe", "check", "ties", "--base", base, "--expert", f"a={tuned}"],
            ["inspect", base, tuned, "--headers"],
        ]
    )
    assert not any(loaded.values()), loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "first"),
    [(["recipe", "check", "ties"], "recipe  ties is valid"), (["blend", "--help"], "Usage: ktmerge blend [OPTIONS]")],
    ids=["check", "help"],
)
def test_short_answers_load_no_drawing_and_no_section_that_is_not_there(command: list[str], first: str) -> None:
    script = (
        "import sys\nfrom ktmerge.cli import main\nsys.argv[0] = 'ktmerge'\n"
        f"try:\n    main({command!r})\nexcept SystemExit:\n"
        "    assert not {'rich.console', 'ktmerge.recipes.finetuning', 'ktmerge.recipes.suites'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(first)


@pytest.mark.slow
def test_a_method_is_found_without_loading_the_others() -> None:
    script = (
        "import sys\nfrom ktmerge.merge.registry import find_method, find_stage, methods\n"
        "found = [find_method(name) for name in ('ties', 'dare_ties', 'task_arithmetic', 'linear')]\n"
        "assert [one.name for one in found] == ['ties', 'dare_ties', 'task_arithmetic', 'linear']\n"
        "assert find_stage('elect', 'combine').name == 'elect' and find_stage('trim', 'transform').name == 'trim'\n"
        "assert not {'wudi', 'patch', 'mergekit'} & {name.rpartition('.')[2] for name in sys.modules}\n"
        "assert find_method('swudi').name == 'swudi' and 'karcher' in methods()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
