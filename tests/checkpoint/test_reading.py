"""Files from strangers: read in full, or refused with the file, the fault and the remedy; never half, never a crash."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft.checkpoint import files, header, strict_json, tensors
from peft.errors import AdapterNotFoundError, CorruptFileError, SaveError

DTYPES = [dtype for dtype in tensors._DTYPE_NAMES if dtype is not torch.bool]
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, named: dict[str, torch.Tensor], **options: Any) -> Path:
    with open(path, "wb") as file:
        tensors.encode(named, pickled=path.suffix == ".bin", **options).write(file)
    return path


def raw(path: Path, document: Any, data: bytes = b"", size: int | None = None) -> Path:
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    path.write_bytes(struct.pack("<Q", len(head) if size is None else size) + head + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        def bits(t: torch.Tensor) -> torch.Tensor:
            return t.contiguous().reshape(-1).view(torch.uint8)

        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))

    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(24 * 8, dtype=torch.uint8)
    named = {"a.weight": bits.view(dtype).reshape(2, -1), "b": bits[:8].view(dtype)[0]}
    assert same(tensors.read(write(tmp_path / "x.safetensors", named)), named)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_shared_strided_and_trained_tensors_are_written_out_in_full(tmp_path: Path, name: str) -> None:
    whole = torch.randn(6, 8)
    named = {
        "a": whole,
        "b": whole,
        "c": whole.T,
        "d": whole[1:3, ::2],
        "e": torch.nn.Parameter(whole),
        "f": whole[0, 0],
    }
    path = write(tmp_path / name, named)
    assert same(tensors.read(path), {key: value.detach() for key, value in named.items()})


def test_metadata_and_shapes_come_from_the_header_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.safetensors", {"b": torch.ones(2, 3), "a": torch.ones(4).half()}, metadata={"who": "é\n\"'"}
    )
    found = tensors.header(path)
    assert found.metadata == {"format": "pt", "who": "é\n\"'"}
    assert found.shapes == {"b": (2, 3), "a": (4,)}
    assert found.nbytes == 32


def test_headers_and_paths_need_no_torch() -> None:
    code = "import sys; from peft.checkpoint import files, header, hub, report; assert 'torch' not in sys.modules"
    src = Path(__file__).parents[2] / "src"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(src)}, check=False)
    assert done.returncode == 0


def test_a_device_is_where_the_tensors_go(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert tensors.read(path, device=torch.device("cpu"))["a"].device.type == "cpu"
    path = write(tmp_path / "x.bin", {"a": torch.ones(3)})
    assert tensors.read(path, device="meta")["a"].is_meta


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    write(tmp_path / "s-1.safetensors", {"a": torch.ones(2)})
    write(tmp_path / "s-2.bin", {"b": torch.zeros(3)})
    index = tmp_path / files.INDEX_NAME
    index.write_text(json.dumps({"weight_map": {"b": "s-2.bin", "a": "s-1.safetensors"}}))
    assert same(tensors.read(index), {"a": torch.ones(2), "b": torch.zeros(3)})
    with pytest.raises(CorruptFileError, match="expected at most"):
        tensors.read(index, limit_bytes=8)


# ---------------------------------------------------------------- what can't be saved


@pytest.mark.parametrize(
    ("tensor", "advice"),
    [
        (torch.empty(0, 4), "FSDP.*ZeRO-3.*state_dict="),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex128), "cast it"),
        (torch.ones(2).as_subclass(type("Sharded", (torch.Tensor,), {})), "full_tensor"),
    ],
    ids=["empty", "sparse", "dtype", "subclass"],
)
def test_what_no_file_can_hold_is_refused_before_writing(tensor: torch.Tensor, advice: str) -> None:
    with pytest.raises(SaveError, match=advice):
        tensors.encode({"layer.lora_A.weight": tensor})


def test_pruned_layers_may_be_empty_on_purpose(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": torch.empty(0, 4), "b": torch.ones(1)}, allow_empty={"a"})
    assert tensors.read(path)["a"].shape == (0, 4)


def test_a_meta_tensor_has_a_size_and_no_content(tmp_path: Path) -> None:
    payload = tensors.encode({"a": torch.empty(4, device="meta")})
    with pytest.raises(SaveError, match="meta device"):
        files.save(tmp_path, {files.SAFETENSORS_NAME: payload})
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"a": entry(dtype="F33")}, "unknown dtype"),
        ({"a": entry(dtype=["F32"])}, "unknown dtype"),
        ({"a": entry(shape=[-1])}, "shape"),
        ({"a": entry(shape=[True])}, "shape"),
        ({"a": entry(shape=[1.0])}, "shape"),
        ({"a": entry(shape="1")}, "shape"),
        ({"a": entry(shape=[1] * 20)}, "shape"),
        ({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, "cut off|appended"),
        ({"a": entry(shape=[2**64, 0], offsets=[0, 0])}, "64 bits"),
        ({"a": entry(shape=[2**40])}, "needs"),
        ({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}, "needs"),
        ({"a": entry(offsets=[4, 0])}, "needs"),
        ({"a": entry(offsets=[0, 4, 8])}, "offsets"),
        ({"a": entry(offsets=[-4, 0])}, "offsets"),
        ({"a": entry(offsets=[4, 8])}, "overlap or gap"),
        ({"a": entry(), "b": entry()}, "overlap or gap"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, "overlap or gap"),
        ({"a": entry(shape=[2], offsets=[0, 8])}, "cut off"),
        ({}, "appended"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "entry"),
        ({"a": {**entry(), "x": 1}}, "entry"),
        ({"a": 3}, "entry"),
        ({"__metadata__": {"x": 1}, "a": entry()}, "metadata"),
        ({"__metadata__": [], "a": entry()}, "metadata"),
        ({"": entry()}, "0 characters"),
        ({"a" * 2000: entry()}, "2000 characters"),
        ({"a\0b": entry()}, "control"),
        ({"../../etc/passwd": entry()}, "empty part"),
        ({"/etc/passwd": entry()}, "begins like a path"),
        (b'{"a":1,"a":2}', "given twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
        (b"{" * 100_000, "JSON"),
        (b'{"a":\xff}', "JSON"),
        (b"[]", "begin with"),
        (b"", "begin with"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, document: Any, fault: str) -> None:
    path = raw(tmp_path / "x.safetensors", document, b"\0" * 4)
    with pytest.raises(CorruptFileError, match=fault) as caught:
        tensors.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "ends after 0 bytes"),
        (b"\x08\0\0", "ends after 3 bytes"),
        (b"\xff" * 64, "claims"),
        (struct.pack("<Q", 100) + b"{}", "cut off"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + b"\0" * 40, "pickled"),
    ],
)
def test_what_is_no_safetensors_file_is_told_apart(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=fault):
        tensors.read(path)


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").mkdir()
    for name in ("x.safetensors", "y.safetensors"):
        with pytest.raises(CorruptFileError, match="regular"):
            tensors.read(tmp_path / name)
    with pytest.raises(AdapterNotFoundError):
        tensors.read(tmp_path / "z.safetensors")
    with pytest.raises(CorruptFileError, match="no weights file"):
        tensors.read(tmp_path / "z.gguf")


def test_a_limit_is_a_limit(tmp_path: Path) -> None:
    for path in (
        write(tmp_path / "x.safetensors", {"a": torch.ones(100)}),
        write(tmp_path / "x.bin", {"a": torch.ones(100)}),
    ):
        with pytest.raises(CorruptFileError, match="limit_bytes"):
            tensors.read(path, limit_bytes=399)


def test_no_flipped_bit_is_read_as_something_else(tmp_path: Path) -> None:
    named = {"b": torch.randn(3, 2), "a": torch.randn(2).half()}
    path = tmp_path / "x.safetensors"
    files.save(tmp_path, {path.name: tensors.encode(named, {"k": "v"}, checksum=True)})
    content = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(content), 3):
        path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
        try:
            found = tensors.read(path)
        except CorruptFileError:
            refused += 1
            continue
        assert found.keys() == named.keys()
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in named.items())
    assert refused > 2 * len(content)


def test_a_checksum_outlives_honest_rewriting_and_no_other(tmp_path: Path) -> None:
    named = {"b": torch.randn(3, 2), "a": torch.randn(2).half()}
    path = tmp_path / "x.safetensors"
    files.save(tmp_path, {path.name: tensors.encode(named, {"k": "v"}, checksum=True)})
    metadata = tensors.header(path).metadata
    save_file(named, path, metadata=metadata)
    assert tensors.read(path).keys() == named.keys()
    save_file({**named, "b": named["b"] + 1}, path, metadata=metadata)
    with pytest.raises(CorruptFileError, match="edited on purpose"):
        tensors.read(path)
    assert tensors.CHECKSUM_KEY not in tensors.encode(named, metadata).metadata


@FUZZ
@given(st.data())
def test_a_file_damaged_anywhere_is_refused_or_holds_the_same_names(tmp_path: Path, data: st.DataObject) -> None:
    """Cut, flip, insert or repeat bytes in any part: length, header, data. A flip in the data is data."""
    path = tmp_path / "x.safetensors"
    write(
        path, {"m.0.lora_A.weight": torch.ones(2, 3), "m.0.lora_B.weight": torch.ones(3, 2).half()}, metadata={"k": "v"}
    )
    content = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        low, high = data.draw(st.sampled_from([(0, 8), (8, head), (head, len(content))]))
        at = min(data.draw(st.integers(low, max(low, high - 1))), len(content))
        action = data.draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
        if action == "cut":
            del content[at:]
        elif action == "flip" and at < len(content):
            content[at] = data.draw(st.integers(0, 255))
        elif action == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            content[at:at] = content[at : at + 16]
    path.write_bytes(content)
    try:
        found = tensors.read(path)
    except CorruptFileError:
        return
    assert sum(tensor.nbytes for tensor in found.values()) <= len(content)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == tensors.header(path).shapes


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "I8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)


@FUZZ
@given(
    st.dictionaries(st.text(max_size=6), st.builds(entry, JSON, JSON, JSON) | JSON, max_size=3), st.binary(max_size=40)
)
def test_no_header_reaches_the_allocator_unchecked(tmp_path: Path, document: dict[str, Any], data: bytes) -> None:
    path = raw(tmp_path / "x.safetensors", document, data)
    try:
        found = tensors.read(path)
    except CorruptFileError:
        return
    assert sum(tensor.nbytes for tensor in found.values()) == len(data)


# ---------------------------------------------------------------- pickles


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch evil",))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"a": Evil()}, "plain tensors"),
        ([torch.ones(1)], "a list, not a dict"),
        ({"a": 3}, "a int, not a plain tensor"),
        ({1: torch.ones(1)}, "not a string"),
        ({"a/../b": torch.ones(1)}, "empty part"),
        ({"a": {"b": torch.ones(1)}}, "a dict, not a plain tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({"a": torch.ones(1).expand(10**6)}, "repeats its bytes"),
        ({"a": torch.empty(10**9, device="meta")}, "meta"),
    ],
    ids=["code", "list", "number", "key", "path", "nested", "sparse", "strides", "meta"],
)
def test_only_plain_tensors_come_out_of_a_pickle(tmp_path: Path, monkeypatch, content: Any, fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.bin")
    with pytest.raises(CorruptFileError, match=fault):
        tensors.read("x.bin")
    assert not Path("evil").exists()


def test_raw_pickles_and_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(CorruptFileError):
        tensors.read(path)
    write(path, {"a": torch.zeros(10_000)})
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    with pytest.raises(CorruptFileError, match="compressed"):
        tensors.read(tmp_path / "bomb.bin")


@FUZZ
@given(st.data())
def test_a_damaged_pickle_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path / "x.bin", {"a": torch.ones(2, 3)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content)) | st.just(len(content))) :]
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = tensors.read(path)
        except CorruptFileError:
            return
    assert sum(tensor.nbytes for tensor in found.values()) <= len(content)


def test_the_legacy_format_is_still_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert same(tensors.read(tmp_path / "x.bin"), {"a": torch.ones(3)})


# ---------------------------------------------------------------- shards and configs


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "bare name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "bare name"),
        ({"weight_map": {"a": "x.txt"}}, "bare name"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({}, "weight_map"),
        ({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}, "disagree about the tensor 'b'"),
        ({"weight_map": {}}, None),
    ],
)
def test_an_index_stays_in_its_folder(tmp_path: Path, index: Any, fault: str | None) -> None:
    write(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    path = tmp_path / files.INDEX_NAME
    path.write_text(json.dumps(index))
    if fault is None:
        assert tensors.read(path) == {}
        return
    with pytest.raises(CorruptFileError, match=fault):
        tensors.read(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"[]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b'{"r": 8, "r": 16}', "'r' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is given twice"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": -Infinity}', "Infinity"),
        (b'{"r": 1e999}', "out of range"),
        (b'{"r": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"r": "\\ud800"}', "JSON"),
        (b'{"r": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b'{"r": ' + b"[" * 200_000, "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"", "JSON"),
        (b"{" + b" " * files.MAX_CONFIG_BYTES + b"}", "at most"),
    ],
)
def test_a_config_has_one_meaning_or_none(tmp_path: Path, text: bytes, fault: str) -> None:
    path = tmp_path / files.CONFIG_NAME
    path.write_bytes(text)
    with pytest.raises(CorruptFileError, match=fault) as caught:
        files.read_config(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_whatever_json_can_say_is_read_as_json_reads_it(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    try:
        found = strict_json.loads(text.encode(), "x")
    except CorruptFileError as error:
        fault = str(error)
    else:
        fault = ""
        assert json.dumps(found) == text
    assert not fault or any(word in fault for word in ("NaN", "Infinity", "surrogates"))


@FUZZ
@given(st.binary(max_size=60))
def test_no_bytes_break_the_reader_of_configs(raw_bytes: bytes) -> None:
    with contextlib.suppress(CorruptFileError):
        assert isinstance(strict_json.loads(raw_bytes, "x"), dict)


@given(st.text(max_size=12))
def test_names_that_are_written_are_read(name: str) -> None:
    fault = header.check_name(name)
    if fault is None:
        head = tensors.encode({name: torch.ones(1)})._head
        assert name in json.loads(head[8:])
    else:
        with pytest.raises(SaveError):
            tensors.encode({name: torch.ones(1)})
