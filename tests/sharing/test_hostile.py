"""What strangers may send: every one of these is refused in a sentence, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktmerge import api
from ktmerge.cli import _exit_code
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.sharing import contents
from ktmerge.sharing.contents import MANIFEST
from ktmerge.sharing.manifest import FileEntry

Change = Callable[[dict[str, Any]], None]


def good(place: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(place / "r.ktr") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(files: Mapping[str, bytes], where: Path) -> Path:
    """A zip by the standard library, not by ktmerge."""
    with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return where


def remade(place: Path, **changes: bytes) -> Path:
    """A bundle whose manifest agrees with files that were changed: only what they say can be refused."""
    names = {"recipe": contents.RECIPE, "lock": contents.LOCK, "suite": "suites/suite.yaml", "card": contents.CARD}
    files = good(place)
    files |= {names.get(name, name): raw for name, raw in changes.items()}
    manifest = json.loads(files[MANIFEST])
    manifest["files"] = {
        name: FileEntry.of(raw).model_dump() for name, raw in files.items() if name != MANIFEST
    }  # fmt: skip
    if "lock" in changes:
        locked = yaml.safe_load(files[contents.LOCK])
        manifest["inputs"] = {
            name: {"model": one["model"], "files": one["files"]} for name, one in locked["inputs"].items()
        }  # fmt: skip
    return written({**files, MANIFEST: json.dumps(manifest).encode()}, place / "bad.ktr")


def refused(bundle: Path, words: str = "") -> None:
    before = sorted(bundle.parent.parent.rglob("*"))
    with pytest.raises(UsageError, match=words or "."):
        api.unpack(bundle, bundle.parent / "out")
    assert sorted(bundle.parent.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "../evil.yaml", "/etc/evil.yaml", "suites/../../evil.yaml", "suites/../x.yaml", "C:/evil.yaml", "C:evil.yaml",
        "suites\\evil.yaml", "..\\evil.yaml", "\\\\server\\share.yaml", "suites/a/b.yaml", "suites//x.yaml",
        "./recipe.yaml", "suites/", "run.py", "recipe.yaml.exe", "scores/x.pkl", "suites/.hidden.yaml", ".git/config",
        "model.safetensors", "pytorch_model.bin", "delta/../x", "suites/x.yaml\n", "suites/x\u0000.yaml",
        "suites/ü.yaml",
        "suites/\u202etxt.yaml", "suites/x.yaml/", "~/x.yaml", "suites/" + "x" * 300 + ".yaml", "inner.ktr", "r.zip",
        "suites/x.yaml ", "suites/con:.yaml", " ", "/", "..", "suites", "suites/con.yaml", "suites/NUL.yaml",
        "scores/lpt1.x.json",
    ],
)  # fmt: skip
def test_names_that_no_bundle_has(place: Path, name: str) -> None:
    refused(written({**good(place), name: b"x"}, place / "bad.ktr"))
    assert not (place.parent / "evil.yaml").exists()


def test_a_folder_may_have_an_entry_of_its_own(place: Path) -> None:
    api.unpack(written({"suites/": b"", **good(place)}, place / "bad.ktr"), "out")
    assert Path("out/suites/suite.yaml").is_file()


def test_a_second_name_beside_the_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As newer zip libraries take it from an extra field."""
    decoded = zipfile.ZipInfo._decodeExtra  # type: ignore[attr-defined]

    def renaming(info: zipfile.ZipInfo, *rest: Any) -> None:
        decoded(info, *rest)
        if info.filename == "README.md":
            info.filename = "../evil.md"

    monkeypatch.setattr(zipfile.ZipInfo, "_decodeExtra", renaming)
    refused(place / "r.ktr", "two names")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["recipe.yaml", "RECIPE.yaml", "Suites/suite.yaml", "suites/SUITE.yaml", "readme.md"])
def test_names_twice_or_in_another_case(place: Path, twin: str) -> None:
    with zipfile.ZipFile(place / "r.ktr", "a") as archive:
        archive.writestr(twin, "x")
    refused(place / "r.ktr")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFDIR])
def test_links_and_devices(place: Path, kind: int) -> None:
    files = good(place)
    with zipfile.ZipFile(place / "bad.ktr", "w") as archive:
        for name, raw in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((kind if name == "README.md" else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, b"/etc/passwd" if name == "README.md" else raw)
    refused(place / "bad.ktr", "link or a device")


def test_links_in_a_folder(place: Path) -> None:
    api.unpack("r.ktr", "theirs")
    Path("theirs/README.md").unlink()
    Path("theirs/README.md").symlink_to(place / "base" / "config.json")
    with pytest.raises(UsageError, match="link or a device"):
        api.look("theirs")
    Path("theirs/README.md").unlink()
    os.mkfifo("theirs/README.md")
    with pytest.raises(UsageError, match="link or a device"):
        api.look("theirs")
    Path("theirs/README.md").unlink()
    Path("theirs/suites").rename("elsewhere")
    Path("theirs/suites").symlink_to("../elsewhere")
    with pytest.raises(UsageError):
        api.unpack("theirs", "out")
    assert not Path("out").exists()


def test_a_manifest_that_is_none_once_it_was_shown(place: Path) -> None:
    api.unpack("r.ktr", "theirs")
    offer = api.look("theirs")
    Path("theirs", MANIFEST).write_text("{}")
    with pytest.raises(UsageError, match="no manifest of a bundle"):
        api.unpack(offer, "out")
    assert not Path("out").exists()


def test_bombs_by_ratio(place: Path) -> None:
    refused(written({**good(place), "scores/bomb.json": b"0" * 30_000_000}, place / "bad.ktr"), "grows from")


def test_bombs_by_size(place: Path) -> None:
    refused(written({**good(place), contents.CARD: os.urandom(1_000_001)}, place / "bad.ktr"), "at most 1000000")
    refused(remade(place, recipe=b"#" + os.urandom(800_000).hex().encode()), "at most 1000000")


@pytest.mark.slow
def test_bombs_by_number(place: Path) -> None:
    many = {f"suites/s{number}.yaml": b"x" for number in range(contents.MAX_FILES)}
    refused(written({**good(place), **many}, place / "bad.ktr"), "more than 128 files")
    crowd = {f"suites/s{number}.yaml": b"" for number in range(20_000)}
    refused(written({**good(place), **crowd}, place / "bad.ktr"), "more than 128 files")


def patched(bundle: Path, name: str, **fields: int) -> Path:
    """A zip whose local and central headers of one entry lie."""
    raw = bytearray(bundle.read_bytes())
    central = {"crc": (16, "<L"), "packed": (20, "<L"), "size": (24, "<L"), "method": (10, "<H"), "flags": (8, "<H"), "at": (42, "<L")}  # fmt: skip  # noqa: E501
    local = {"crc": (14, "<L"), "packed": (18, "<L"), "size": (22, "<L"), "method": (8, "<H"), "flags": (6, "<H")}
    place = raw.index(b"PK\x01\x02")
    while raw[place + 46 : place + 46 + len(name)] != name.encode():
        place = raw.index(b"PK\x01\x02", place + 4)
    start = struct.unpack_from("<L", raw, place + 42)[0]
    for key, value in fields.items():
        struct.pack_into(central[key][1], raw, place + central[key][0], value)
        if key in local:
            struct.pack_into(local[key][1], raw, start + local[key][0], value)
    out = bundle.with_name("bad.ktr")
    out.write_bytes(raw)
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 10}, {"size": 900_000}, {"packed": 10}, {"packed": 1 << 30}, {"method": 0}, {"method": 12},
        {"method": 14}, {"method": 99}, {"flags": 1}, {"flags": 0x41}, {"crc": 5}, {"at": 0}, {"at": 1 << 31},
        {"size": 0xFFFFFFFF},
    ],
)  # fmt: skip
def test_headers_that_lie(place: Path, fields: dict[str, int]) -> None:
    refused(patched(place / "r.ktr", "recipe.yaml", **fields))


@pytest.mark.parametrize(
    ("offset", "kind", "value"),
    [(6, "<H", 0x800), (8, "<H", 0), (14, "<L", 5), (18, "<L", 7), (22, "<L", 10), (28, "<H", 60_000)],
)
def test_a_header_of_its_own_that_says_otherwise(place: Path, offset: int, kind: str, value: int) -> None:
    """Flags, method, checksum, sizes and room of an entry as programs read them that go from its start."""
    raw = bytearray((place / "r.ktr").read_bytes())
    with zipfile.ZipFile(place / "r.ktr") as archive:
        start = archive.getinfo("recipe.yaml").header_offset
    struct.pack_into(kind, raw, start + offset, value)
    (place / "bad.ktr").write_bytes(raw)
    refused(place / "bad.ktr", "contradict each other|shares bytes")


def test_sizes_may_follow_the_bytes(place: Path) -> None:
    """As programs write them that cannot go back in what they write."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

        def tell(self) -> int:
            raise io.UnsupportedOperation

    stream = Pipe()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in good(place).items():
            archive.writestr(name, raw)
    (place / "piped.ktr").write_bytes(stream.getvalue())
    assert api.unpack("piped.ktr", "out").out.is_dir()


def test_bytes_that_reach_into_the_table_of_contents(place: Path) -> None:
    with zipfile.ZipFile(place / "r.ktr") as archive:
        last = max(archive.infolist(), key=lambda info: info.header_offset)
    refused(patched(place / "r.ktr", last.filename, packed=last.compress_size + 20), "share bytes")


def test_real_size_beyond_what_all_headers_tell(place: Path) -> None:
    """The data hold a megabyte, headers and manifest say a hundred bytes."""
    files = good(place)
    big = written({**files, contents.CARD: b"a" * 900_000}, place / "big.ktr")
    lying = patched(big, contents.CARD, size=100)
    refused(lying)


def test_something_before_after_and_between(place: Path) -> None:
    raw = (place / "r.ktr").read_bytes()
    for changed in (
        b"#!/bin/sh\n" + raw,
        raw + b"more",
        raw + raw,
        raw[:-1],
        raw[: len(raw) // 2],
        b"",
        b"PK",
        raw[:-22],
    ):
        (place / "bad.ktr").write_bytes(changed)
        refused(place / "bad.ktr")
    with zipfile.ZipFile(place / "r.ktr", "a") as archive:
        archive.comment = b"PK\x05\x06" + b"\0" * 18
    refused(place / "r.ktr", "is no bundle")


def test_entries_that_share_bytes(place: Path) -> None:
    raw = (place / "r.ktr").read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        first, second = (archive.getinfo(name).header_offset for name in ("recipe.lock.yaml", "recipe.yaml"))
    assert first < second
    refused(patched(place / "r.ktr", "recipe.yaml", at=first))


def test_tables_of_contents_that_lie(place: Path) -> None:
    raw = bytearray((place / "r.ktr").read_bytes())
    for offset, kind, value in ((8, "<H", 1), (10, "<H", 60_000), (12, "<L", 1 << 30), (16, "<L", 0), (4, "<H", 1)):
        changed = bytearray(raw)
        struct.pack_into(kind, changed, len(raw) - 22 + offset, value)
        (place / "bad.ktr").write_bytes(changed)
        refused(place / "bad.ktr")


def end_of(raw: bytes) -> tuple[int, ...]:
    """Entries here and in all, and the bytes and the place of the table of contents, as the end tells."""
    return struct.unpack("<4H2L", raw[-18:-2])[2:]


@pytest.mark.parametrize(
    "told",
    [{"count": 1, "here": 1}, {"length": 46}, {"begin": 0}, {"count": 0xFFFF}],
    ids=lambda told: next(iter(told)),
)
def test_two_tables_of_contents(place: Path, told: dict[str, int]) -> None:
    """Programs that read wide ends go by one, others by the other."""
    raw = (place / "r.ktr").read_bytes()
    names = ("here", "count", "length", "begin")
    true = dict(zip(names, end_of(raw), strict=True))
    wide = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, *true.values())
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, len(raw) - 22, 1)
    (place / "bad.ktr").write_bytes(
        raw[:-22] + wide + locator + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, *{**true, **told}.values(), 0)
    )
    if told == {"count": 0xFFFF}:  # it stands in the wide end alone
        assert api.unpack(place / "bad.ktr", "out").out.is_dir()
    else:
        refused(place / "bad.ktr", "its ends contradict each other")


def test_more_entries_than_the_end_tells(place: Path) -> None:
    raw = bytearray((place / "r.ktr").read_bytes())
    count = end_of(raw)[0]
    struct.pack_into("<2H", raw, len(raw) - 14, count - 1, count - 1)
    (place / "bad.ktr").write_bytes(raw)
    refused(place / "bad.ktr", "has other entries than it says")


def test_something_hidden_behind_an_entry(place: Path) -> None:
    raw = (place / "r.ktr").read_bytes()
    here, count, length, begin = end_of(raw)
    hidden = raw[begin:-22]  # as another table of contents would be
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, here, count, length, begin + len(hidden), 0)
    (place / "bad.ktr").write_bytes(raw[:begin] + hidden + raw[begin:-22] + end)
    refused(place / "bad.ktr", "or hides some behind it")


def test_nested_zips_are_not_opened(place: Path) -> None:
    inner = (place / "r.ktr").read_bytes()
    refused(remade(place, **{"scores/inner.json": inner}), "is no JSON")
    refused(remade(place, **{"scores/twice.json": b'{"ktmerge_eval": 1, "ktmerge_eval": 2}'}), "has a key twice")
    refused(written({"inner.ktr": inner}, place / "bad.ktr"), "no file of a bundle")


def bombs() -> dict[str, bytes]:
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    return {
        "aliases": laughs.encode(),
        "merges": b"a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nktmerge: 1\n",
        "itself": b"a: &a [*a]\n",
        "deep": b"[" * 1_000,
        "code": b'ktmerge: 1\nname: !!python/object/apply:os.system ["touch owned"]\n',
        "binary": os.urandom(2000),
        "digits": b"ktmerge: " + b"9" * 5000,
        "date": b"ktmerge: 1\nname: 2001-99-99\n",
        "twice": b"ktmerge: 1\nktmerge: 1\n",
        "list": b"[1, 2]",
        "nothing": b"",
        "several": b"ktmerge: 1\n---\nktmerge: 1\n",
    }


@pytest.mark.slow
@pytest.mark.parametrize("which", ["recipe", "lock", "suite"])
@pytest.mark.parametrize("bomb", sorted(bombs()))
def test_yaml_bombs(place: Path, which: str, bomb: str) -> None:
    files = good(place)
    name = {"recipe": contents.RECIPE, "lock": contents.LOCK, "suite": "suites/suite.yaml"}[which]
    manifest = json.loads(files[MANIFEST])
    files[name] = bombs()[bomb]
    manifest["files"][name] = FileEntry.of(files[name]).model_dump()
    refused(written({**files, MANIFEST: json.dumps(manifest).encode()}, place / "bad.ktr"))
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("./base.sha256-", "./base.sha256-0", "locked is"),
        ("base: ./base", "base: /base", "locked is"),
        ("model: ./spam", "model: ../spam", "locked is"),
        ("weight: 0.5", "weight: .nan", "weight"),
        ("blend:", "__import__: os\nblend:", "unknown key"),
        ("blend:", "_target_: os.system\nblend:", "unknown key"),
        ("suites/suite.yaml", "../suite.yaml", "is not in the bundle"),
        ("suites/suite.yaml", "/etc/passwd", "is not in the bundle"),
        ("suites/suite.yaml", "recipe.lock.yaml", "is not in the bundle"),
        ("blend:", "statistics: /etc\nblend:", "statistics of base"),
        ("blend:", "statistics: {data: /etc/passwd}\nblend:", "statistics of base"),
        ("blend:", "finetune: {experts: {spam: {data: /etc/passwd}}}\nblend:", "how to fine-tune"),
        ("name: half-of-spam", "name: other", "manifest is of another recipe"),
        ("name: half-of-spam", "name: ../x", "name"),
        ("ktmerge: 1", "ktmerge: 99", "99"),
        ("method: linear", "method: os.system", "there is no method"),
        ("method: linear", "method: linear\n  where: [{part: 'llm.layers[x]', lambda: 1}]", "part"),
    ],
)
def test_recipes_that_reach_out(place: Path, old: str, new: str, words: str) -> None:
    text = good(place)[contents.RECIPE].decode()
    assert old in text
    refused(remade(place, recipe=text.replace(old, new).encode()), words)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "reference", ["org/model", "org/model@main", "org/model@0123456", "/tmp/model", "./model", "runs/x"]
)
def test_models_that_are_not_pinned(place: Path, reference: str) -> None:
    """Recipe, lock and manifest agree, and still name a model that could become another."""
    files = good(place)
    locked = yaml.safe_load(files[contents.LOCK])
    recipe = yaml.safe_load(files[contents.RECIPE])
    locked["inputs"]["base"]["model"] = recipe["base"] = reference
    changes = {"lock": yaml.safe_dump(locked).encode(), "recipe": yaml.safe_dump(recipe).encode()}
    refused(remade(place, **changes), "could become another model")


@pytest.mark.parametrize(
    "data",
    [
        "/etc/passwd",
        "../../secret.jsonl",
        "~/.ssh/id_rsa",
        "a/../../b",
        "C:/x",
        "a\\b",
        "hf:../x",
        "hf:/etc",
        "x\x07",
        "file:///etc/passwd",
        "",
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("key", ["data", "images"])
def test_suites_that_read_elsewhere(place: Path, data: str, key: str) -> None:
    suite = yaml.safe_load(good(place)["suites/suite.yaml"])
    suite["upstream"][0] |= {key: data, **({"image": "i"} if key == "images" else {})}
    refused(remade(place, suite=yaml.safe_dump(suite).encode()))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(ktmerge_bundle=2),
        lambda m: m.update(ktmerge_bundle=True),
        lambda m: m.update(ktmerge_bundle="1"),
        lambda m: m.update(more=1),
        lambda m: m["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({MANIFEST: {"size": 1, "sha256": "0" * 64}}),
        lambda m: m["files"]["README.md"].update(size=-1),
        lambda m: m["files"]["README.md"].update(size=1 << 60),
        lambda m: m["files"]["README.md"].update(size=1.5),
        lambda m: m["files"]["README.md"].update(sha256="zz"),
        lambda m: m["files"]["README.md"].update(sha256="0" * 64),
        lambda m: m["files"].pop("README.md"),
        lambda m: m["files"].pop("recipe.yaml"),
        lambda m: m["inputs"].pop("spam"),
        lambda m: m["inputs"]["base"]["files"].pop("config.json"),
        lambda m: m["inputs"]["base"].update(model="org/x@" + "0" * 40),
        lambda m: m.update(inputs={}),
        lambda m: m.update(name="\x1b[2J"),
        lambda m: m.update(statistics={"base": "0" * 64}),
        lambda m: m.update(files=[]),
    ],
)
def test_manifests_that_lie(place: Path, change: Change) -> None:
    files = good(place)
    manifest = json.loads(files[MANIFEST])
    change(manifest)
    refused(written({**files, MANIFEST: json.dumps(manifest).encode()}, place / "bad.ktr"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[" * 100_000, b"\xff", b"null", b'{"ktmerge_bundle": 1e999}', b"9" * 9000, b'{"name": 1, "name": 2}'],
)
def test_manifests_that_are_none(place: Path, raw: bytes) -> None:
    refused(written({**good(place), MANIFEST: raw}, place / "bad.ktr"), "manifest|JSON|broken")


@pytest.mark.parametrize(
    "change",
    [
        lambda lock: lock.update(inputs={}),
        lambda lock: lock["inputs"]["base"].update(files={"x": "y"}),
        lambda lock: lock["inputs"]["base"]["files"].update({"config.json": {"size": 1, "sha256": "0" * 64}}),
        lambda lock: lock.update(output=3),
        lambda lock: lock.update(ktmerge_lock=9),
        lambda lock: lock.pop("coefficients"),
    ],
)
def test_locks_that_lie(place: Path, change: Change) -> None:
    files = good(place)
    locked = yaml.safe_load(files[contents.LOCK])
    change(locked)
    manifest = json.loads(files[MANIFEST])
    files[contents.LOCK] = yaml.safe_dump(locked).encode()
    manifest["files"][contents.LOCK] = FileEntry.of(files[contents.LOCK]).model_dump()
    refused(written({**files, MANIFEST: json.dumps(manifest).encode()}, place / "bad.ktr"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lock: lock["recipe"]["blend"].update({"lambda": 0.1}), r"\(blend\)"),
        (lambda lock: lock["recipe"]["experts"]["spam"].update(weight=0.1), r"\(experts\)"),
        (lambda lock: lock["recipe"].update(seed=1), r"\(seed\)"),
        (lambda lock: lock["recipe"].update(base="org/name@main"), r"\(base\)"),
        (lambda lock: lock["recipe"].update(description="another"), r"\(description\)"),
        (lambda lock: lock["random"].update(seed=1), r"\(random\)"),
        (lambda lock: lock["recipe"].update(run="x"), "run"),
        (lambda lock: lock["recipe"].clear(), "lock"),
    ],
)
def test_locks_that_contradict_the_recipe(place: Path, change: Change, words: str) -> None:
    """Though they pin the same files: `recipe diff` goes by what they tell."""
    locked = yaml.safe_load(good(place)[contents.LOCK])
    change(locked)
    refused(remade(place, lock=yaml.safe_dump(locked).encode()), words)


@pytest.mark.slow
def test_deltas_that_lie(place: Path) -> None:
    api.pack("recipe.yaml", "d.ktr", with_deltas=True)
    with zipfile.ZipFile("d.ktr") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    told = json.loads(files["delta/delta.json"])

    def bundle(change: Mapping[str, bytes], stored: bool = True) -> Path:
        changed = {**files, **change}
        manifest = json.loads(files[MANIFEST])
        manifest["files"] = {
            name: FileEntry.of(raw).model_dump() for name, raw in changed.items() if name != MANIFEST
        }  # fmt: skip
        changed[MANIFEST] = json.dumps(manifest).encode()
        with zipfile.ZipFile("bad.ktr", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, raw in changed.items():
                plain = stored and name == "delta/delta.bin"
                archive.writestr(name, raw, zipfile.ZIP_STORED if plain else zipfile.ZIP_DEFLATED)
        return place / "bad.ktr"

    assert api.unpack(bundle({}), "fine").out.is_dir()
    refused(bundle({}, stored=False), "compressed twice")
    refused(bundle({"delta/delta.bin": b"x"}), "cut short")
    refused(bundle({"delta/delta.json": b"{}"}), "manifest of a delta")
    others = {"../../evil": {"size": 1, "sha256": "", "blob": [0, 1]}}
    refused(bundle({"delta/delta.json": json.dumps({**told, "others": others}).encode()}), "outside of the delta")
    for name, words in (
        (".git/config", "is hidden"), ("a/.x/y.json", "is hidden"), ("modeling.py", "no code"), ("x.so", "no code"),
    ):  # fmt: skip
        others = {**told["others"], name: {"size": 1, "sha256": "0" * 64, "blob": [0, 1]}}
        refused(bundle({"delta/delta.json": json.dumps({**told, "others": others}).encode()}), words)
    lossy = {**told, "exact": False}
    refused(bundle({"delta/delta.json": json.dumps(lossy).encode()}), "does not say that its recipe gave the model")
    base = {**told["base"], "headers": "0" * 64}
    refused(bundle({"delta/delta.json": json.dumps({**told, "base": base}).encode()}), "another base")


def test_a_delta_of_another_model_than_the_recipes(place: Path) -> None:
    """All of it agrees with itself, but for what the recipe is known to have given."""
    api.pack("recipe.yaml", "d.ktr", with_deltas=True)
    api.unpack("d.ktr", "theirs")
    api.apply_delta("base", "theirs/delta", "good")
    api.blend("recipe.yaml", "blended")
    assert (place / "good/model.safetensors").read_bytes() == (place / "blended/model.safetensors").read_bytes()
    api.export_delta("base", "base", "theirs/delta", overwrite=True)
    with pytest.raises(UsageError, match=r"gives another .* than the lock beside it says"):
        api.apply_delta("base", "theirs/delta", "evil")
    lock = place / "theirs" / contents.LOCK
    lock.write_text(lock.read_text().replace("    model.safetensors: ", "    /dev/zero: "))
    with pytest.raises(UsageError, match="gives another /dev/zero than"):  # nor is it read to its end
        api.apply_delta("base", "theirs/delta", "evil")
    assert not (place / "evil").exists()
    api.export_delta("base", "base", "alone")
    assert api.apply_delta("base", "alone", "copy").out.is_dir()


def test_words_cannot_steer_the_terminal(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(good(place)[contents.RECIPE])
    recipe["description"] = "\x1b[2J\x1b]0;owned\x07 [red]fine[/red]"
    locked = yaml.safe_load(good(place)[contents.LOCK])
    locked["recipe"]["description"] = recipe["description"]
    bundle = remade(place, recipe=yaml.safe_dump(recipe).encode(), lock=yaml.safe_dump(locked).encode())
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = {**json.loads(files[MANIFEST]), "description": recipe["description"]}
    written({**files, MANIFEST: json.dumps(manifest).encode()}, bundle)
    assert _exit_code(["recipe", "unpack", str(bundle), "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "[red]fine" in said


@pytest.mark.parametrize("words", ["\x1b]0;owned\x07", "\x9b2J", "a\x08b"])
@pytest.mark.parametrize("card", [contents.CARD, contents.MODEL_CARD])
def test_cards_cannot_steer_the_terminal_that_shows_them(place: Path, card: str, words: str) -> None:
    refused(remade(place, **{card: f"# A card\n{words}".encode()}), "control characters")


def test_names_of_models_stay_in_their_line(place: Path) -> None:
    files = good(place)
    manifest = json.loads(files[MANIFEST])
    manifest["inputs"]["x\nwritten  out"] = manifest["inputs"].pop("spam")
    offer = api.look(written({**files, MANIFEST: json.dumps(manifest).encode()}, place / "bad.ktr"))
    cells = [offer.downloads(), *(cell for row in (*offer.models()[1], *offer.digests()[1]) for cell in row)]
    assert sum(r"x\nwritten  out" in cell for cell in cells) >= 3
    assert not any("\n" in cell for cell in cells)


def test_a_strangers_name_replaces_nothing_else(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base").rename("half-of-spam")  # as the recipe is called
    pull = ["recipe", "pull", "r.ktr", "--yes", "--overwrite"]
    assert _exit_code(pull) == 2
    assert "half-of-spam: holds something else than a recipe; say with --out" in capsys.readouterr().err
    assert Path("half-of-spam/model.safetensors").is_file()
    Path("half-of-spam").rename("base")
    assert [_exit_code(pull) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("what", ["file", "key", "twice", "base", "suite", "data"])
def test_words_cannot_begin_a_line_of_their_own(place: Path, what: str) -> None:
    words, files = "x\nwritten  out", good(place)
    recipe, suite = (yaml.safe_load(files[name]) for name in (contents.RECIPE, "suites/suite.yaml"))
    if what == "file":
        bundle = written({**files, f"suites/{words}.yaml": b"x"}, place / "bad.ktr")
    elif what == "data":
        suite["upstream"][0]["data"] = f"../{words}"
        bundle = remade(place, suite=yaml.safe_dump(suite).encode())
    elif what == "twice":
        bundle = remade(place, recipe=b'"x\\nwritten  out": 1\n"x\\nwritten  out": 2\n')
    else:
        changes = {"key": {words: 1}, "base": {"base": words}, "suite": {"eval": {"suite": words}}}
        bundle = remade(place, recipe=yaml.safe_dump({**recipe, **changes[what]}).encode())
    with pytest.raises(UsageError, match=r"x\\nwritten  out") as caught:
        api.unpack(bundle, "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("subset", ["../..", "/etc", "~"])
@pytest.mark.parametrize("join", [False, True])
def test_subsets_are_no_way_out(place: Path, subset: str, join: bool) -> None:
    suite = yaml.safe_load(good(place)["suites/suite.yaml"])
    task = suite["upstream"][0]
    if join:
        task["join"] = {"data": "more", "by": "a", "key": "b"}
    (task["join"] if join else task)["subset"] = subset
    refused(remade(place, suite=yaml.safe_dump(suite).encode()), "a task's subset is")


def test_what_is_no_file(place: Path) -> None:
    os.mkfifo("pipe.ktr")
    for reference in ("pipe.ktr", "base", "/dev/zero", "recipe.yaml", "nothing.ktr", "", "x" * 5000, "~nobody/x"):
        with pytest.raises(KtmergeError):
            api.look(reference)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_a_bundle_can_be_changed_unseen(packed_once: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes are replaced, what is unpacked is what was packed, or nothing."""
    raw = bytearray((packed_once / "r.ktr").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        raw[start : start + len(piece)] = piece
    number = len(list(tmp_path.iterdir()))
    bundle, out = tmp_path / f"{number}.ktr", tmp_path / f"{number}-out"
    bundle.write_bytes(raw)
    try:
        api.unpack(bundle, out)
    except KtmergeError:
        assert not out.exists()
        return
    with zipfile.ZipFile(packed_once / "r.ktr") as archive:
        wanted = {name: archive.read(name) for name in archive.namelist()}
    assert {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()} == wanted
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o111 == 0 for path in out.rglob("*") if path.is_file())
