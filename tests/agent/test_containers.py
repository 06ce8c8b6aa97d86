"""What the agent finds out about containers and their files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent import containers
from agent.runtimes.base import RuntimeContainer
from protocol.errors import KernelError, MigrateError, UnsupportedError, UsageError
from protocol.messages import ContainerReport, FileIdentity, Network

DIGEST_OF_NOTHING = "99aa06d3014798d86001c324468d497f"  # xxh3_128 of no bytes


class Bundle:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "rootfs"
        self.root.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"process": {"args": ["x"]}, "root": {"path": "rootfs"}}))

    def identities(self, *paths: str) -> list[FileIdentity]:
        root_fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        try:
            return containers.identify(root_fd, paths)
        finally:
            os.close(root_fd)

    def report(self, files: Sequence[FileIdentity]) -> ContainerReport:
        return ContainerReport(
            name="web1", runtime="runc", status="running", pid=1, bundle=str(self.path), memory_bytes=0,
            config_json=(self.path / "config.json").read_bytes(), files=list(files), network=Network(kind="none"),
        )  # fmt: skip

    def verify(self, files: Sequence[FileIdentity]) -> list[tuple[str, str]]:
        found = containers.verify_files(str(self.path), self.report(files), "hostB")
        assert all(refusal.host == "hostB" for refusal in found)
        return [(refusal.code, refusal.object) for refusal in found]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = Bundle(tmp_path / "bundle")
    (made.root / "bin").mkdir()
    (made.root / "bin/program").write_bytes(b"program" * 500_000)
    (made.root / "empty").write_bytes(b"")
    return made


def test_files_that_are_the_same_are_not_mentioned(bundle: Bundle):
    found = bundle.identities("/bin/program", "/empty", "/bin/program")
    assert [(file.path, file.size) for file in found] == [("/bin/program", 3_500_000), ("/empty", 0)]
    assert found[1].digest == DIGEST_OF_NOTHING
    assert bundle.verify(found) == []


def test_a_missing_file_is_refused_by_path(bundle: Bundle):
    wanted = bundle.identities("/bin/program", "/empty")
    (bundle.root / "bin/program").unlink()
    assert bundle.verify(wanted) == [("file-missing", "/bin/program")]


def test_another_content_of_the_same_size_is_refused(bundle: Bundle):
    wanted = bundle.identities("/bin/program")
    with (bundle.root / "bin/program").open("r+b") as file:
        file.seek(2_000_001)
        file.write(b"!")
    (refusal,) = containers.verify_files(str(bundle.path), bundle.report(wanted), "hostB")
    assert (refusal.code, refusal.object) == ("file-differs", "/bin/program")
    assert "3500000 bytes" in refusal.message
    assert refusal.hint


def test_another_size_is_refused(bundle: Bundle):
    wanted = bundle.identities("/empty")
    (bundle.root / "empty").write_bytes(b"\0")
    assert bundle.verify(wanted) == [("file-differs", "/empty")]


def test_all_that_is_wrong_is_told_at_once(bundle: Bundle):
    wanted = bundle.identities("/bin/program", "/empty")
    (bundle.root / "bin/program").unlink()
    (bundle.root / "empty").write_bytes(b"x")
    assert bundle.verify(wanted) == [("file-missing", "/bin/program"), ("file-differs", "/empty")]


@pytest.mark.parametrize("link", ["/outside", "../../outside", "up/outside", "../bundle/../outside"])
def test_a_symbolic_link_leads_to_nothing_outside_the_root(bundle: Bundle, tmp_path: Path, link: str):
    (tmp_path / "outside").write_text("secret")
    (bundle.root / "up").symlink_to(tmp_path)
    target = link.replace("/outside", f"{tmp_path}/outside") if link == "/outside" else link
    (bundle.root / "bin/link").symlink_to(target)
    wanted = FileIdentity(path="/bin/link", size=6, digest="0")
    assert bundle.verify([wanted]) == [("file-missing", "/bin/link")]


@pytest.mark.parametrize("path", ["/../outside", "/../../../../../../../../outside"])
def test_dots_lead_to_nothing_outside_the_root(bundle: Bundle, tmp_path: Path, path: str):
    (tmp_path / "outside").write_text("secret")
    assert bundle.verify([FileIdentity(path=path, size=6, digest="0")]) == [("file-missing", path)]


def test_a_link_inside_the_root_is_followed_as_the_container_does(bundle: Bundle):
    (bundle.root / "lib").symlink_to("/bin")
    (bundle.root / "bin/alias").symlink_to("/bin/program")
    assert {file.digest for file in bundle.identities("/lib/alias", "/bin/program", "/lib/program")} == {
        bundle.identities("/bin/program")[0].digest
    }


def test_a_magic_link_is_not_followed(bundle: Bundle):
    (bundle.root / "bin/self").symlink_to("/proc/self/exe")
    assert bundle.verify([FileIdentity(path="/bin/self", size=6, digest="0")]) == [("file-missing", "/bin/self")]


@pytest.mark.root
@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "socket"])
def test_what_is_no_regular_file_is_not_opened(bundle: Bundle, kind: str):
    path = bundle.root / "odd"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            os.mknod(path, 0o20600, os.makedev(1, 5))  # /dev/zero: reading it would never end
        case "socket":
            os.mknod(path, 0o140600)
    (refusal,) = containers.verify_files(
        str(bundle.path), bundle.report([FileIdentity(path="/odd", size=0, digest="0")]), "hostB"
    )
    assert refusal.code == "file-missing"
    assert "it is not a regular file" in refusal.message
    with pytest.raises(KernelError):
        bundle.identities("/odd")


def test_a_root_that_is_not_there_is_one_refusal_with_a_hint(bundle: Bundle):
    wanted = bundle.identities("/bin/program", "/empty")
    bundle.root.rename(bundle.path / "elsewhere")
    (refusal,) = containers.verify_files(str(bundle.path), bundle.report(wanted), "hostB")
    assert (refusal.code, refusal.object, refusal.host) == ("bundle-missing", str(bundle.root), "hostB")
    assert str(bundle.path) in refusal.hint


def test_verifying_leaves_no_descriptor_open(bundle: Bundle):
    wanted = [*bundle.identities("/bin/program"), FileIdentity(path="/none", size=0, digest="0")]
    before = len(os.listdir("/proc/self/fd"))
    bundle.verify(wanted)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"process": 1}', "[" * 100_000, "\xff"])
def test_a_config_that_is_none_is_an_error_of_whoever_sent_it(text: str):
    with pytest.raises(UsageError, match=r"config\.json"):
        containers.parse_config(text.encode("latin-1"))


def test_a_config_that_is_too_large_is_not_read_whole(bundle: Bundle):
    with (bundle.path / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnsupportedError, match="larger than"):
        containers.read_config(str(bundle.path))


def test_a_bundle_without_config_is_named(tmp_path: Path):
    with pytest.raises(MigrateError, match=re.escape(f"cannot read {tmp_path}/config.json: No such file")) as caught:
        containers.read_config(str(tmp_path))
    assert caught.value.code == "bundle"


class FakeRuntime:
    """Only `containers` and `kind`: all that finding asks."""

    def __init__(self, kind: str, *names: str) -> None:
        self.kind = kind
        self.names = names

    def containers(self) -> list[RuntimeContainer]:
        return [RuntimeContainer(name=name, pid=0, status="stopped", bundle="/b") for name in self.names]


def test_a_container_is_found_by_its_runtime():
    runc, crun = FakeRuntime("runc", "a"), FakeRuntime("crun", "b")
    assert containers.find([runc, crun], "b").runtime is crun  # type: ignore[list-item, comparison-overlap]


def test_a_name_in_two_runtimes_is_ambiguous():
    with pytest.raises(UnsupportedError, match="runc and crun both have a container a") as caught:
        containers.find([FakeRuntime("runc", "a"), FakeRuntime("crun", "a")], "a")  # type: ignore[list-item]
    assert caught.value.code == "ambiguous-container"


def test_a_stopped_container_has_no_memory_and_is_not_reported():
    runc = FakeRuntime("runc", "a")
    (summary,) = containers.summarize([runc])  # type: ignore[list-item]
    assert (summary.status, summary.memory_bytes, summary.processes) == ("stopped", 0, 0)
    found = containers.find([runc], "a")  # type: ignore[list-item]
    with pytest.raises(UnsupportedError, match="a is stopped, not running") as caught:
        containers.report(found, storage="none", tcp="keep", network="keep", bridge="")
    assert caught.value.code == "not-running"


def test_a_container_that_ends_while_it_is_looked_at_is_not_running(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    gone = RuntimeContainer(name="web1", pid=1 << 22, status="running", bundle=str(bundle.path))

    def check(pid: int, **_: object) -> None:
        raise FileNotFoundError(f"/proc/{pid}/maps")

    monkeypatch.setattr(containers, "check_container", check)
    found = containers.Found(FakeRuntime("runc"), gone)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="web1 ended while it was looked at") as caught:
        containers.report(found, storage="none", tcp="keep", network="keep", bridge="")
    assert caught.value.code == "not-running"
