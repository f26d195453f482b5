"""The compiled kernels as machine code: made by numba once on a machine, kept on disk, called without loading numba.

A blend of a small model takes about a second; loading numba would take a third of it, loading its code a twentieth.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.merge.kernels import codes

Entry = Callable[..., int]

_NAMES = (
    "blend", "direct", "squares", "measure", "note", "sample", "rank_noted", "hash_noted", "rank_hashes", "energy",
    "rank", "words",
)  # fmt: skip
_MODULES = (
    "combining.py", "compiled.py", "compiler.py", "conversion.py", "counting.py", "deciding.py", "direct.py",
    "files.py", "gathering.py", "ordering.py", "randomness.py", "scanning.py", "settling.py", "transforming.py",
)  # fmt: skip
_SOURCES = (Path(codes.__file__), *(Path(__file__).with_name(name) for name in _MODULES))
# What numba's code would call to raise or to count references. The kernels do neither, but the linker wants them.
_UNUSED = (
    "NRT_Free", "NRT_MemInfo_call_dtor", "numba_do_raise", "numba_gil_ensure", "numba_gil_release",
    "numba_runtime_build_excinfo_struct", "numba_unpickle",
)  # fmt: skip
_ARGUMENTS = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "w": ctypes.c_uint32,
    "l": ctypes.c_uint64,
    "f": ctypes.c_float,
}
_ROWS, _STEPS, _COMBINE = "ppipi", "ipppppppp", "iip"
_SIGNATURES = {
    "blend": f"{_ROWS}ppii{_STEPS}{_COMBINE}piilppppp",
    "direct": f"ppppiii{_STEPS}{_COMBINE}piiliippp",
    "squares": f"{_ROWS}ppii{_STEPS}{_COMBINE}fppp",
    "measure": f"{_ROWS}ppii{_STEPS}ippippp",
    "note": f"{_ROWS}ppii{_STEPS}ippippppp",
    "sample": f"{_ROWS}ppii{_STEPS}ippp",
    "rank_noted": "piiwippp",
    "hash_noted": "ppiwlip",
    "rank_hashes": "piipp",
    "energy": "ppiipp",
    "rank": "ppliipppp",
    "words": "liipp",
}


class Native:
    """The kernels of `ktmerge.merge.kernels.compiled`, by the same names; arrays are passed as addresses."""

    blend: Entry
    direct: Entry
    squares: Entry
    measure: Entry
    note: Entry
    sample: Entry
    rank_noted: Entry
    hash_noted: Entry
    rank_hashes: Entry
    energy: Entry
    rank: Entry
    words: Entry

    def __init__(self, code: bytes) -> None:
        llvm = _llvm()
        nothing = ctypes.CFUNCTYPE(None)(_never)
        for name in _UNUSED:
            llvm.add_symbol(name, ctypes.cast(nothing, ctypes.c_void_p).value)
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._kept = nothing  # as long as the code that might call it
        for name in _NAMES:
            kind = ctypes.CFUNCTYPE(ctypes.c_int64, *(_ARGUMENTS[letter] for letter in _SIGNATURES[name]))
            setattr(self, name, kind(self._engine.get_function_address(_symbol(name))))


def native() -> Native | None:
    """The kernels, compiled first if this machine has not done so yet; None without numba or with
    ``KTMERGE_KERNELS=reference`` in the environment.
    """
    return None if os.environ.get("KTMERGE_KERNELS") == "reference" else _loaded()


@cache
def _loaded() -> Native | None:
    try:
        path = _path()
        code = _kept(path)
        if code is None:
            code = _compile()
            _keep(path, code)
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return None
    return Native(code)


def is_compiled() -> bool:
    """Whether `native` will not have to compile."""
    try:
        return _path().exists()
    except ModuleNotFoundError:
        return True


def _path() -> Path:
    """Where the code for this source, these compilers and this processor is."""
    return cache_folder() / "kernels" / f"{_identity()}.o"


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


def _compile() -> bytes:
    """Machine code of all entry points for this processor."""
    from numba import cfunc

    from ktmerge.merge.kernels.compiled import ENTRIES

    llvm = _llvm()
    module: Any = None
    for name, (function, signature) in ENTRIES.items():
        compiled = cfunc(signature, error_model="numpy")(function)
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
