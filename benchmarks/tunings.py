"""The ways to tune that are compared: the survey's, and others, as settings of `ktmerge finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATES = (2e-4, 1e-3, 5e-3)
"""Learning rates that every way is tried with."""
LAMBDAS = (0.3, 0.6, 1.0)
"""As many values that every blend is tried with."""
STEPS, BATCH = 80, 16
SAMPLES = STEPS * BATCH
"""Every sample is seen once."""

UPSTREAM, FISHER = "{upstream}", "{fisher}"
"""Stand for files: training data of the upstream sets, and Fisher information that was measured on some."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Tuning:
    """One way.

    Attributes:
        kind: as the survey has it.
        settings: keys of a fine-tune.
        blend: instead: of a method by which the full fine-tune is blended with its base.
        sees: whether it is about a part that models of text do not have.
        uses: upstream data it is given.
    """

    name: str
    kind: str
    settings: Settings = field(default_factory=dict)
    blend: Settings | None = None
    sees: bool = False
    uses: str = "–"

    @property
    def values(self) -> tuple[float, ...]:
        """What the way is tried with."""
        return RATES if self.blend is None else LAMBDAS


FULL = "full"


def _part(expression: str, name: str = "", *, sees: bool = False) -> Tuning:
    return Tuning(name or expression, "part", {"train": expression}, sees=sees)


def _lora(name: str, family: str, rank: int, **settings: Any) -> Tuning:
    return Tuning(f"{name} r={rank}", "low rank", {"adapter": {"name": family, "rank": rank}, **settings})


def _selective(name: str, **settings: Any) -> Tuning:
    return Tuning(name, "selective", settings)


TUNINGS = (
    _part("full", FULL),
    _part("top:1"),
    _part("last:1"),
    _part("connector", sees=True),
    _lora("LoRA", "lora", 8),
    _lora("DoRA", "dora", 8),
    _selective("magnitude 0.5", select="magnitude", density=0.5),
    _selective("SPIDER", select="fused", mask="soft", every=1),
    _selective("random 0.5", select="random", density=0.5),
    _part("llm+connector", sees=True),
    _part("llm", sees=True),
    Tuning("L2-SP 0.1", "regularised", {"l2_sp": 0.1}),
    Tuning("replay 1/4", "regularised", {"replay": UPSTREAM, "replay_ratio": 0.25}, uses="samples"),
    Tuning("distillation", "regularised", {"distill": 1.0}),
    _selective("gradient 0.1", select="gradient", density=0.1),
    _selective("random 0.1", select="random", density=0.1),
    _selective("half", select="half"),
    _part("top:1+connector", sees=True),
    _part("last:1+connector", sees=True),
    _part("vision", sees=True),
    _lora("rsLoRA", "rslora", 8),
    _lora("PiSSA", "pissa", 8),
    Tuning("EWC 0.1", "regularised", {"l2_sp": 0.1, "fisher": FISHER}, uses="Fisher"),
    Tuning("EMA 0.95", "regularised", {"average": "ema", "ema_decay": 0.95}),
    _lora("LoRA", "lora", 2),
    _lora("LoRA", "lora", 32),
    Tuning("LoRA r=8, connector", "low rank",
           {"adapter": {"name": "lora", "rank": 8}, "train": "llm+connector"}, sees=True),
    Tuning("full, then linear", "blend", blend={"method": "linear"}),
    Tuning("full, then TIES 0.2", "blend", blend={"method": "ties", "density": 0.2}),
)  # fmt: skip


def tunings(sees: bool) -> tuple[Tuning, ...]:
    """Those for a model that sees, or for one that does not."""
    return tuple(one for one in TUNINGS if sees or not one.sees)


def tuning_of(name: str) -> Tuning:
    """The way of that name."""
    return next(one for one in TUNINGS if one.name == name)
