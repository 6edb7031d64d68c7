"""Torch pickles: state dicts are read, everything else is refused by name, nothing is executed or blown up."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import random
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loratools.errors import LoraToolsError, MalformedError, UnsafeError, UnsupportedError
from loratools.tensors.lazy import StoredTensor, tensor_bytes
from loratools.tensors.pickles import open_pickle, read_pickle, read_tree, scan_pickle
from loratools.tensors.reader import open_source
from loratools.tensors.unpickle import ALLOWED
from loratools.tensors.writer import write_safetensors

pytestmark = pytest.mark.hostile

STATE = {
    "float": torch.arange(6.0).reshape(2, 3),
    "half": torch.arange(4.0).half(),
    "bfloat": torch.arange(4.0).bfloat16(),
    "double": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "long": torch.tensor([-1, 2**40]),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "float8": torch.arange(4.0).to(torch.float8_e4m3fn),
    "uint16": torch.arange(4).to(torch.uint16),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(20.0).reshape(4, 5).t(),
    "strided": torch.arange(24.0).reshape(4, 6)[1:3, ::2],
    "slice": torch.arange(20.0)[3:9],
    "conv": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
}


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = open_pickle(path)
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        lazy = tensors[name]
        assert lazy.shape == tuple(tensor.shape)
        assert b"".join(lazy.chunks()) == b"".join(tensor_bytes(tensor)), name
        assert lazy.load().dtype == tensor.dtype


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
class TestRead:
    def save(self, value: object, path: Path, zipped: bool) -> Path:
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        return path

    def test_plain_dict(self, tmp_path: Path, zipped: bool) -> None:
        same(self.save(STATE, tmp_path / "x.pt", zipped), STATE)

    def test_nested_state_dict(self, tmp_path: Path, zipped: bool) -> None:
        path = self.save({"state_dict": STATE, "epoch": 3, "note": None, "optimizer_states": [1]}, tmp_path / "x.ckpt", zipped)
        same(path, STATE)
        warning = read_pickle(path).warnings[0]
        assert warning.code == "no-tensor"
        assert "(3)" in warning.message
        assert "epoch, note, optimizer_states" in warning.message

    def test_scalars_beside_tensors(self, tmp_path: Path, zipped: bool) -> None:
        path = self.save({"w": torch.ones(2), "lr": 0.1, "name": "n", "steps": 7, "none": None, "yes": True}, tmp_path / "x.pt", zipped)
        content = read_pickle(path)
        assert list(content.tensors) == ["w"]
        assert "(5)" in content.warnings[0].message

    def test_parameters_and_ordered_dict(self, tmp_path: Path, zipped: bool) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        path = self.save(module.state_dict(), tmp_path / "x.bin", zipped)
        same(path, dict(module.state_dict()))
        same(self.save(dict(module.named_parameters()), tmp_path / "p.bin", zipped), {k: p.data for k, p in module.named_parameters()})

    def test_nested_dicts_are_joined_by_dots(self, tmp_path: Path, zipped: bool) -> None:
        path = self.save({"unet": {"a": torch.ones(1)}, "te": {"b": {"c": torch.zeros(1)}}}, tmp_path / "x.pt", zipped)
        assert list(open_pickle(path)) == ["unet.a", "te.b.c"]

    def test_shared_storage_is_counted_once_and_not_aliased(self, tmp_path: Path, zipped: bool) -> None:
        base = torch.arange(100.0)
        path = self.save({"a": base, "b": base, "c": base[10:20]}, tmp_path / "x.pt", zipped)
        source = open_source(path)
        assert source.nbytes == 400
        loaded = source.tensors["a"].load()
        loaded += 1
        assert torch.equal(source.tensors["b"].load(), base)
        write_safetensors(tmp_path / "x.safetensors", source.tensors, {})
        assert open_source(tmp_path / "x.safetensors").nbytes == 840

    def test_optimizer_state_as_a_tree(self, tmp_path: Path, zipped: bool) -> None:
        module = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.5)
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        tree = read_tree(self.save(state, tmp_path / "optimizer.pt", zipped))
        assert tree["param_groups"] == state["param_groups"]
        assert torch.equal(tree["state"][1]["exp_avg"].load(), state["state"][1]["exp_avg"])
        assert tree["state"][0]["step"].scalar() == 1.0

    def test_cut_anywhere(self, tmp_path: Path, zipped: bool) -> None:
        path = self.save({"a": torch.arange(100.0), "b": torch.ones(3)}, tmp_path / "x.pt", zipped)
        data = path.read_bytes()
        for size in [*range(2, len(data), max(1, len(data) // 60)), len(data) - 1]:
            path.write_bytes(data[:size])
            with pytest.raises(LoraToolsError):
                open_source(path)

    def test_flipped_bytes_never_raise_a_foreign_error(self, tmp_path: Path, zipped: bool) -> None:
        path = self.save({"a": torch.arange(4.0), "b": {"c": torch.ones(3).half()}}, tmp_path / "x.pt", zipped)
        data = path.read_bytes()
        rng = random.Random(7)
        outcomes = {True: 0, False: 0}
        for _ in range(300):
            broken = bytearray(data)
            for _ in range(rng.randint(1, 3)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            path.write_bytes(broken)
            try:
                for tensor in open_source(path).tensors.values():
                    b"".join(tensor.chunks())
                outcomes[True] += 1
            except LoraToolsError:
                outcomes[False] += 1
        assert min(outcomes.values()) > 20


def test_nothing_is_read_until_asked(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(10.0)}, tmp_path / "x.pt")
    tensor = open_pickle(tmp_path / "x.pt")["w"]
    assert isinstance(tensor, StoredTensor)
    data = (tmp_path / "x.pt").read_bytes()
    assert data[tensor.offset : tensor.offset + 40] == struct.pack("<10f", *range(10))


# --- what runs code ---------------------------------------------------------------------------------------------------


class Reduce:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)


def _getattr_chain(marker: str) -> object:
    return Reduce(getattr, Reduce(__import__, "os"), "system")


HOSTILE: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system reduce": (lambda marker: Reduce(os.system, f"touch {marker}"), "posix.system"),
    "nested loads": (lambda marker: Reduce(pickle.loads, pickle.dumps(Reduce(os.system, f"touch {marker}"))), "loads"),
    "getattr chain": (_getattr_chain, "builtins.getattr"),
    "eval": (lambda marker: Reduce(eval, f"open({marker!r}, 'w')"), "builtins.eval"),
    "subprocess": (lambda marker: Reduce(subprocess.run, ["touch", marker]), "run"),
    "open for writing": (lambda marker: Reduce(open, marker, "w"), "open"),
    "numpy array": (lambda marker: np.ones(3), "numpy"),
    "numpy scalar": (lambda marker: np.float32(1), "numpy"),
    "whole module": (lambda marker: Module(), "Module"),
}


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "protocol 4 zip"])
@pytest.mark.parametrize("row", HOSTILE)
def test_code_is_refused_by_name_and_never_run(row: str, form: str, tmp_path: Path) -> None:
    make, name = HOSTILE[row]
    marker, path = tmp_path / "executed", tmp_path / "x.pt"
    value = {"w": torch.ones(2), "evil": make(str(marker))}
    if form == "bare":
        path.write_bytes(pickle.dumps({"evil": value["evil"]}))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form != "legacy", pickle_protocol=4 if form == "protocol 4 zip" else 2)
    for use in (open_pickle, open_source, scan_pickle, read_tree):
        with pytest.raises(UnsafeError) as caught:
            use(path)
        assert caught.value.exit_code == 3
        said = "\n".join([str(caught.value), *caught.value.details])
        assert name in said.replace("__builtin__", "builtins")  # protocol 2 has Python 2's name for it
    assert not marker.exists()


def test_every_bad_global_is_listed(tmp_path: Path) -> None:
    torch.save({"a": Reduce(os.system, "true"), "b": Reduce(eval, "1")}, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(UnsafeError) as caught:
        open_pickle(tmp_path / "x.pt")
    assert caught.value.details == ["posix.system", "builtins.eval"]


def test_stack_global_through_the_memo(tmp_path: Path) -> None:
    """The names of a STACK_GLOBAL fetched from the memo: what fooled opcode scanners before."""
    code = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x30\x30h\x00h\x01\x93\x8c\x04true\x85R."
    assert any(op.name == "STACK_GLOBAL" for op, _, _ in pickletools.genops(code))
    archive(tmp_path / "x.pt", code)
    with pytest.raises(UnsafeError, match=r"posix\.system"):
        open_pickle(tmp_path / "x.pt")


def test_names_that_only_look_allowed(tmp_path: Path) -> None:
    for code in (b"ctorch\nFloatStorage.__init__\n.", b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", b"\x80\x02\x82\x01."):
        archive(tmp_path / "x.pt", code)
        with pytest.raises(UnsafeError):
            open_pickle(tmp_path / "x.pt")


def test_calls_of_allowed_things_that_are_no_functions(tmp_path: Path) -> None:
    calls = (b"ctorch\nFloatStorage\n)R.", b"ctorch\nfloat32\n)R.", b"ctorch._utils\n_rebuild_tensor_v2\n}b.", b"}}R.", b"K\x01K\x02s.")
    for code in calls:
        archive(tmp_path / "x.pt", code)
        with pytest.raises(MalformedError):
            open_pickle(tmp_path / "x.pt")


def test_the_allow_list_holds_nothing_that_acts() -> None:
    assert all(name.startswith(("torch.", "collections.OrderedDict")) for name in ALLOWED)


def test_extra_globals_may_be_scanned_for(tmp_path: Path) -> None:
    torch.save({"rng": np.ones(2)}, tmp_path / "rng.pth")
    with pytest.raises(UnsafeError) as caught:
        scan_pickle(tmp_path / "rng.pth")
    scan_pickle(tmp_path / "rng.pth", caught.value.details)


# --- malformed containers ---------------------------------------------------------------------------------------------


def archive(path: Path, code: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", code)
        for name, data in (records or {}).items():
            file.writestr(name, data)
    return path


def repack(path: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes | None) -> Path:
    """The archive again with members changed or added; keys are endings of names."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    for ending, data in changes.items():
        name = next((name for name in members if name.endswith(ending)), ending)
        if data is None:
            del members[name]
        else:
            members[name] = data
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def _ones(path: Path) -> Path:
    return saved(path, {"w": torch.ones(4)})


def _script(path: Path) -> Path:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    return path


def _cut_zip(path: Path) -> Path:
    data = saved(path, {"w": torch.ones(100)}).read_bytes()
    path.write_bytes(data[:-30])
    return path


def _self_reference() -> dict[str, Any]:
    value: dict[str, Any] = {"w": torch.ones(1)}
    value["again"] = value
    return value


def _shared_dict() -> dict[str, Any]:
    inner = {"w": torch.ones(1)}
    return {"a": inner, "b": inner}


def _two_names(path: Path) -> Path:
    saved(path, {"w": torch.ones(4)})
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("x/data/0", b"\0" * 16)
    return path


def _quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


ROWS: dict[str, tuple[Callable[[Path], Path], type[LoraToolsError], str]] = {
    "TorchScript": (_script, UnsafeError, "TorchScript"),
    "zip cut": (_cut_zip, MalformedError, "cut zip"),
    "record shorter than storage": (lambda p: repack(_ones(p), **{"data/0": b"\0" * 15}), MalformedError, "w: .*15 bytes.*16"),
    "record missing": (lambda p: repack(_ones(p), **{"data/0": None}), MalformedError, "w: .*missing"),
    "record twice": (_two_names, MalformedError, "w: .*twice"),
    ".. in zip names": (lambda p: repack(_ones(p), **{"../evil": b"x"}), UnsafeError, r"\.\./evil"),
    "absolute zip name": (lambda p: archive(p, pickle.dumps({}), {"/etc/x": b""}), UnsafeError, "/etc/x"),
    "deflated records": (lambda p: repack(saved(p, {"w": torch.zeros(4)}), zipfile.ZIP_DEFLATED), MalformedError, "compressed"),
    "stride-0 view": (lambda p: saved(p, {"w": torch.ones(1).expand(1000)}), MalformedError, "w: .*stride"),
    "stride-0 view in a storage of its size": (lambda p: saved(p, {"w": torch.ones(9)[:1].expand(9)}), MalformedError, "w: .*repeats"),
    "stride-0 view of many values": (lambda p: saved(p, {"w": torch.ones(1).expand(2**32)}), MalformedError, "w: "),
    "overlapping view": (lambda p: saved(p, {"w": torch.ones(9).as_strided((5, 5), (1, 1))}), MalformedError, "w: .*leaves its storage"),
    "meta tensor of 1e12": (lambda p: saved(p, {"w": torch.empty(10**12, device="meta")}), MalformedError, "w: .*meta"),
    "sparse": (lambda p: saved(p, {"w": torch.eye(3).to_sparse()}), MalformedError, "w: .*sparse"),
    "quantised": (lambda p: saved(p, {"w": _quantized()}), MalformedError, "w: .*quantised"),
    "int keys": (lambda p: saved(p, {0: torch.ones(1)}), MalformedError, "0: the key is no text"),
    "int key of 5000 digits": (lambda p: saved(p, {10**5000: torch.ones(1)}), MalformedError, "256 bits"),
    "tuple keys": (lambda p: saved(p, {(1, 2): torch.ones(1)}), MalformedError, "tuple"),
    "list": (lambda p: saved(p, {"w": [torch.ones(1)]}), MalformedError, "w: .*list"),
    "set": (lambda p: saved(p, {"w": {1, 2}}), LoraToolsError, "set"),
    "top-level list": (lambda p: saved(p, [torch.ones(1)]), UnsupportedError, "a list"),
    "top-level tensor": (lambda p: saved(p, torch.ones(1)), UnsupportedError, "a tensor"),
    "self-reference": (lambda p: saved(p, _self_reference()), MalformedError, "again: refers back to itself"),
    "one dict under two keys": (lambda p: saved(p, _shared_dict()), MalformedError, "b: .*stands twice"),
    "nested 5000 deep": (lambda p: archive(p, b"}" + b"U\x01a}" * 5000 + b"s" * 5000 + b"."), MalformedError, "nested too deeply"),
    "two tensors of one name": (lambda p: saved(p, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), MalformedError, "a.b: two tensors"),
    "big-endian": (lambda p: repack(saved(p, {"w": torch.ones(4)}), byteorder=b"big"), MalformedError, "big-endian"),
    "zip without data.pkl": (lambda p: repack(archive(p, b""), **{"data.pkl": None, "readme": b"x"}), MalformedError, "no torch file"),
    "bare pickle": (lambda p: Path(shutil.copy(_bare(p.with_name("b")), p)), UnsafeError, "bare pickle"),
}  # fmt: skip


def _bare(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"w": 1}))
    return path


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_malformed(row: str, tmp_path: Path) -> None:
    make, kind, words = ROWS[row]
    with pytest.raises(kind) as caught:
        open_source(make(tmp_path / "x.pt"))
    said = "\n".join([str(caught.value), *caught.value.details])
    assert re.search(words, said), said


def test_all_bad_keys_at_once(tmp_path: Path) -> None:
    torch.save({"ok": torch.ones(1), "a": [1], "b": torch.ones(1).expand(9), 3: torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(MalformedError) as caught:
        open_pickle(tmp_path / "x.pt")
    assert sorted(line.split(":")[0] for line in caught.value.details) == ["3", "a", "b"]


def test_unused_members_are_ignored_and_never_extracted(tmp_path: Path) -> None:
    path = repack(saved(tmp_path / "x.pt", {"w": torch.ones(4)}), **{"x/evil.sh": b"rm", "notes.txt": b"hello"})
    before = sorted(os.listdir(tmp_path))
    assert list(open_source(path).tensors) == ["w"]
    assert sorted(os.listdir(tmp_path)) == before


def storage_view(shape: str, stride: str, offset: str = "K\x00", numel: str = "K\x04") -> bytes:
    """{"w": a view of FloatStorage "0"} with numbers written by hand."""
    text = (
        "\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu"
        f"{numel}tQ{offset}{shape}{stride}\x89ccollections\nOrderedDict\n)RtRs."
    )
    return text.encode("latin-1")


VIEWS = {
    "whole": ("K\x04\x85", "K\x01\x85", "K\x00", True),
    "beyond the end": ("K\x05\x85", "K\x01\x85", "K\x00", False),
    "offset beyond the end": ("K\x04\x85", "K\x01\x85", "K\x01", False),
    "stride beyond the end": ("K\x02\x85", "K\x04\x85", "K\x00", False),
    "negative stride": ("K\x02\x85", "J\xff\xff\xff\xff\x85", "K\x01", False),
    "negative offset": ("K\x02\x85", "K\x01\x85", "J\xff\xff\xff\xff", False),
    "negative length": ("J\xff\xff\xff\xff\x85", "K\x01\x85", "K\x00", False),
    "true for a length": ("\x88\x85", "K\x01\x85", "K\x00", False),
    "64-bit overflow": ("\x8a\x08\0\0\0\0\0\0\0\x20K\x08\x86", "K\x00K\x00\x86", "K\x00", False),
    "other ranks": ("K\x02K\x02\x86", "K\x01\x85", "K\x00", False),
    "empty, anywhere": ("K\x00\x85", "K\x63\x85", "K\x00", True),
}


@pytest.mark.parametrize("row", VIEWS)
def test_views_stay_in_their_storage(row: str, tmp_path: Path) -> None:
    shape, stride, offset, good = VIEWS[row]
    archive(tmp_path / "x.pt", storage_view(shape, stride, offset), {"x/data/0": b"\0\0\x80\x3f" * 4})
    if good:
        assert set(open_pickle(tmp_path / "x.pt")["w"].load().tolist()) <= {1.0}
    else:
        with pytest.raises(MalformedError):
            open_pickle(tmp_path / "x.pt")


# --- bombs --------------------------------------------------------------------------------------------------------------


def long(number: int) -> str:
    return "\x8a\x08" + struct.pack("<Q", number).decode("latin-1")


def laughs(levels: int) -> bytes:
    """Dicts that hold the one before them twice: 2^levels entries when walked without a memory."""
    code = b"\x80\x02}q\x00"
    for level in range(levels):
        code += b"}(U\x01ah%cU\x01bh%cuq%c" % (level, level, level + 1)
    return code + b"."


def memo_laughs(levels: int) -> bytes:
    """The same of tuples under a key: hashing or printing them would take 2^levels steps."""
    code = b"\x80\x02}K\x01\x85q\x00"
    for level in range(levels):
        code += b"0h%ch%c\x86q%c" % (level, level, level + 1)
    return b"\x80\x02}U\x01a" + code[3:] + b"s."


BOMBS: dict[str, Callable[[Path], object]] = {
    "deflated record": lambda p: repack(saved(p, {"w": torch.zeros(1 << 26)}), zipfile.ZIP_DEFLATED),
    "deflated instructions": lambda p: archive(p, b"N0" * (1 << 26) + b"N.", compression=zipfile.ZIP_DEFLATED),
    "stride 0": lambda p: saved(p, {"w": torch.ones(1).expand(10**10)}),
    "meta tensor": lambda p: saved(p, {"w": torch.empty(10**12, device="meta")}),
    "memo index of 4e9": lambda p: archive(p, b"\x80\x02Nr\xff\xff\xff\xff."),
    "bytes of 1e12": lambda p: archive(p, b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"x."),
    "text of 1e12": lambda p: archive(p, b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b"x."),
    "long of 2 GB": lambda p: archive(p, b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x."),
    "storage of 1e18": lambda p: archive(p, storage_view("K\x04\x85", "K\x01\x85", numel=long(10**18))),
    "dicts in dicts": lambda p: archive(p, laughs(60)),
    "tuples in tuples": lambda p: archive(p, memo_laughs(60)),
    "many empty dicts": lambda p: archive(p, b"\x80\x02" + b"}" * 20_000_000 + b"."),
    "legacy claim of 1e12 bytes": lambda p: p.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"x."),
}


@pytest.mark.parametrize("row", BOMBS)
@pytest.mark.memory
def test_bombs_under_a_memory_limit(row: str, tmp_path: Path) -> None:
    """A process that may use 1.5 GiB of addresses and a minute refuses each of them."""
    path = tmp_path / "x.pt"
    BOMBS[row](path)
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
        from loratools.errors import LoraToolsError
        from loratools.tensors.reader import open_source
        try:
            open_source(sys.argv[1])
        except LoraToolsError as error:
            print(error.exit_code, str(error)[:300])
    """
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("3 "), run.stdout


def test_the_reader_leaves_torch_alone(tmp_path: Path) -> None:
    torch.save(collections.OrderedDict(w=torch.ones(2)), tmp_path / "x.pt")
    code = """
        import sys
        from loratools.tensors.reader import open_source
        print(b"".join(open_source(sys.argv[1]).tensors["w"].chunks()).hex(), "torch" in sys.modules)
    """
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "x.pt")]
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["0000803f0000803f", "False"]


def test_bytes_io_is_all_the_scan_needs() -> None:
    """The scan reads a stream once, opcode by opcode; nothing is unpickled."""
    from loratools.tensors.unpickle import scan

    scan(io.BytesIO(pickle.dumps([1, "a", {"b": 2.0}], protocol=4)), "x")
    with pytest.raises(UnsafeError, match=r"os\.system"):
        scan(io.BytesIO(b"cos\nsystem\n."), "a.x")
