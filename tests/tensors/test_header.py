"""Headers: every malformed form has its verdict, and nothing is accepted that the safetensors library refuses."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save as library_save

from loratools.errors import InputError, LoraToolsError, MalformedError
from loratools.tensors.header import parse_json, printable, read_header, render_header

F16_4 = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}
F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ODD_PLACE = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {**F16_4, "data_offsets": [1, 9]}}
TOKENS = (b"NaN", b"true", b"null", b"-0", b"-1", b"1e3", b"1.0", b"\0", b"\xff", b"\\ud800", *(bytes([char]) for char in b'"{}[],: 0'))


def blob(header: object, payload: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    """A file from a header (bytes, text, or something to dump) and a payload."""
    if not isinstance(header, bytes | str):
        header = json.dumps(header)
    raw = header if isinstance(header, bytes) else header.encode("utf-8")
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + payload


def tensor(dtype: object = "F16", shape: object = (4,), offsets: object = (0, 8), **extra: object) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}}


def text(fields: str) -> str:
    return '{"a":' + fields + "}"


# id (the row's words) → (bytes, what the error says)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "less than 8 bytes": (b"\x01\x02\x03", "3 bytes"),
    "N = 0": (b"\0" * 8 + b"xxxx", "header length 0"),
    "N > 100 MB": (blob("{}", length=100_000_001), "100000001"),
    "N > file": (blob("{}", b"", length=3), "only 2 bytes follow"),
    "not JSON": (blob("hello wo"), "not JSON at byte 8"),
    "list": (blob("[]"), "no object"),
    "BOM": (blob(b"\xef\xbb\xbf{}", b""), "byte 8"),
    "bad UTF-8": (blob(b'{"\xff":1}'), "not UTF-8 at byte 10"),
    "NUL after the object": (blob(b"{}\0\0", b""), "byte 10"),
    "text after the object": (blob("{} x", b""), "byte 11"),
    "lone surrogate": (blob('{"\\ud800":' + json.dumps(F16_4) + "}"), "surrogate"),
    "lone low surrogate in metadata": (blob('{"__metadata__":{"k":"\\udc00"}}', b""), "surrogate"),
    "dim true": (blob(text('{"dtype":"F16","shape":[true,4],"data_offsets":[0,8]}')), "a: shape"),
    "dim 2.0": (blob(tensor(shape=[2.0, 2])), "a: shape"),
    'dim "2"': (blob(tensor(shape=["2", 2])), "a: shape"),
    "dim -2": (blob(tensor(shape=[-2, -2])), "a: shape"),
    "dim -0": (blob(text('{"dtype":"F16","shape":[-0],"data_offsets":[0,0]}'), b""), "a: shape"),
    "dim NaN": (blob(text('{"dtype":"F16","shape":[NaN],"data_offsets":[0,8]}')), "NaN"),
    "dim of 5000 digits": (blob(text('{"dtype":"F16","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}')), "not JSON"),
    "5000-deep nesting": (blob('{"a":' + "[" * 5000 + "]" * 5000 + "}"), "nested"),
    "duplicate tensor key, same range": (blob('{"a":' + json.dumps(F16_4) + ',"a":' + json.dumps(F32_2) + "}"), "twice"),
    "duplicate __metadata__": (blob('{"__metadata__":{},"__metadata__":{"a":"b"}}', b""), "__metadata__: stands twice"),
    "duplicate field": (blob(text('{"dtype":"F16","dtype":"F16","shape":[4],"data_offsets":[0,8]}')), "dtype stands twice"),
    "overlap": (blob({"a": F16_4, "b": {**F16_4, "data_offsets": [4, 12]}}, b"\0" * 12), "b: overlaps"),
    "two names on one range": (blob({"a": F16_4, "b": F16_4}), "overlaps"),
    "hole": (blob({"a": F16_4, "b": {**F16_4, "data_offsets": [12, 20]}}, b"\0" * 20), "b: leaves a hole"),
    "first offset > 0": (blob(tensor(offsets=[4, 12]), b"\0" * 12), "a: leaves a hole"),
    "begin > end": (blob(tensor(offsets=[8, 0])), "a: data_offsets .* backwards"),
    "3 offsets": (blob(tensor(offsets=[0, 4, 8])), "a: data_offsets has 3"),
    "bytes after the last tensor": (blob(tensor(), b"\0" * 11), "3 bytes too many"),
    "payload short": (blob(tensor(), b"\0" * 5), "truncated, 3 bytes missing"),
    "size != shape x dtype": (blob(tensor(shape=[3])), "a: F16 .* takes 6 bytes"),
    "u64 overflow of the shape": (blob(tensor(shape=[2**63, 4, 0], offsets=[0, 0]), b""), "a: .*overflows"),
    "u64 overflow of the bits": (blob(tensor(shape=[2**61], offsets=[0, 0]), b""), "a: .*overflows"),
    "offset above 64 bits": (blob(tensor(offsets=[2**64, 2**64 + 8])), "a: data_offsets"),
    "unknown dtype": (blob(tensor(dtype="F128")), "a: unknown dtype 'F128'"),
    "lower-case dtype": (blob(tensor(dtype="f16")), "a: unknown dtype"),
    "dtype is no text": (blob(tensor(dtype=["F16"])), "a: unknown dtype"),
    "odd F4": (blob(tensor(dtype="F4", shape=[3], offsets=[0, 2]), b"\0\0"), "a: .*whole bytes"),
    "dtype missing": (blob(text('{"shape":[4],"data_offsets":[0,8]}')), "a: dtype is missing"),
    "shape missing": (blob(text('{"dtype":"F16","data_offsets":[0,8]}')), "a: shape is missing"),
    "data_offsets missing": (blob(text('{"dtype":"F16","shape":[4]}')), "a: data_offsets is missing"),
    "entry is a number": (blob(text("3")), "a: expected an object"),
    "shape is an object": (blob(tensor(shape={})), "a: shape is not a list"),
    "metadata value not a string": (blob('{"__metadata__":{"rank":8}}', b""), "rank: not a string; store numbers"),
    "metadata is a list": (blob('{"__metadata__":[]}', b""), "__metadata__: expected an object"),
    "Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git-LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "zip/pickle": (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 60, "zip archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
    "stripped JSON": (json.dumps(tensor()).encode() + b"\0" * 8, "JSON text without"),
}

# id → (bytes, code of the warning or None)
READ: dict[str, tuple[bytes, str | None]] = {
    "duplicate metadata key": (blob('{"__metadata__":{"k":"1","k":"2"}}', b""), "duplicate-metadata"),
    "leading spaces": (blob(b"   " + json.dumps(tensor()).encode()), "leading-space"),
    "header not 8-aligned": (blob('{"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}} '), "unaligned-header"),
    "misaligned tensor": (blob(json.dumps(ODD_PLACE).ljust(128), b"\0" * 9), "misaligned"),
    "unknown field": (blob(tensor(strides=[1])), "unknown-field"),
    "__metadata__ null": (blob('{"__metadata__":null}   ', b""), None),
    "name empty": (blob({"": F16_4}), None),
    "name ../../etc/passwd": (blob({"../../etc/passwd": F16_4}), None),
    "name with ESC": (blob({"\x1b[31m": F16_4}), None),
    "name with NUL": (blob({"a\0b": F16_4}), None),
    "shape [0, 2^62]": (blob(tensor(shape=[0, 2**62], offsets=[0, 0]), b""), "huge-dimension"),
    "shape []": (blob(tensor(dtype="F64", shape=[])), None),
    "shape [0]": (blob(tensor(shape=[0], offsets=[0, 0]), b""), None),
    "no tensors": (blob("{}      ", b""), None),
    "F6 tensors": (blob(tensor(dtype="F6_E2M3", shape=[4], offsets=[0, 3]), b"\1\2\3"), None),
    "surrogate pair": (blob('{"\\ud83d\\ude00":' + json.dumps(F16_4) + "}"), None),
}


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return path


def library_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as handle:
            handle.keys()
    except (safetensors.SafetensorError, OSError):
        return False
    return True


@pytest.mark.parametrize("row", REFUSED)
def test_refused(row: str, tmp_path: Path) -> None:
    data, words = REFUSED[row]
    with pytest.raises(MalformedError) as caught:
        read_header(write(tmp_path, data))
    said = "\n".join([str(caught.value), *caught.value.details])
    assert re.search(words, said), said
    assert str(tmp_path) in said


@pytest.mark.parametrize("row", READ)
def test_read(row: str, tmp_path: Path) -> None:
    data, code = READ[row]
    path = write(tmp_path, data)
    header = read_header(path)
    found = {warning.code for warning in header.warnings} - ({"unaligned-header"} if code != "unaligned-header" else set())
    assert found == ({code} if code else set())
    assert library_accepts(path), "this row is said to be one that the library opens"
    with safetensors.safe_open(path, "pt") as handle:
        assert sorted(header.tensors) == sorted(handle.keys())
        assert header.metadata == (handle.metadata() or {})


def test_folder_under_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(MalformedError, match="found a folder"):
        read_header(tmp_path / "x.safetensors")


def test_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(MalformedError, match="FIFO"):  # opening it would block for ever
        read_header(tmp_path / "x.safetensors")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_header(tmp_path / "x.safetensors")


def test_all_problems_at_once(tmp_path: Path) -> None:
    header = {"a": {**F16_4, "dtype": "f16"}, "b": {**F16_4, "shape": [5]}, "c": {"dtype": "F16"}}
    with pytest.raises(MalformedError) as caught:
        read_header(write(tmp_path, blob(header)))
    assert [line.split(":")[0] for line in caught.value.details] == ["a", "b", "c"]


def test_names_are_escaped_in_errors(tmp_path: Path) -> None:
    with pytest.raises(MalformedError) as caught:
        read_header(write(tmp_path, blob({"\x1b[31m\n": {**F16_4, "shape": [5]}})))
    assert caught.value.details[0].startswith("\\x1b[31m\\n: ")
    assert printable("ä😀\u202e") == "ä😀\\u202e"


def valid_header(rng: random.Random) -> tuple[dict[str, object], int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "k": "v"}}
    position = 0
    for number in range(rng.randint(1, 4)):
        dtype, size = rng.choice([("F16", 2), ("F32", 4), ("U8", 1), ("I64", 8), ("BF16", 2)])
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        count = size * int(torch.tensor(shape).prod()) if shape else size
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
    return header, position


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to three small changes of the header text: bytes, digits, tokens, whole passages."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        change = rng.randrange(6)
        if change == 0:
            data[place] = rng.randrange(256)
        elif change == 1:
            del data[place : place + rng.randint(1, 4)]
        elif change == 2:
            data[place:place] = rng.choice(TOKENS)
        elif change == 3:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[rng.choice(digits)] = rng.randrange(48, 58)
        elif change == 4:
            end = min(len(data), place + rng.randint(1, 30))
            data[place:place] = data[place:end]  # passages twice: duplicate keys
        else:
            data = bytearray(data.replace(b"F16", rng.choice([b"F32", b"f16", b"F4", b"F8_E4M3"]), 1))
        if not data:
            data = bytearray(b" ")
    return bytes(data)


def test_never_laxer_than_the_library(tmp_path: Path) -> None:
    """500 seeded mutations: what safetensors rejects is refused with our own error, never with a foreign one."""
    rng = random.Random(20240607)
    accepted = rejected = 0
    for number in range(500):
        header, size = valid_header(rng)
        raw = json.dumps(header, separators=rng.choice([(",", ":"), (", ", ": ")])).encode()
        raw = mutate(raw, rng)
        payload = b"\0" * max(0, size + rng.choice([0, 0, 0, 0, -1, 1]))
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(blob(raw, payload))
        good = library_accepts(path)
        try:
            read_header(path)
        except LoraToolsError:
            rejected += 1
            continue
        assert good, f"accepted, but safetensors refuses it: {raw!r}"
        accepted += 1
    assert accepted > 20  # a parser that refuses everything would pass otherwise
    assert rejected > 200


def test_library_files_are_read_exactly(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(1)}
    path = write(tmp_path, library_save(tensors, {"k": "v"}))
    header = read_header(path)
    assert {name: info.shape for name, info in header.tensors.items()} == {"b": (2, 3), "a": (3,), "s": ()}
    assert {name: info.dtype for name, info in header.tensors.items()} == {"b": "F32", "a": "BF16", "s": "I64"}
    assert header.metadata == {"k": "v"}
    assert not header.warnings


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"k": 'quote " back \\ line \n tab \t ctrl \x01 \x7f umlaut ä 😀 / <'}])
def test_render_is_what_the_library_writes(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = {"z": torch.zeros(2, 3), 'odd " \\ \x02 ä': torch.zeros(4, dtype=torch.float16), "u": torch.zeros(3, dtype=torch.uint8)}
    expected = library_save(tensors, metadata or None)
    info = read_header(write(tmp_path, expected))
    entries = {name: (item.dtype, item.shape, item.start, item.end) for name, item in info.tensors.items()}
    assert render_header(entries, metadata) == expected[: info.data_start]


def test_render_refuses_what_is_no_text() -> None:
    with pytest.raises(InputError, match="not text"):
        render_header({}, {"k": "\udcff"})


def test_two_hundred_thousand_tensors(tmp_path: Path) -> None:
    """Ten times the tensors make ten times the calls, not a hundred."""

    def many(count: int) -> Path:
        entries = {f"lora_unet_blocks_{i}_attn.lora_down.weight": ("F16", (1,), 2 * i, 2 * i + 2) for i in range(count)}
        return write(tmp_path, render_header(entries, {}) + b"\0" * (2 * count))

    def calls(count: int) -> int:
        path, made = many(count), 0

        def count_call(*_: object) -> None:
            nonlocal made
            made += 1

        sys.setprofile(count_call)
        try:
            read_header(path)
        finally:
            sys.setprofile(None)
        return made

    assert calls(20_000) < 11 * calls(2_000)
    assert len(read_header(many(200_000)).tensors) == 200_000


def test_strict_json_of_plain_files() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, true]}', "x") == {"a": [1, 2.5, None, True]}
    with pytest.raises(MalformedError, match="Infinity"):
        parse_json(b"[Infinity]", "x")
