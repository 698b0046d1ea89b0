"""A folder is replaced whole or not at all: at every kill, on a full disk, without permission, for every reader."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from peft.checkpoint import files, tensors
from peft.errors import SaveError

OPERATIONS = ("mkdir", "open", "fsync", "link", "rename", "replace", "unlink", "rmdir", "listdir", "write")


MEMORY = Path("/dev/shm")  # takes the same system calls, without waiting for a disk


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


class Faults:
    """Stands in for the `os` module inside `files`: counts what reaches the system, and acts before the n-th call."""

    def __init__(self, at: int, act: Callable[[], object], persistent: bool = False, links: bool = True) -> None:
        self.at, self.act, self.persistent, self.links, self.calls = at, act, persistent, links, 0

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name == "link" and not self.links:
            return self._no_links
        if name not in OPERATIONS:
            return real

        def counted(*args, **kwargs):
            self.count()
            return real(*args, **kwargs)

        return counted

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.persistent and self.calls > self.at):
            self.act()

    def _no_links(self, *args, **kwargs) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    def open(self, *args, **kwargs):
        self.count()
        return os.open(*args, **kwargs)


class Written:
    """Weights whose writing is a counted operation too, half-way through."""

    def __init__(self, payload: tensors.Payload) -> None:
        self.payload = payload

    def write(self, file) -> None:
        os_module = files.os
        self.payload.write(file)
        if isinstance(os_module, Faults):
            file.flush()
            os_module.count()


def adapter(version: int, *, pickled: bool = False, config: int | None = None) -> dict:
    """Files that are consistent only with each other: the number is in the config and in the weights."""
    weights = tensors.encode({"lora_A.weight": torch.full((64, 32), float(version))}, pickled=pickled)
    name = files.BIN_NAME if pickled else files.SAFETENSORS_NAME
    text = json.dumps({"version": version if config is None else config})
    return {files.CONFIG_NAME: text, name: Written(weights), "README.md": f"# {version}"}


def loaded(folder: Path) -> tuple[int, int]:
    config = files.read_config(files.locate(folder, files.CONFIG_NAME))
    weights = tensors.read(files.locate(folder))["lora_A.weight"]
    assert (weights == weights[0, 0]).all()
    return config["version"], int(weights[0, 0])


def seen_by_others(folder: Path) -> tuple[int, int] | None:
    """What a reader finds that knows nothing of journals: None without a config, or without weights."""
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    weights = next((name for name in (files.SAFETENSORS_NAME, files.BIN_NAME) if name in names), None)
    if files.CONFIG_NAME not in names or weights is None:
        return None
    return json.loads((folder / files.CONFIG_NAME).read_text())["version"], int(
        tensors.read(folder / weights)["lora_A.weight"][0, 0]
    )


def visible(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


SCENARIOS = {  # name: an adapter is there before, what is saved is pickled, the file system knows hard links
    "first": (False, False, True),
    "safetensors": (True, False, True),
    "pickled": (True, True, True),
    "no links": (True, False, False),
    "recovery": (True, False, True),  # the first save was killed half-way through its publication already
}
CHILD = """
import os, shutil, sys
from tests.checkpoint import test_saving as t
from tests.checkpoint.test_saving import files

def save_until_killed(folder, at, pickled, links, version=2):
    if (pid := os.fork()) == 0:
        files.os = t.Faults(at, lambda: os._exit(77), links=links)
        files.save(folder, t.adapter(version, pickled=pickled))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def half_published(folder):
    at = 0
    while not os.path.exists(os.path.join(folder, ".peft-commit")) or files.CONFIG_NAME in os.listdir(folder):
        at += 1
        files.save(folder, t.adapter(0))
        assert save_until_killed(folder, at, False, True) == 77

half = os.path.join(sys.argv[1], "half")
half_published(half)
for name, (old, pickled, links) in t.SCENARIOS.items():
    at, code = 0, 77
    while code == 77:
        at += 1
        folder = os.path.join(sys.argv[1], name, str(at))
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        if name == "recovery":
            shutil.copytree(half, folder)
        elif old:
            files.save(folder, t.adapter(1))
        code = save_until_killed(folder, at, pickled, links, version=3 if name == "recovery" else 2)
    assert code == 0, code
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders `<scenario>/<n>`, in which a save was killed before its n-th system call; the last one ran through."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    parent = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path_factory.mktemp("killed")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, folder], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        yield Path(folder)


def folders(scenario: Path) -> list[Path]:
    return sorted((path for path in scenario.iterdir()), key=lambda path: int(path.name))


@pytest.mark.parametrize("scenario", ["safetensors", "pickled", "no links"])
def test_killed_anywhere_the_old_or_the_new_adapter_is_whole(killed: Path, scenario: str) -> None:
    outcomes = []
    for folder in folders(killed / scenario):
        outcomes.append(loaded(folder))
        assert outcomes[-1] in ((1, 1), (2, 2)), f"mixed when killed before call {folder.name}"
        assert seen_by_others(folder) in (None, (1, 1), (2, 2)), f"mixed for others, killed before call {folder.name}"
        files.save(folder, adapter(3))
        assert loaded(folder) == seen_by_others(folder) == (3, 3)
        assert visible(folder) == {files.CONFIG_NAME, files.SAFETENSORS_NAME, "README.md"}
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == (1, 1)
    assert outcomes[-1] == (2, 2)


def test_killed_while_finishing_a_killed_save(killed: Path) -> None:
    outcomes = []
    for folder in folders(killed / "recovery"):
        outcomes.append(loaded(folder))
        assert seen_by_others(folder) in (None, (2, 2), (3, 3)), f"mixed for others, killed before call {folder.name}"
    assert set(outcomes) == {(2, 2), (3, 3)}
    assert outcomes == sorted(outcomes)


def test_killed_on_the_first_save_there_is_a_whole_adapter_or_none(killed: Path) -> None:
    for folder in folders(killed / "first"):
        assert seen_by_others(folder) in (None, (2, 2))
        if files.exists(folder, files.CONFIG_NAME):
            assert loaded(folder) == (2, 2)


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def refusal(monkeypatch: pytest.MonkeyPatch, faults: Faults, folder: Path, **kind: bool) -> SaveError | None:
    with monkeypatch.context() as patched:
        patched.setattr(files, "os", faults)
        try:
            files.save(folder, adapter(2, **kind))
        except SaveError as error:
            return error
    return None


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("pickled", [False, True])
def test_one_failure_anywhere_leaves_the_old_files_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool, links: bool
) -> None:
    files.save(tmp_path, adapter(1))
    (tmp_path / "optimizer.pt").write_bytes(b"not ours")
    before = contents(tmp_path)
    for at in itertools.count(1):
        faults = Faults(at, lambda: fail(errno.ENOSPC), links=links)
        if (error := refusal(monkeypatch, faults, tmp_path, pickled=pickled)) is not None:
            assert error.errno == errno.ENOSPC
            assert "unchanged" in str(error)
        elif faults.calls < at:
            break
        else:  # the failure met the sweeping up, after the swap
            files.save(tmp_path, adapter(1))
        assert contents(tmp_path) == before, f"after a failure of call {at}"
    assert at > 20


def test_a_disk_that_is_full_and_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some moment on every call that needs space fails; renames and removals don't."""
    monkeypatch.setattr(sys.modules[__name__], "OPERATIONS", ("mkdir", "open", "link", "write"))
    files.save(tmp_path, adapter(1))
    before = contents(tmp_path)
    for at in itertools.count(1):
        faults = Faults(at, lambda: fail(errno.ENOSPC), persistent=True)
        if refusal(monkeypatch, faults, tmp_path) is None:
            break
        if loaded(tmp_path) == (1, 1):
            assert seen_by_others(tmp_path) == (1, 1)
        else:  # stuck between two fsyncs: the journal is whole
            assert loaded(tmp_path) == (2, 2)
            files.save(tmp_path, adapter(1))
        assert contents(tmp_path) == before, f"with a disk full from call {at} on"
    assert at > 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("pickled", [False, True])
def test_a_write_that_the_system_refuses(tmp_path, pickled: bool) -> None:
    class Refused:
        def write(self, file) -> None:
            with open("/dev/full", "wb", buffering=0) as full:
                tensors.encode({"a.weight": torch.ones(100_000)}, pickled=pickled).write(full)

    files.save(tmp_path, adapter(1))
    with pytest.raises(SaveError, match="unchanged") as caught:
        files.save(tmp_path, {files.SAFETENSORS_NAME: Refused()})
    assert pickled or caught.value.errno == errno.ENOSPC
    assert loaded(tmp_path) == (1, 1)
    assert visible(tmp_path) == {files.CONFIG_NAME, files.SAFETENSORS_NAME, "README.md"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SaveError, match="permissions") as caught:
        files.save(tmp_path, adapter(1))
    assert caught.value.errno == errno.EACCES


def test_a_failed_first_save_takes_its_folders_with_it(tmp_path: Path) -> None:
    class Broken:
        def write(self, file) -> None:
            raise RuntimeError("CUDA error")

    with pytest.raises(SaveError, match="CUDA error"):
        files.save(tmp_path / "a" / "b", {files.SAFETENSORS_NAME: Broken()})
    assert visible(tmp_path) == set()


def test_an_interrupt_restores_and_passes_through(tmp_path, monkeypatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    files.save(tmp_path, adapter(1))
    real, calls = os.replace, []

    def replace(*args) -> None:
        calls.append(args)
        if len(calls) == 2:
            interrupt()
        real(*args)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        files.save(tmp_path, adapter(2))
    assert loaded(tmp_path) == seen_by_others(tmp_path) == (1, 1)
    assert visible(tmp_path) == {files.CONFIG_NAME, files.SAFETENSORS_NAME, "README.md"}


def test_one_format_at_a_time(tmp_path: Path) -> None:
    files.save(tmp_path, adapter(1))
    (tmp_path / "adapter_model-00001-of-00002.safetensors").write_bytes(b"stale shard")
    (tmp_path / "notes.safetensors").write_bytes(b"not ours")
    files.save(tmp_path, adapter(2, pickled=True))
    assert visible(tmp_path) == {files.CONFIG_NAME, files.BIN_NAME, "README.md", "notes.safetensors"}
    assert loaded(tmp_path) == (2, 2)
    files.save(tmp_path, adapter(3))
    assert visible(tmp_path) == {files.CONFIG_NAME, files.SAFETENSORS_NAME, "README.md", "notes.safetensors"}


def test_saving_a_config_alone_keeps_the_weights(tmp_path: Path) -> None:
    files.save(tmp_path, adapter(1))
    files.save(tmp_path, {files.CONFIG_NAME: json.dumps({"version": 9})})
    assert loaded(tmp_path) == (9, 1)


def test_sizes_are_announced_before_and_after(tmp_path: Path) -> None:
    payload = tensors.encode({"a.weight": torch.ones(3, 5, dtype=torch.bfloat16)})
    assert files.save(tmp_path, {files.SAFETENSORS_NAME: payload, "README.md": "é"}) == {
        files.SAFETENSORS_NAME: payload.nbytes,
        "README.md": 2,
    }
    assert (tmp_path / files.SAFETENSORS_NAME).stat().st_size == payload.nbytes
    on_meta = tensors.encode({"a.weight": torch.empty(3, 5, dtype=torch.bfloat16, device="meta")})
    assert on_meta.nbytes == payload.nbytes


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text(json.dumps({"version": 0}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / files.CONFIG_NAME).symlink_to(blob)
    files.save(tmp_path / "snapshot", adapter(1))
    assert json.loads(blob.read_text()) == {"version": 0}
    assert loaded(tmp_path / "snapshot") == (1, 1)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "nul\0", "C:x", "a\\b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SaveError, match="bare name"):
        files.save(tmp_path, {name: "x"})
    with pytest.raises(SaveError, match="bare name"):
        files.save(tmp_path, {}, remove=[name])


def test_writers_wait_for_each_other_and_for_readers(tmp_path: Path) -> None:
    def read() -> tuple[int, int]:
        with files.reading(tmp_path):
            return loaded(tmp_path)

    files.save(tmp_path, adapter(0))
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(files.save, tmp_path, adapter(i)) for i in range(20)]
        reads = [pool.submit(read) for _ in range(40)]
        assert all(pair[0] == pair[1] for pair in (read.result() for read in reads))
        assert all(write.result() for write in writes)
    assert visible(tmp_path) == {files.CONFIG_NAME, files.SAFETENSORS_NAME, "README.md"}
