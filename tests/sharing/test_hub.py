"""Push and pull through huggingface_hub itself, to and from a hub on this machine."""

from __future__ import annotations

from pathlib import Path
from socketserver import BaseRequestHandler
from typing import Any

import pytest
from hub_server import Failure, Repository, served

from ktmerge import api
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.sharing.contents import MANIFEST
from ktmerge.sharing.hub import seen


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_repository_of_its_own(place: Path, hub: Any) -> None:
    pushed = api.push("recipe.yaml", "me/half")
    repository = hub.state.repositories["me/half"]
    assert pushed.to == f"me/half@{repository.branches['main']}"
    api.unpack("r.ktr", "theirs")
    there = repository.commits[repository.branches["main"]]
    assert {name: raw for name, raw in there.items() if name != ".gitattributes"} == files_of(place / "theirs")
    offer = api.look("me/half")
    assert offer.where == pushed.to
    api.unpack(offer, "pulled")
    assert files_of(place / "pulled") == files_of(place / "theirs")


@pytest.mark.slow
def test_what_was_shown_is_what_is_fetched(place: Path, hub: Any) -> None:
    api.push("r.ktr", "me/half")
    offer = api.look("me/half@main")
    first = files_of(place / "base")
    api.push("recipe.yaml", "me/half", overrides=["blend.lambda=0.25"])
    api.unpack(offer, "old")
    assert "lambda" not in (place / "old" / "recipe.yaml").read_text()
    api.unpack(api.look("me/half"), "new")
    assert "lambda: 0.25" in (place / "new" / "recipe.yaml").read_text()
    old = offer.where.partition("@")[2]
    assert files_of(place / "old") == files_of(api.unpack(api.look(f"me/half@{old}"), "again").out)
    assert files_of(place / "base") == first


def test_nothing_but_the_manifest_is_fetched_before_it_was_shown(
    place: Path, hub: Any, ktmerge: Any, capsys: Any
) -> None:
    api.push("r.ktr", "me/half")
    hub.state.seen.clear()
    assert ktmerge("recipe", "pull", "me/half") == 2
    fetched = [path for method, path, _ in hub.state.seen if method == "GET" and "/resolve/" in path]
    assert len(fetched) == 1
    assert fetched[0].endswith(MANIFEST)
    said = capsys.readouterr()
    assert "add --yes" in said.err
    for word in ("half-of-spam", "suites/suite.yaml", "base/model.safetensors", "yours to give"):
        assert word in said.out
    assert not (place / "half-of-spam").exists()
    assert ktmerge("recipe", "pull", "me/half", "--yes") == 0
    assert (place / "half-of-spam" / "recipe.yaml").is_file()


@pytest.mark.slow
def test_into_a_models_repository(place: Path, hub: Any) -> None:
    model = {"model.safetensors": b"weights", "README.md": b"the model's own", "config.json": b"{}"}
    hub.state.repositories["org/model"] = Repository()
    hub.state.repositories["org/model"].commit(model)
    with pytest.raises(UsageError, match=r"holds something else than a recipe; put the recipe into it with --into"):
        api.push("r.ktr", "org/model")
    pushed = api.push("r.ktr", into="org/model")
    there = hub.state.repositories["org/model"].commits[pushed.to.partition("@")[2]]
    assert {name: raw for name, raw in there.items() if "/" not in name} == model
    for reference, into in (("org/model", None), ("", "org/model")):
        out = api.unpack(api.look(reference, into=into), f"from-{bool(into)}").out
        assert files_of(out)["recipe.yaml"] == there["ktmerge-recipe/recipe.yaml"]
    with pytest.raises(UsageError, match="org/none: is not on the hub"):
        api.push("r.ktr", into="org/none")
    hub.state.repositories["org/other"] = Repository()
    hub.state.repositories["org/other"].commit(model)
    with pytest.raises(UsageError, match="org/other: has no recipe"):
        api.look("org/other")


@pytest.mark.slow
def test_what_a_bundle_no_longer_has_goes(place: Path, hub: Any) -> None:
    api.push("recipe.yaml", "me/half", with_deltas=True)
    repository = hub.state.repositories["me/half"]
    assert "delta/delta.bin" in repository.commits[repository.branches["main"]]
    offer = api.look("me/half")
    api.unpack(offer, "with")
    api.apply_delta("base", "with/delta", "made")
    api.blend("recipe.yaml", "blended")
    assert (place / "made" / "model.safetensors").read_bytes() == (place / "blended" / "model.safetensors").read_bytes()
    api.push("r.ktr", "me/half")
    assert not [name for name in repository.commits[repository.branches["main"]] if name.startswith("delta/")]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/create"), ("GET", "/api/models/"), ("POST", "/preupload/"), ("POST", "/commit/"), ("PUT", "/lfs/")],
)
@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
def test_a_push_waits_for_a_busy_hub(place: Path, hub: Any, method: str, path: str, status: int) -> None:
    hub.state.failures.append(Failure(method, path, status, 1, {"Retry-After": "0"}))
    api.push("recipe.yaml", "me/half", with_deltas=path == "/lfs/")
    assert hub.state.failures[0].times == 0
    assert "recipe.yaml" in hub.state.repositories["me/half"].commits[api.look("me/half").where.partition("@")[2]]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/models/"), ("HEAD", "/resolve/"), ("GET", "recipe.lock.yaml")]
)
@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_pull_waits_for_a_busy_hub(place: Path, hub: Any, method: str, path: str, status: int) -> None:
    api.push("r.ktr", "me/half")
    hub.state.failures.append(Failure(method, path, status, 1, {"Retry-After": "0"}))
    api.unpack(api.look("me/half"), "pulled")
    assert hub.state.failures[0].times == 0


@pytest.mark.slow
@pytest.mark.parametrize("cut", [100, -100], ids=["ended", "torn"])
def test_a_broken_download_goes_on_where_it_stopped(
    place: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50)  # what comes in less is not kept
    api.push("r.ktr", "me/half")
    hub.state.cuts["recipe.lock.yaml"] = [cut]
    api.unpack(api.look("me/half"), "pulled")
    asked = hub.state.requests("GET", "recipe.lock.yaml")
    assert len(asked) == 2  # what was on its way when the connection was torn is lost
    assert cut < 0 or asked[1]["Range"] == "bytes=100-"


@pytest.mark.slow
def test_refusals_are_sentences(place: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    api.push("r.ktr", "me/half")
    with pytest.raises(UsageError, match="me/none: is not on the hub, or is private"):
        api.look("me/none")
    with pytest.raises(UsageError, match="has no revision 'v9' on the hub"):
        api.look("me/half@v9")
    with pytest.raises(UsageError, match="has no revision 'v9' on the hub"):
        api.push("r.ktr", "me/half@v9")
    with pytest.raises(UsageError, match=r"does not take this"):
        api.look("me/a..b")
    hub.state.failures.append(Failure("POST", "/commit/", 413, 1))
    with pytest.raises(UsageError, match=r"does not take this \(HTTP 413\)"):
        api.push("recipe.yaml", "me/half", overrides=["blend.lambda=0.3"])
    hub.state.failures.clear()
    hub.state.failures.append(Failure("GET", "/api/models/me/half", 429, 99, {"Retry-After": "9999"}))
    with pytest.raises(KtmergeError, match="asks to be left for 9999 seconds"):
        api.look("me/half")
    hub.state.failures[0] = Failure("GET", "/api/models/me/half", 403, 99, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(UsageError, match="is gated on the hub"):
        api.look("me/half")
    hub.state.failures.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UsageError, match=r"refused by the hub \(HTTP 401\); log in"):
        api.push("r.ktr", "me/other")
    hub.state.needs_token_to_read = True
    with pytest.raises(UsageError, match="HTTP 401"):
        api.look("me/half")


@pytest.mark.slow
def test_a_hub_that_stays_broken(place: Path, hub: Any) -> None:
    api.push("r.ktr", "me/half")
    hub.state.failures.append(Failure("GET", "/api/models/me/half/revision", 500, 99))
    hub.state.failures.append(Failure("GET", "/api/models/me/half", 500, 99))
    with pytest.raises(KtmergeError, match="busy or broken"):
        api.look("me/half")


def test_two_pushes_at_once_leave_no_mixture(place: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    api.push("r.ktr", "me/half")
    repository, looked = hub.state.repositories["me/half"], []

    def overtaken(*arguments: Any, **named: Any) -> Any:
        found = seen(*arguments, **named)
        if not looked:
            repository.commit({**repository.commits[repository.branches["main"]], "scores/theirs.json": b"{}"})
        looked.append(found.sha)
        return found

    monkeypatch.setattr("ktmerge.sharing.pushing.seen", overtaken)
    api.push("recipe.yaml", "me/half", overrides=["blend.lambda=0.25"])
    assert len(looked) == 2
    assert "scores/theirs.json" not in repository.commits[repository.branches["main"]]
    assert api.look("me/half").manifest is not None


def test_private_is_private(place: Path, hub: Any) -> None:
    api.push("r.ktr", "me/mine", private=True)
    assert hub.state.repositories["me/mine"].private
    api.push("r.ktr", "me/all")
    before = dict(hub.state.repositories["me/all"].branches)
    with pytest.raises(UsageError, match="me/all: is there already, and public"):
        api.push("recipe.yaml", "me/all", private=True, overrides=["blend.lambda=0.25"])
    assert hub.state.repositories["me/all"].branches == before


class Silent(BaseRequestHandler):
    """Says the same to everybody, or nothing."""

    says: bytes

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(self.says)
        if not self.says:
            self.request.recv(1)


_PAGE = b"<!DOCTYPE html><title>Log in</title>"


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (b"", "cannot be reached"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(_PAGE), _PAGE), "what answers is not the hub"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "what the hub sends cannot be used"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "cannot be reached"),
    ],
    ids=["nothing", "page", "list", "half"],
)
def test_what_is_no_hub(place: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, says: bytes, words: str) -> None:
    monkeypatch.setattr("ktmerge.sharing.hub._SECONDS", 0.1)
    with served(Silent, says=says) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        for call in (lambda: api.look("me/half"), lambda: api.push("r.ktr", "me/half")):
            with pytest.raises(KtmergeError, match=f"me/half: .*{words}") as caught:
                call()
            assert caught.value.exit_code == 1


def test_nothing_is_fetched_to_explain_or_to_compare(place: Path, hub: Any) -> None:
    text = Path("recipe.yaml").read_text().replace("base: base", "base: org/not-fetched@main")
    Path("theirs.yaml").write_text(text)
    assert "Not all of these models are here" in api.explain("theirs.yaml").text()
    assert api.diff("recipe.yaml", "theirs.yaml").differences
    assert not hub.state.seen


@pytest.mark.slow
def test_a_strangers_repository(place: Path, hub: Any) -> None:
    api.push("r.ktr", "me/half")
    repository = hub.state.repositories["me/half"]
    good = repository.commits[repository.branches["main"]]

    def refused(change: dict[str, bytes | None], words: str) -> None:
        files = {name: raw for name, raw in {**good, **change}.items() if raw is not None}
        repository.commit(files)
        with pytest.raises(UsageError, match=words):
            api.unpack(api.look("me/half"), "pulled")
        assert not (place / "pulled").exists()

    refused({"recipe.yaml": good["recipe.yaml"] + b"\n"}, "other files than there are")
    refused({"recipe.yaml": good["recipe.yaml"].replace(b"0.5", b"0.6")}, "is not what its manifest says")
    refused({"recipe.lock.yaml": None}, "is no bundle of a recipe")
    refused({MANIFEST: b"[1]"}, "no manifest of a bundle")
    refused({"suites/more.yaml": b"name: x"}, "other files than there are")
    repository.commit({**good, "run.py": b"print()", "weights.safetensors": b"w"})
    api.unpack(api.look("me/half"), "pulled")
    assert not {"run.py", "weights.safetensors"} & set(files_of(place / "pulled"))
