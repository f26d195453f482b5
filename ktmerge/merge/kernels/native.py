"""The compiled kernels as machine code: made by numba once on a machine, kept on disk, called without loading numba.

A blend of a small model takes about a second; loading numba would take a third of it, loading its code a twentieth.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.merge.kernels import codes
from ktmerge.merge.kernels.codes import SIGNATURES

Entry = Callable[..., int]

GROUPS = {
    "blend": ("blend",),
    "elections": ("elect",),
    "energies": ("energy",),
    "thresholds": ("measure", "note", "sample", "tally", "rank_noted", "hash_noted", "rank_hashes"),
    "norms": ("squares",),
    "memory": ("direct",),
    "candidates": ("multi_tensor",),
    "choices": ("rank", "words"),
    "arrays": ("spread", "add_up", "tally_hashes", "select", "products"),
    "rules": ("rule",),
}
"""What is compiled together, when the first of it is asked for: a first blend need not wait for all."""
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
_MODULES = (
    "arrays.py", "bits.py", "blending.py", "combining.py", "compiled.py", "compiler.py", "conversion.py",
    "counting.py", "deciding.py", "electing.py", "files.py", "gathering.py", "multi_tensor.py", "ordering.py",
    "randomness.py", "ruling.py", "scanning.py", "settling.py", "transforming.py", "trimming.py", "vectors.py",
)  # fmt: skip
_SOURCES = (Path(codes.__file__), *(Path(__file__).with_name(name) for name in _MODULES))
# What numba's code would call to raise or to count references. The kernels do neither, but the linker wants them.
_UNUSED = (
    "NRT_Free", "NRT_MemInfo_call_dtor", "numba_do_raise", "numba_gil_ensure", "numba_gil_release",
    "numba_runtime_build_excinfo_struct", "numba_unpickle",
)  # fmt: skip
_ARGUMENTS: dict[str, Any] = {"i": ctypes.c_int64, "w": ctypes.c_uint32, "l": ctypes.c_uint64, "f": ctypes.c_float}


class Native:
    """The kernels of `ktmerge.merge.kernels.compiled`, by the same names; arrays are passed as addresses."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._nothing = ctypes.CFUNCTYPE(None)(_never)
        self._engines: list[Any] = []  # as long as the code that is in them

    def __getattr__(self, name: str) -> Entry:
        if name not in _GROUP_OF:
            raise AttributeError(name)
        with self._lock:
            if name not in self.__dict__:
                self._load(_GROUP_OF[name])
            entry: Entry = self.__dict__[name]
            return entry

    def _load(self, group: str) -> None:
        llvm = _llvm()
        for name in _UNUSED:
            llvm.add_symbol(name, ctypes.cast(self._nothing, ctypes.c_void_p).value)
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(_code(group)))
        engine.finalize_object()
        self._engines.append(engine)
        for name in GROUPS[group]:
            types = [_ARGUMENTS.get(letter, ctypes.c_void_p) for letter in SIGNATURES[name]]
            made = ctypes.CFUNCTYPE(ctypes.c_int64, *types)(engine.get_function_address(_symbol(name)))
            self.__dict__[name] = made


def native() -> Native | None:
    """The kernels, each compiled first if this machine has not done so yet; None without numba or with
    ``KTMERGE_KERNELS=reference`` in the environment.
    """
    return None if os.environ.get("KTMERGE_KERNELS") == "reference" else _loaded()


@cache
def _loaded() -> Native | None:
    found = {name for name in ("numba", "llvmlite") if find_spec(name) is not None}
    return Native() if "numba" in found or ("llvmlite" in found and is_compiled(*GROUPS)) else None


def is_compiled(*groups: str) -> bool:
    """Whether nothing of these will have to be compiled."""
    try:
        return all(_path(group).exists() for group in groups)
    except ModuleNotFoundError:
        return True


def _code(group: str) -> bytes:
    path = _path(group)
    code = _kept(path)
    if code is None:
        code = _compile(GROUPS[group])
        _keep(path, code)
    return code


def _path(group: str) -> Path:
    """Where the code for this source, these compilers and this processor is."""
    return cache_folder() / "kernels" / f"{_identity()}-{group}.o"


@cache
def _identity() -> str:
    llvm = _llvm()
    digest = hashlib.sha256()
    processor = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvm.get_default_triple())
    for text in (*processor, version("numba"), version("llvmlite"), *(path.read_text() for path in _SOURCES)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:32]


def _kept(path: Path) -> bytes | None:
    """Code from disk if it is whole: it begins with its own sha256."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    """Put code on disk, whole or not at all; a disk that does not take it costs only the next compilation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        pass


def _compile(names: Iterable[str]) -> bytes:
    """Machine code of some entry points for this processor."""
    from numba import cfunc

    from ktmerge.merge.kernels.compiled import ENTRIES, signature

    llvm = _llvm()
    module: Any = None
    for name in names:
        compiled = cfunc(signature(name), error_model="numpy")(ENTRIES[name])
        part = llvm.parse_assembly(compiled.inspect_llvm())
        part.get_function(compiled.native_name).name = _symbol(name)
        if module is None:
            module = part
        else:
            module.link_in(part)
    wanted = {function.name for function in module.functions if function.is_declaration}
    unknown = {name for name in wanted if not name.startswith(("llvm.", "Py")) and name not in (*_UNUSED, "pread")}
    if unknown:
        raise AssertionError(f"the kernels need {', '.join(sorted(unknown))}, which only numba's runtime has")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, reloc="pic", jit=True
    )
    code: bytes = machine.emit_object(module)
    return code


def _symbol(name: str) -> str:
    return f"ktmerge_{name}"


def _never() -> None:
    raise AssertionError("a compiled kernel asked numba's runtime for something")


@cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm
