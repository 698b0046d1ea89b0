"""Files are found in a folder, else on the hub; what is not found is explained; the network is reached when asked."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from peft.checkpoint import files, hub
from peft.errors import AdapterNotFoundError, CorruptFileError


class Repository:
    """A stand-in for the hub: files of one repository, and a note of what was asked for."""

    def __init__(self, folder: Path, online: bool = True) -> None:
        self.folder, self.online, self.asked = folder, online, []

    def download(self, repo_id: str, filename: str, *, subfolder: str | None = None, **options: Any) -> str:
        self.asked.append((repo_id, filename, options.get("revision")))
        path = self.folder / (subfolder or "") / filename
        if path.exists():
            return str(path)
        raise (EntryNotFoundError if self.online else LocalEntryNotFoundError)(f"404 for {filename}")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    (tmp_path / "remote").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fake = Repository(tmp_path / "remote")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def test_a_folder_wins_over_a_repository(repository: Repository) -> None:
    Path("user/name").mkdir(parents=True)
    Path("user/name", files.CONFIG_NAME).write_text("{}")
    assert files.locate("user/name", files.CONFIG_NAME) == Path("user/name", files.CONFIG_NAME)
    assert repository.asked == []


def test_the_first_name_that_exists_is_taken(tmp_path: Path) -> None:
    (tmp_path / files.BIN_NAME).write_bytes(b"")
    assert files.locate(tmp_path).name == files.BIN_NAME
    (tmp_path / files.SAFETENSORS_NAME).write_bytes(b"")
    assert files.locate(tmp_path).name == files.SAFETENSORS_NAME


def test_what_a_folder_lacks_is_said_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "adapter_confg.json").write_text("{}")
    with pytest.raises(AdapterNotFoundError, match=r"holds adapter_confg.json.*mean 'adapter_confg.json'") as caught:
        files.locate(tmp_path, files.CONFIG_NAME)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FileNotFoundError)


def test_adapters_in_subfolders_are_pointed_out(tmp_path: Path) -> None:
    files.save(tmp_path / "german", {files.CONFIG_NAME: "{}"})
    with pytest.raises(AdapterNotFoundError, match="subfolder='german'"):
        files.locate(tmp_path, files.CONFIG_NAME)
    assert files.locate(tmp_path, files.CONFIG_NAME, subfolder="german").is_file()
    with pytest.raises(AdapterNotFoundError, match="no folder"):
        files.locate(tmp_path, files.CONFIG_NAME, subfolder="french")


@pytest.mark.parametrize("subfolder", ["..", "a/../../b", "/etc", "a\\..\\b", "C:/x"])
def test_a_subfolder_stays_inside(tmp_path: Path, subfolder: str) -> None:
    with pytest.raises(AdapterNotFoundError, match="leaves the folder"):
        files.locate(tmp_path, files.CONFIG_NAME, subfolder=subfolder)


@pytest.mark.parametrize("name", ["./missing", "/tmp/missing/adapter", "a/b/c", "~/missing-adapter", "a..b", ""])
def test_a_path_is_never_looked_up_on_the_hub(repository: Repository, name: str) -> None:
    with pytest.raises(AdapterNotFoundError):
        files.locate(name, files.CONFIG_NAME)
    assert repository.asked == []


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(AdapterNotFoundError, match="give the folder"):
        files.locate(tmp_path / "x", files.CONFIG_NAME)


def test_the_hub_is_asked_in_order_and_for_the_revision(repository: Repository) -> None:
    (repository.folder / files.BIN_NAME).write_bytes(b"")
    assert files.locate("user/name", revision="v2").name == files.BIN_NAME
    assert [(name, revision) for _, name, revision in repository.asked] == [
        (files.SAFETENSORS_NAME, "v2"),
        (files.INDEX_NAME, "v2"),
        (files.BIN_NAME, "v2"),
    ]


def test_shards_come_with_their_index(repository: Repository) -> None:
    (repository.folder / files.INDEX_NAME).write_text('{"weight_map": {"a": "s.safetensors"}}')
    (repository.folder / "s.safetensors").write_bytes(b"")
    files.locate("user/name")
    assert repository.asked[-1][1] == "s.safetensors"
    (repository.folder / "s.safetensors").unlink()
    with pytest.raises(AdapterNotFoundError, match=r"names the shard 's.safetensors'"):
        files.locate("user/name")
    (repository.folder / files.INDEX_NAME).write_text('{"weight_map": {"a": "../s.safetensors"}}')
    with pytest.raises(CorruptFileError, match="bare name"):
        files.locate("user/name")


@pytest.mark.parametrize("online", [True, False])
def test_what_the_hub_lacks_is_explained(repository: Repository, online: bool) -> None:
    repository.online = online
    with pytest.raises(
        AdapterNotFoundError, match="has no adapter_config.json" if online else "could not be had from the hub"
    ) as e:
        files.locate("user/name", files.CONFIG_NAME)
    assert "user/name" in str(e.value)


def test_offline_is_respected(tmp_path: Path) -> None:
    """The real client, offline: an error of ours at once, and no connection."""
    with pytest.raises(AdapterNotFoundError, match="could not be had from the hub"):
        files.locate("user/name", files.CONFIG_NAME, cache_dir=tmp_path, local_files_only=True)


def test_pushing_uploads_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    def upload(**options: Any) -> SimpleNamespace:
        calls.update(options, held=sorted(os.listdir(options["folder_path"])))
        return SimpleNamespace(pr_url=None, commit_url="https://example.org/commit/1")

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    url = hub.push(lambda folder: files.save(folder, {files.CONFIG_NAME: "{}"}), "name", commit_message="First")
    assert url == "https://example.org/commit/1"
    assert calls["repo_id"] == "me/name"
    assert calls["held"] == [files.CONFIG_NAME]
    assert calls["commit_message"] == "First"
    assert not os.path.exists(calls["folder_path"])


def test_saving_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    files.save(tmp_path, {files.CONFIG_NAME: "{}", files.SAFETENSORS_NAME: b""})
