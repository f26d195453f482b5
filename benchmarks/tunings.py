"""The ways to tune that are compared, the survey's and others, as settings of `ktmerge finetune`, and their budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UPSTREAM, FISHER = "{upstream}", "{fisher}"
"""Stand for files: training data of the upstream sets, and Fisher information that was measured on some."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """What every way of a world is given alike.

    Attributes:
        rates: learning rates that it is tried with.
        steps: how many; every sample is seen once.
        batch: samples of a step.
        first: learning rate, steps and batch with which the base is taught beforehand, on upstream samples: the token
            that ends an answer (the worlds train it without one, and a fine-tune would spend its steps on that), and
            sets that it does not know.
    """

    rates: tuple[float, ...]
    steps: int
    batch: int
    first: tuple[float, int, int]

    @property
    def samples(self) -> int:
        """Of the task."""
        return self.steps * self.batch

    @property
    def upstream(self) -> int:
        """Samples of the upstream sets, which the base is taught on and replay gives again."""
        return self.first[1] * self.first[2]


BUDGETS = {
    "text": Budget(rates=(2e-4, 1e-3, 5e-3), steps=80, batch=16, first=(5e-4, 80, 16)),
    "vision": Budget(rates=(1e-4, 5e-4, 2.5e-3), steps=200, batch=16, first=(1e-3, 300, 48)),
}
"""By world."""
TOGETHER = "together"
"""Where all tasks of the world of text are learned at once, in some order."""
LAMBDAS = (0.1, 0.2, 0.3, 0.6, 1.0)
"""Values that every blend is tried with."""


@dataclass(frozen=True)
class Tuning:
    """One way.

    Attributes:
        kind: as the survey has it.
        settings: keys of a fine-tune.
        blend: instead: of a method by which the full fine-tune is blended with its base.
        places: worlds in which it is tried, or `TOGETHER`: some are about parts that one model alone has, and some cost
            too much.
        uses: upstream data it is given.
    """

    name: str
    kind: str
    settings: Settings = field(default_factory=dict)
    blend: Settings | None = None
    places: tuple[str, ...] = tuple(BUDGETS)
    uses: str = "–"

    def values(self, world: str) -> tuple[float, ...]:
        """What the way is tried with."""
        return BUDGETS[world].rates if self.blend is None else LAMBDAS


FULL = "full"
TEXT, VISION = (("text",), ("vision",))


def _part(expression: str, name: str = "", places: tuple[str, ...] = tuple(BUDGETS)) -> Tuning:
    return Tuning(name or expression, "part", {"train": expression}, places=places)


def _lora(name: str, family: str, rank: int, places: tuple[str, ...] = tuple(BUDGETS)) -> Tuning:
    return Tuning(f"{name} r={rank}", "low rank", {"adapter": {"name": family, "rank": rank}}, places=places)


def _selective(name: str, **settings: Any) -> Tuning:
    return Tuning(name, "selective", settings)


TUNINGS = (
    _part("full", FULL, (*BUDGETS, TOGETHER)),
    _part("top:1"),
    _part("last:1"),
    _part("connector", places=VISION),
    _lora("LoRA", "lora", 8),
    _lora("DoRA", "dora", 8),
    _selective("magnitude 0.5", select="magnitude", density=0.5),
    _selective("SPIDER", select="fused", mask="soft", every=1),
    _selective("random 0.5", select="random", density=0.5),
    _part("llm+connector", places=VISION),
    _part("llm", places=VISION),
    Tuning("L2-SP 0.1", "regularised", {"l2_sp": 0.1}),
    Tuning("replay 1/4", "regularised", {"replay": UPSTREAM, "replay_ratio": 0.25}, uses="samples"),
    Tuning("distillation", "regularised", {"distill": 1.0}),
    _selective("gradient 0.1", select="gradient", density=0.1),
    _selective("random 0.1", select="random", density=0.1),
    _selective("half", select="half"),
    _part("vision", places=VISION),
    _lora("rsLoRA", "rslora", 8, TEXT),
    _lora("PiSSA", "pissa", 8, TEXT),
    Tuning("EWC 0.1", "regularised", {"l2_sp": 0.1, "fisher": FISHER}, uses="Fisher"),
    Tuning("EMA 0.95", "regularised", {"average": "ema", "ema_decay": 0.95}, places=TEXT),
    _lora("LoRA", "lora", 2, TEXT),
    _lora("LoRA", "lora", 32, TEXT),
    Tuning("LoRA r=8, connector", "low rank",
           {"adapter": {"name": "lora", "rank": 8}, "train": "llm+connector"}, places=VISION),
    Tuning("easy to hard", "order", {"curriculum": "easy"}, places=(TOGETHER,)),
    Tuning("common first", "order", {"curriculum": "common"}, places=(TOGETHER,)),
    Tuning("full, then linear", "blend", blend={"method": "linear"}),
    Tuning("full, then TIES 0.2", "blend", blend={"method": "ties", "density": 0.2}),
)  # fmt: skip


def tunings(place: str) -> tuple[Tuning, ...]:
    """Those that are tried in a world, or where its tasks are learned at once."""
    return tuple(one for one in TUNINGS if place in one.places)


def tuning_of(name: str) -> Tuning:
    """The way of that name."""
    return next(one for one in TUNINGS if one.name == name)
