"""Where an adapter lies, and how its files are replaced all at once. Knows bytes, never tensors.

Saving. A file system swaps one name atomically, not several, so `save` keeps a journal inside the folder:

    1. stage     write everything to `.peft-save-XXXX/new/`, hard-link what it replaces into `…/old/`, fsync
    2. commit    rename the stage to `.peft-commit`: from here on the new adapter is the truth
    3. publish   put each new file over its old one, remove what is stale, the config last
    4. retire    rename `.peft-commit` away, delete it

Killed before 2, the folder is untouched but for a stage that the next save sweeps away. Killed after 2, `locate` reads
the new files from the journal and the next save finishes the publication. A failure (full disk, permissions) at any
point puts the old files back. Other libraries see a plain folder; when a new config and new weights are put in place
the old config goes first, so that a reader that knows no journal finds old, new, or no adapter, and never a mix.
Unchanged files are not touched: where only the weights differ, the swap is one rename, atomic for everyone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from peft.checkpoint import strict_json
from peft.checkpoint.header import corrupt, regular_size
from peft.errors import AdapterNotFoundError, CorruptFileError, SaveError, nearest

try:
    import fcntl
except ImportError:  # Windows has no advisory locks on folders; there, writers to one folder must not race
    fcntl = None

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
INDEX_NAME = "adapter_model.safetensors.index.json"
WEIGHT_NAMES = (SAFETENSORS_NAME, INDEX_NAME, BIN_NAME, "adapter_model.bin.index.json", "adapter_model.pt")
"""Files that hold weights, the preferred one first."""

HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Keywords of `locate` that matter only for repositories on the hub."""

MAX_CONFIG_BYTES = 8 << 20

_JOURNAL = ".peft-commit"
_STAGE = ".peft-save-"
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)")


class Writable(Protocol):
    """What writes itself into an open file, such as `tensors.encode(…)`."""

    def write(self, file: IO[bytes], /) -> None: ...


# ---------------------------------------------------------------- reading


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON config as plain data.

    Raises:
        AdapterNotFoundError: no such file.
        CorruptFileError: larger than `MAX_CONFIG_BYTES`, not a JSON object, ambiguous, or too deep.

    Example:
        >>> _ = save("/tmp/peft-doc-files", {CONFIG_NAME: '{"peft_type": "LORA"}'})
        >>> read_config("/tmp/peft-doc-files/adapter_config.json")
        {'peft_type': 'LORA'}
    """
    if (size := regular_size(path)) > MAX_CONFIG_BYTES:
        raise CorruptFileError(
            f"{os.fspath(path)!r} has {size:,} bytes; a config has at most {MAX_CONFIG_BYTES:,}. Is it the right file?"
        )
    return strict_json.loads(Path(path).read_bytes(), path)


def shard_map(path: str | os.PathLike) -> dict[str, str]:
    """Tensor name to file name, from the `….index.json` of a sharded checkpoint. The shards lie in the same folder.

    Raises:
        AdapterNotFoundError: no such file.
        CorruptFileError: not an index, or a shard that is not the bare name of a weights file.
    """
    where = read_config(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise corrupt(path, "its 'weight_map' does not map tensor names to file names")
    for shard in set(where.values()):
        if not is_bare(shard) or not shard.endswith((".safetensors", ".bin")):
            raise corrupt(path, f"the shard {shard!r} is not the bare name of a weights file in the same folder")
    return where


def locate(
    path_or_repo: str | os.PathLike,
    names: str | Sequence[str] = WEIGHT_NAMES,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The local path of a file of an adapter, fetched from the hub if `path_or_repo` is no folder.

    A folder wins over a repository of the same name. A save that was killed half-way is read as whole.

    Args:
        path_or_repo: A folder, or `"user/name"` on the hub.
        names: The file name, or several of which the first that exists is taken.
        subfolder: Folder inside it, relative and without `..`.
        revision, token, cache_dir, force_download, local_files_only: As in `huggingface_hub.hf_hub_download`;
            `HF_HUB_OFFLINE=1` works as everywhere.

    Raises:
        AdapterNotFoundError: neither a folder nor a repository holds it; says where was looked and what was there.

    Example:
        >>> _ = save("/tmp/peft-doc-files", {CONFIG_NAME: '{"peft_type": "LORA"}'})
        >>> locate("/tmp/peft-doc-files", CONFIG_NAME).name
        'adapter_config.json'
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    _check_subfolder(subfolder)
    source = os.path.expanduser(os.fspath(path_or_repo))
    if os.path.isdir(source):
        folder = Path(source, subfolder or "")
        for name in wanted:
            if (path := _effective(folder, name)) is not None:
                return path
        raise _not_in_folder(folder, wanted)
    if os.path.exists(source):
        raise AdapterNotFoundError(f"{source!r} is a file; give the folder that holds it.")
    from peft.checkpoint import hub

    return hub.fetch(
        os.fspath(path_or_repo),
        wanted,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )


def exists(folder: str | os.PathLike, name: str) -> bool:
    """Whether a local folder holds the file (as `locate` would find it)."""
    return _effective(Path(folder), name) is not None


@contextlib.contextmanager
def reading(folder: str | os.PathLike) -> Iterator[None]:
    """Hold off `save` in this folder, so that a config and weights read inside belong together.

    Does nothing where the folder does not exist or can't be locked (Windows, some network file systems). Don't save to
    the folder inside: that would wait for itself.
    """
    with _locked(Path(folder), exclusive=False):
        yield


def _effective(folder: Path, name: str) -> Path | None:
    journal = folder / _JOURNAL
    if _is_file(path := journal / "new" / name):
        return path
    if os.path.lexists(journal / "old" / name):
        return None  # the save that was killed removes it
    return path if _is_file(path := folder / name) else None


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _check_subfolder(subfolder: str | None) -> None:
    parts = PurePosixPath((subfolder or "").replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in str(parts) or "\0" in str(parts):
        raise AdapterNotFoundError(f"subfolder={subfolder!r} leaves the folder; give a relative path without '..'.")


def _not_in_folder(folder: Path, wanted: tuple[str, ...]) -> AdapterNotFoundError:
    if not folder.is_dir():
        return AdapterNotFoundError(f"There is no folder {str(folder)!r}.")
    held = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    inside = [name[:-1] for name in held if name.endswith("/") and any(exists(folder / name, file) for file in wanted)]
    hint = f" Did you mean subfolder={inside[0]!r}?" if inside else nearest(wanted[0], held)
    listing = ", ".join(held[:10]) + (f" and {len(held) - 10} more" if len(held) > 10 else "") or "nothing"
    return AdapterNotFoundError(
        f"The folder {str(folder)!r} holds no {' or '.join(wanted)}; it holds {listing}.{hint} "
        "(A local folder is never mixed with a repository on the hub: rename it if you meant that one.)"
    )


# ---------------------------------------------------------------- writing


def save(
    directory: str | os.PathLike,
    contents: Mapping[str, bytes | str | Writable],
    *,
    remove: Sequence[str] = (),
) -> dict[str, int]:
    """Replace files of a folder, all or none.

    Whatever happens (kill, power cut, full disk, exception), the folder then holds either all that it held before or
    all that was to be written. No network is touched. Writing weights removes those of other formats, shards included,
    so that one format is present at a time. Other files in the folder stay as they are. Writers to one folder wait for
    each other.

    Args:
        directory: Made if missing, with its parents.
        contents: File names (bare, no paths) to text, bytes, or something that writes itself (`tensors.encode(…)`).
        remove: Files that shall be gone.

    Returns:
        Bytes written, by file name.

    Raises:
        SaveError: nothing was changed; `errno` says why the system refused (`ENOSPC`, `EACCES`, …), if it did.

    Example:
        >>> save("/tmp/peft-doc-files", {CONFIG_NAME: '{"peft_type": "LORA"}'})
        {'adapter_config.json': 21}
    """
    folder = Path(directory)
    for name in (*contents, *remove):
        if not is_bare(name):
            raise SaveError(f"{name!r} is not the bare name of a file inside {str(folder)!r}.")
    made: list[Path] = []
    try:
        _make(folder, made)
        with _locked(folder, exclusive=True):
            return _replace(folder, contents, set(remove) - contents.keys())
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if isinstance(error, (OSError, RuntimeError)) and not isinstance(error, SaveError):
            raise _save_error(folder, error) from error
        raise


def is_bare(name: str) -> bool:
    """Whether `name` names something in the folder itself: no path, no hidden file, no character a system forbids."""
    return bool(name) and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')


def _save_error(folder: Path, error: Exception) -> SaveError:
    kept = f"nothing was saved to {str(folder)!r}; what it held is unchanged"
    if isinstance(error, OSError) and error.errno is not None:
        hint = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "the quota is used up",
            errno.EACCES: "check the permissions",
            errno.EROFS: "the file system is read-only",
        }.get(error.errno, "save elsewhere")
        return SaveError(error.errno, f"{os.strerror(error.errno)}: {kept}; {hint}")
    return SaveError(f"{error}: {kept}.")


def _replace(folder: Path, contents: Mapping[str, bytes | str | Writable], remove: set[str]) -> dict[str, int]:
    _recover(folder)
    if any(_is_weights(name) for name in contents):
        remove |= set(filter(_is_weights, os.listdir(folder))) - contents.keys()
    names = list(contents)
    contents = {name: content for name, content in contents.items() if not _same(folder / name, content)}
    if not contents and not any(os.path.lexists(folder / name) for name in remove):
        return {name: os.path.getsize(folder / name) for name in names}
    stage, journal = folder / (_STAGE + os.urandom(8).hex()), folder / _JOURNAL
    try:
        sizes = _fill(stage, folder, contents, remove)
        os.rename(stage, journal)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    try:
        _sync(folder)
        _publish(folder, journal / "new", journal / "old", journal / "forth")
        _discard(journal)
    except BaseException as error:
        try:
            _publish(folder, journal / "old", journal / "new", journal / "back")
            _discard(journal)
        except OSError:
            raise SaveError(
                f"Saving to {str(folder)!r} stopped half-way ({error}), and so did putting the old files back. "
                f"Nothing is lost: the new files are whole in {_JOURNAL!r} there, are read from it, and the next save "
                "puts them in place."
            ) from error
        raise
    return {name: sizes[name] if name in sizes else os.path.getsize(folder / name) for name in names}


def _is_weights(name: str) -> bool:
    return name in WEIGHT_NAMES or _SHARD.fullmatch(name) is not None


def _fill(
    stage: Path, folder: Path, contents: Mapping[str, bytes | str | Writable], remove: set[str]
) -> dict[str, int]:
    """Write what is new, and link what is old.

    `forth` and `back` hold second links, to be moved into the folder: after the commit nothing needs space any more.
    """
    for path in (stage, *(stage / part for part in ("new", "old", "forth", "back"))):
        os.mkdir(path)
    sizes = {name: _write(stage / "new" / name, content) for name, content in contents.items()}
    for name in os.listdir(stage / "new"):
        _duplicate(stage / "new" / name, stage / "forth" / name)
    for name in {*os.listdir(stage / "new"), *remove}:
        if os.path.lexists(folder / name):
            _duplicate(folder / name, stage / "old" / name)
            _duplicate(folder / name, stage / "back" / name)
    for path in (stage / "new", stage / "old", stage / "forth", stage / "back", stage):
        _sync(path)
    return sizes


def _publish(folder: Path, new: Path, old: Path, moving: Path) -> None:
    """Make `folder` hold all files of `new`, by moving their links in `moving`, and none that only `old` has.

    `new` and `old` themselves stay whole: the journal says the same before, during and after this.
    """
    coming = set(os.listdir(new))
    going = set(os.listdir(old)) - coming
    if CONFIG_NAME in coming and len(coming | going) > 1:
        _unlink(folder / CONFIG_NAME)
    for name in sorted(coming - {CONFIG_NAME}):
        _move(moving / name, folder / name)
    for name in sorted(going):
        _unlink(folder / name)
    _move(moving / CONFIG_NAME, folder / CONFIG_NAME)
    _sync(folder)


def _recover(folder: Path) -> None:
    """Finish a save that was killed after its commit, and sweep away those killed before."""
    journal = folder / _JOURNAL
    if (journal / "new").is_dir() and (journal / "old").is_dir():
        again = journal / "again"
        shutil.rmtree(again, ignore_errors=True)
        os.mkdir(again)
        for name in os.listdir(journal / "new"):
            _duplicate(journal / "new" / name, again / name)
        _publish(folder, journal / "new", journal / "old", again)
    if os.path.lexists(journal):
        _discard(journal)
    for name in os.listdir(folder):
        if name.startswith(_STAGE):
            shutil.rmtree(folder / name, ignore_errors=True)


def _discard(journal: Path) -> None:
    """Delete the journal, so that no reader meets it half-deleted. What is left over, the next save sweeps."""
    grave = journal.with_name(_STAGE + os.urandom(8).hex())
    os.rename(journal, grave)
    with contextlib.suppress(OSError):
        _sync(grave.parent)
    shutil.rmtree(grave, ignore_errors=True)


def _write(path: Path, content: bytes | str | Writable) -> int:
    with open(path, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        elif isinstance(content, bytes):
            file.write(content)
        else:
            content.write(file)
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _same(path: Path, content: bytes | str | Writable) -> bool:
    """Whether a file holds this text already. Weights are not compared: they are large, and they do change."""
    if not isinstance(content, (bytes, str)) or path.name in WEIGHT_NAMES or path.is_symlink() or not _is_file(path):
        return False
    data = content.encode() if isinstance(content, str) else content
    return os.path.getsize(path) == len(data) and path.read_bytes() == data


def _duplicate(source: Path, target: Path) -> None:
    """A second name for the same file; a copy where the file system knows no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)
        if not os.path.islink(target):
            _sync(target)


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and its parents, and note those that were missing in `made`, outermost first."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make(folder.parent, made)
    os.mkdir(folder)
    made.append(folder)


def _move(source: Path, target: Path) -> None:
    if os.path.lexists(source):
        os.replace(source, target)


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync(path: Path) -> None:
    """fsync a file or folder by name; systems that can't do it to a folder are taken at their word."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    handle = None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
