"""Blends on a device: the bytes of the CPU, by operations that round alike everywhere; nothing left when they fail."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import torchgen
from merge_device import Late
from merge_memory import Workbench, noise
from merge_models import write
from torch.utils._python_dispatch import TorchDispatchMode

import ktmerge.merge.lanes
from ktmerge.checkpoints.reader import TensorReader
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend, blend_into, engine, general, source
from ktmerge.merge.pristine import DeviceReader, HostReader, Pristine
from ktmerge.merge.registry import find_method, methods, stages
from ktmerge.progress import Progress

TWO = {"a": ("a", 1.0), "b": ("b", 0.5)}
BLENDS: dict[str, dict[str, Any]] = {
    "ties": {"method": "ties", "density": 0.3, "scope": "global"},
    "dare": {"method": "dare_ties", "density": 0.4, "lambda": 0.9},
    "della": {"method": "della"},
    "slerp": {"method": "slerp"},
    "mixed": {"method": "swudi", "where": [{"class": "matrix", "match": "*mlp*", "method": "breadcrumbs"}]},
}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Late]:
    """Makes ``--device cuda`` a device that works late, with small pieces and buffers."""

    def make(device: Late, held: int = 0) -> Late:
        monkeypatch.setattr(engine, "choose_device", lambda wanted: wanted)
        monkeypatch.setattr("ktmerge.merge.blending.choose_device", lambda wanted: wanted)
        monkeypatch.setattr(ktmerge.merge.lanes, "Cuda", lambda name: device)
        monkeypatch.setattr(ktmerge.merge.lanes, "SLOT", 512)
        monkeypatch.setattr(source, "HELD", held)
        for module in (source, general):
            monkeypatch.setattr(module, "DEVICE_CHUNK", 300)
        monkeypatch.setenv("KTMERGE_KERNELS", "reference")  # what a device has: plain torch
        return device

    return make


@pytest.mark.every(7)
@pytest.mark.parametrize("kind", BLENDS)
@pytest.mark.parametrize(("seed", "held"), [(1, 0), (2, 1 << 20)])
def test_a_late_device_gives_the_bytes_of_the_cpu(
    kind: str, seed: int, held: int, llamas: Path, tmp_path: Path, recipe_in: Any, late: Callable[..., Late]
) -> None:
    recipe = recipe_in(llamas, TWO, BLENDS[kind], output={"rounding": "stochastic"}, seed=3)
    expected = blend(recipe, tmp_path / "cpu", device="cpu").out
    device = late(Late(seed, eager=True), held)
    assert blend(recipe, tmp_path / "late", device="cuda").out == expected
    assert device.rooms, "nothing was done there"


def test_what_is_not_finite_keeps_its_bits(tmp_path: Path, recipe_in: Any, late: Callable[..., Late]) -> None:
    """A NaN's sign and payload too, which conversions change, each device in its own way."""
    name = "model.norm.weight"
    base, tuned = torch.full((40,), 2.0, dtype=torch.bfloat16), torch.full((40,), 2.5, dtype=torch.bfloat16)
    base.view(torch.int16)[7:10] = torch.tensor([0x7F81, -0x41, 0x7F80], dtype=torch.int16)
    write(tmp_path / "base", {name: base})
    write(tmp_path / "a", {name: tuned})
    recipe = recipe_in(tmp_path, {"a": ("a", 1.0)}, {"method": "linear"}, output={"not_finite": "keep_base"})
    found = [blend(recipe, tmp_path / "cpu", device="cpu").out]
    late(Late(2, eager=True))
    found.append(blend(recipe, tmp_path / "cuda", device="cuda").out)
    assert found[0] == found[1]
    bits = loaded(tmp_path / "cuda")[name].view(torch.int16)
    assert bits[6:11].tolist() == [0x4020, 0x7F81, -0x41, 0x7F80, 0x4020]


class Model(torch.nn.Module):
    """Parameters under a checkpoint's names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, values in tensors.items():
            place: Any = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(place, step):
                    place.add_module(step, torch.nn.Module())
                place = getattr(place, step)
            place.register_parameter(last, torch.nn.Parameter(torch.zeros_like(values), requires_grad=False))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("pristine", [False, True])
def test_in_place_as_in_files(
    pristine: bool, llamas: Path, tmp_path: Path, recipe_in: Any, late: Callable[..., Late]
) -> None:
    recipe = recipe_in(llamas, TWO, BLENDS["ties"])
    blend(recipe, tmp_path / "out", device="cpu")
    late(Late(5, eager=True))
    wanted = loaded(tmp_path / "out")
    model = Model(wanted)
    blend_into(model, recipe, Pristine() if pristine else None, device="cuda")
    found = model.state_dict()
    assert all(found[name].equal(values) for name, values in wanted.items())


class Full(Late):
    """A device without memory."""

    def empty(self, count: int, dtype: torch.dtype, stream: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


class Lost(Late):
    """A device that cannot be used."""

    def pinned(self, size: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with `TORCH_USE_CUDA_DSA`")


class Stopped(Progress):
    """Somebody presses Ctrl-C."""

    @contextmanager
    def task(self, *_: Any) -> Iterator[Any]:
        class Thrice:
            count = 0

            def advance(self, amount: float) -> None:
                self.count += 1
                if self.count == 3:
                    raise KeyboardInterrupt

        yield Thrice()

    def note(self, text: str) -> None:
        pass


def _after(calls: int, whole: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    left = iter(range(calls))

    def fail(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise error
        return whole(*arguments)

    return fail


@pytest.mark.parametrize("failure", ["full", "lost", "disk", "input", "stop"])
def test_a_failure_leaves_nothing_behind(
    failure: str, llamas: Path, tmp_path: Path, recipe_in: Any, late: Callable[..., Late], monkeypatch: Any
) -> None:
    recipe = recipe_in(llamas, TWO, BLENDS["dare"])
    late({"full": Full, "lost": Lost}.get(failure, Late)(1, eager=True))
    said = {"full": "out of memory.*--device cpu", "lost": r"no kernel image is available\);.*--device cpu"}
    if failure in ("disk", "input"):
        owner, name = (Writer, "write_bytes") if failure == "disk" else (TensorReader, "read_into")
        monkeypatch.setattr(owner, name, _after(9, getattr(owner, name), KtmergeError(f"{failure} failed")))
    more: dict[str, Any] = {"progress": Stopped()} if failure == "stop" else {}
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt if failure == "stop" else KtmergeError, match=said.get(failure)):
        blend(recipe, tmp_path / "out", device="cuda", **more)
    assert set(threading.enumerate()) <= before
    assert not list(tmp_path.iterdir())


def test_copies_lie_on_the_device_while_half_of_it_stays_free(
    llamas: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktmerge.merge.planning import plan_blend

    plan = plan_blend(recipe_in(llamas, TWO, BLENDS["ties"]))
    monkeypatch.setattr("ktmerge.merge.pristine.DeviceReader", lambda tensors, host, device: "placed")
    for free, expected in [(2 * plan.base.nbytes, True), (2 * plan.base.nbytes - 1, False)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        found = Pristine("cuda").reader(plan, None)
        assert (found == "placed") is expected, type(found) in (DeviceReader, HostReader)


SAME = frozenset(
    """
    __and__ __lshift__ __or__ __rshift__ __xor__ abs add add_ alias all amax aminmax any arange argsort bitwise_and_
    bitwise_not bitwise_xor_ cat clamp clamp_ clone contiguous copy_ count_nonzero detach diagonal div div_ empty
    empty_like eq expand expand_as fill_ flip floor_divide frexp full_like gather ge gt index index_put_ is_nonzero
    isfinite item kthvalue le lift_fresh lt max maximum min minimum mul mul_ ne neg new_full new_zeros nonzero numpy_T
    ones_like pad pow reciprocal repeat_interleave reshape resolve_conj resolve_neg round round_ rsub scatter_ select
    sign slice split sqrt square squeeze stack sub sub_ to topk transpose unbind unsqueeze view view_as where zeros
    zeros_like copysign _to_copy _unsafe_view _local_scalar_dense constant_pad_nd
    """.split()  # noqa: SIM905
)
"""Operations that IEEE 754 gives one result, and those that round nothing."""
WHOLE = {"sum", "bincount", "cumsum", "remainder"}
"""The same everywhere if of integers."""
ELSEWHERE = {"_measure", "_chunk_of", "_take", "_observe_products"}
"""Functions whose sums go into reports, ask only whether something is finite, or are of whole numbers."""


class Watching(Late):
    """Knows of all operations that are asked of it: those that may round otherwise elsewhere, and the names of all."""

    def __init__(self) -> None:
        super().__init__(0, eager=True)
        self.asked: set[str] = set()
        self.otherwise: set[str] = set()

    def using(self, stream: Any) -> Any:
        return Spy(self)


class Spy(TorchDispatchMode):
    def __init__(self, device: Watching) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.device.asked.add(str(operation).removeprefix("aten.").removesuffix(".default"))
        if not _rounds_alike(operation.overloadpacket.__name__, args, kwargs):
            self.device.otherwise.add(f"{operation} {[one for one in args if isinstance(one, int | float)]}")
        return operation(*args, **kwargs)


def _rounds_alike(name: str, args: Any, kwargs: Any) -> bool:
    if name in ("div", "div_"):
        return isinstance(args[1], torch.Tensor)  # a GPU multiplies with the reciprocal of a number
    if kwargs.get("alpha", 1) not in (1, -1):
        return False  # one rounding or two
    if name == "pow":
        return args[1] in (2, 0.5)
    if name in SAME or (name in WHOLE and not args[0].is_floating_point()):
        return True
    frame: Any = sys._getframe(2)
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return not names.isdisjoint(ELSEWHERE)


def kernels() -> dict[str, bool]:
    """Of every operation of torch's list, whether there is a kernel for CUDA, or one for all devices."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    blocks = [one.split("\n- ")[0] for one in text.split("- func: ")[1:]]
    found = {block.split("(")[0]: block for block in blocks}

    def has(block: str) -> bool:
        if "structured_delegate: " in block:
            return has(found[block.split("structured_delegate: ")[1].split()[0]])
        return "dispatch:" not in block or "CUDA" in block or "Composite" in block

    return {name: has(block) for name, block in found.items()}


def choices(annotation: Any) -> Iterator[Any]:
    """What a parameter may be, where that is one of a few."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield from (True, False)
    else:
        for one in get_args(annotation):
            yield from choices(one)


def cases() -> Iterator[Any]:
    """Every method; every stage that sees elements, and every choice it leaves."""
    for name in methods():
        yield pytest.param({"method": name}, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name, stage in stages().items():
        if stage.reach == "element":
            found = [
                (key, one) for key, field in stage.parameters.model_fields.items() for one in choices(field.annotation)
            ]
            for chosen in [{}, *({key: value} for key, value in found)]:
                own: Any = {name: chosen} if stage.kind == "combine" else [{name: chosen}]
                used = {"stages": {"combine": "mean", stage.kind: own}}
                yield pytest.param(used, id=f"{name} {chosen}", marks=pytest.mark.slow)


QUICK = ("ties", "della_linear", "nuslerp", "fisher", "sce", "bitdelta")


@pytest.mark.every(3)
@pytest.mark.parametrize("wanted", cases())
def test_what_a_device_is_asked_rounds_alike_and_is_there(
    wanted: dict[str, Any], tmp_path: Path, late: Callable[..., Late], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Watching()
    late(device)
    monkeypatch.setattr(
        "merge_memory.execute", lambda plan, sink, _, **rest: engine.execute(plan, sink, "cuda", **rest)
    )
    most = find_method(wanted["method"]).experts[1] if "method" in wanted else None
    base = {name: values.bfloat16() for name, values in noise(0, 1.0).items()}
    experts = {
        name: {key: (base[key] + values).bfloat16() for key, values in noise(number + 1).items()}
        for number, name in enumerate("abc"[: min(3, most or 3)])
    }
    with suppress(UsageError):  # a choice that asks for others
        Workbench(tmp_path).blend(base, experts, wanted, chunk=32, output={"rounding": "stochastic"})
    assert not device.otherwise
    known = kernels()
    assert not {name for name in device.asked if not known[name]}


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("held", [pytest.param(held, marks=gpu) for held in (0, source.HELD)])
@pytest.mark.parametrize("kind", BLENDS)
def test_a_gpu_gives_the_bytes_of_the_cpu(
    kind: str, held: int, llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(llamas, TWO, BLENDS[kind], output={"rounding": "stochastic"}, seed=3)
    expected = blend(recipe, tmp_path / "cpu", device="cpu").out
    monkeypatch.setattr(source, "HELD", held)
    for module in (source, general):
        monkeypatch.setattr(module, "DEVICE_CHUNK", 300)
    monkeypatch.setattr(ktmerge.merge.lanes, "SLOT", 512)
    assert blend(recipe, tmp_path / "cuda", device="cuda").out == expected


@pytest.mark.parametrize("copies", [pytest.param(copies, marks=gpu) for copies in ("none", "cpu", "cuda")])
def test_in_place_on_a_gpu_as_in_files(copies: str, llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llamas, TWO, BLENDS["dare"])
    blend(recipe, tmp_path / "out", device="cpu")
    wanted = loaded(tmp_path / "out")
    model = Model(wanted).to("cuda")
    report = blend_into(model, recipe, None if copies == "none" else Pristine(copies))
    assert report.device.startswith("cuda")
    assert all(values.cpu().equal(wanted[name]) for name, values in model.state_dict().items())
