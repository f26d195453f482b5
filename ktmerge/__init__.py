"""ktmerge: fine-tune fully, blend back with the base, score upstream and downstream.

The verbs of the command line as functions: `finetune`, `blend`, `blend_into`, `evaluate`, `compare`, `report`, `run`,
`sweep`, `screen`, `inspect`, `extract_lora`, `measure`, `recommend`, `plan`, `verify`, `load_recipe`; and `Pristine`,
what a sweep of `blend_into` reads from. Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ktmerge.api import (
        Pristine,
        blend,
        blend_into,
        compare,
        evaluate,
        extract_lora,
        finetune,
        inspect,
        load_recipe,
        measure,
        plan,
        recommend,
        report,
        run,
        screen,
        sweep,
        verify,
    )

__all__ = [
    "Pristine",
    "blend",
    "blend_into",
    "compare",
    "evaluate",
    "extract_lora",
    "finetune",
    "inspect",
    "load_recipe",
    "measure",
    "plan",
    "recommend",
    "report",
    "run",
    "screen",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ktmerge' has no attribute '{name}'")
    from ktmerge import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what a notebook completes
