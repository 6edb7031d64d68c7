"""A pickle machine that builds descriptions and calls nothing.

A pickle is a program; torch's state dicts use a small part of its language. `scan` walks the opcodes first and refuses
every global that is not in the table below, by name; `run` then interprets the allowed opcodes itself: a tensor becomes
a `TensorRef` (storage, offset, shape, stride), a storage a `StorageRef`, nothing is imported, looked up or executed.
Source: Python's pickletools, torch/_weights_only_unpickler.py. Invariant: memory is bounded by the pickle's own size.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from loratools.errors import MalformedError, UnsafeError
from loratools.tensors.dtypes import DTYPES
from loratools.tensors.header import printable

MAX_OPCODES = 10_000_000  # 200,000 tensors take about 6 million
_MAX_NUMBER = 1 << 62


class Stream(Protocol):
    """What pickletools reads from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class StorageRef:
    """A storage by its key: `numel` elements of `dtype`; an untyped one counts bytes and has dtype U8."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage: `offset` and `stride` count elements of `dtype`."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """A value that is understood and not supported; the error names the key it stands under."""

    reason: str


@dataclass(frozen=True)
class _Named:
    """A global of the table: what it is and its payload (a dtype, a reason)."""

    role: str
    value: str = ""


_STORAGES = {
    **{"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "ComplexFloat": "C64"},
    **{"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"},
}
_QUANTISED = {"QInt8": "I8", "QUInt8": "U8", "QInt32": "I32", "QUInt4x2": "U8", "QUInt2x4": "U8"}
_UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor without values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch.serialization._get_layout": "a tensor layout",
    "torch.per_tensor_affine": "a quantisation scheme",
    "torch.per_channel_affine": "a quantisation scheme",
}
_GLOBALS: dict[str, _Named] = {
    "collections.OrderedDict": _Named("dict"),
    "torch.Size": _Named("tuple"),
    "torch.device": _Named("device"),
    "torch._utils._rebuild_tensor": _Named("tensor"),
    "torch._utils._rebuild_tensor_v2": _Named("tensor"),
    "torch._utils._rebuild_tensor_v3": _Named("tensor_v3"),
    "torch._utils._rebuild_parameter": _Named("parameter"),
    "torch._utils._rebuild_parameter_with_state": _Named("parameter"),
    "torch.storage.UntypedStorage": _Named("storage", "U8"),
    "torch.UntypedStorage": _Named("storage", "U8"),
    **{f"torch.{name}Storage": _Named("storage", dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}Storage": _Named("quantised storage", dtype) for name, dtype in _QUANTISED.items()},
    **{f"torch.{torch_name}": _Named("dtype", name) for name, (_, torch_name) in DTYPES.items() if torch_name},
    **{name: _Named("unsupported", reason) for name, reason in _UNSUPPORTED.items()},
}
ALLOWED = frozenset(_GLOBALS)


def scan(stream: Stream, where: str, extra: Iterable[str] = ()) -> None:
    """Refuse a pickle that names a global outside the table and `extra`. Raises UnsafeError with all of them."""
    allowed = ALLOWED | frozenset(extra)
    found = {name: None for name in _globals(stream, where) if name not in allowed}
    if found:
        names = [printable(name) for name in found]
        raise UnsafeError(
            f"{where}: the pickle asks for {', '.join(names[:5])}: refused, nothing was executed",
            details=names,
            fix="load it where you trust it and save the tensors as safetensors",
        )


def _globals(stream: Stream, where: str) -> Iterator[str]:
    """Every global a pickle names, as `module.name`."""
    strings: list[str] = ["?", "?"]  # the last two pushed: STACK_GLOBAL takes them
    memo: dict[int, str] = {}
    for opcode, arg in _opcodes(stream, where):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield str(arg).replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif name.startswith("EXT"):
            yield f"extension registry code {arg}"
        elif name == "MEMOIZE":
            memo[len(memo)] = strings[-1]
        elif "PUT" in name:
            memo[int(arg)] = strings[-1]
        elif "GET" in name:
            strings = [strings[-1], memo.get(int(arg), "?")]
        elif isinstance(arg, str) and ("UNICODE" in name or "STRING" in name):
            strings = [strings[-1], arg]


def _opcodes(stream: Stream, where: str) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """pickletools.genops with its errors made ours and a bound on the length."""
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > MAX_OPCODES:
                raise MalformedError(f"{where}: more than {MAX_OPCODES} pickle instructions")
            yield opcode, arg
    except (ValueError, OverflowError, struct.error, EOFError) as error:
        raise MalformedError(f"{where}: broken or cut pickle: {printable(str(error))[:200]}") from error


def run(stream: Stream, where: str) -> tuple[Any, dict[str, StorageRef]]:
    """The value of a scanned pickle (dicts, lists, tuples, numbers, texts, TensorRef, Refused) and its storages by key."""
    machine = _Machine()
    try:
        for opcode, arg in _opcodes(stream, where):
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise UnsafeError(f"{where}: the pickle uses {opcode.name}, which no tensor file needs: refused")
            handler(machine, arg)
        return machine.stack[-1], machine.storages
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        why = printable(str(error))[:200] if isinstance(error, ValueError | OverflowError) else "an operation lacks what it works on"
        raise MalformedError(f"{where}: not a pickle of tensors, or a damaged one: {why}") from error
    except MemoryError:
        raise MalformedError(f"{where}: the pickle asks for more memory than there is") from None


class _Machine:
    """The stack, the marks in it, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)


def _put(machine: _Machine, index: Any) -> None:
    machine.memo[len(machine.memo) if index is None else int(index)] = machine.stack[-1]


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("entries are set on something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):  # a tuple could take forever to hash
            raise ValueError(f"a dict key is a {type(key).__name__}")
        target[key] = value


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise ValueError("items are appended to something that is no list")
    target.extend(items)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    _set_items(result, items)
    return result


def _global(machine: _Machine, name: str) -> None:
    if name not in _GLOBALS:
        raise UnsafeError(f"the pickle asks for {printable(name)}: refused, nothing was executed")
    machine.push(_GLOBALS[name])


def _stack_global(machine: _Machine, _: Any) -> None:
    module, name = machine.pop_many(2)
    _global(machine, f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?")


def _reduce(machine: _Machine, _: Any) -> None:
    function, args = machine.pop_many(2)
    if not isinstance(function, _Named) or not isinstance(args, tuple):
        raise ValueError("a call of something that is no function")
    if function.role not in _BUILDERS:
        raise ValueError(f"a call of a {function.role}")
    machine.push(_BUILDERS[function.role](function, args))


def _build(machine: _Machine, _: Any) -> None:
    """State set on an object: only OrderedDict has one here (a state dict's `_metadata`), and it is not needed."""
    machine.pop()
    if not isinstance(machine.stack[-1], dict):
        raise ValueError("state is set on something that is no dict")


def _persistent(machine: _Machine, _: Any) -> None:
    identity = machine.pop()
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise ValueError("a reference to something that is no storage")
    _, kind, key, _, numel = identity[:5]
    if not isinstance(kind, _Named) or not kind.role.endswith("storage") or not isinstance(key, str) or not _is_count(numel):
        raise ValueError("a reference to a storage without type, key or size")
    if len(identity) > 5 and identity[5] is not None:
        raise ValueError("a storage that is a view of another")
    storage = StorageRef(key, kind.value, numel)
    if machine.storages.setdefault(key, storage) != storage:
        raise ValueError("a storage with two sizes or dtypes")
    machine.push(storage if kind.role == "storage" else Refused("a quantised tensor"))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def _make_dict(_: _Named, args: tuple[Any, ...]) -> dict[Any, Any]:
    if not args:
        return {}
    pairs = args[0]
    if len(args) != 1 or not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("OrderedDict of something that is no list of pairs")
    return _pairs([item for pair in pairs for item in pair])


def _make_tensor(function: _Named, args: tuple[Any, ...]) -> TensorRef | Refused:
    """(storage, offset, shape, stride, ...); version 3 gives the dtype apart, over an untyped storage."""
    storage, offset, shape, stride = args[:4]
    if isinstance(storage, Refused):
        return storage
    dtype = args[6] if function.role == "tensor_v3" else None
    if not isinstance(storage, StorageRef) or not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError("a tensor without storage, shape or stride")
    if len(shape) > 64 or not all(_is_count(number) for number in (offset, *shape, *stride)):
        raise ValueError("a tensor with a shape, stride or offset that is no count")
    if dtype is not None and (not isinstance(dtype, _Named) or dtype.role != "dtype"):
        raise ValueError("a tensor without dtype")
    return TensorRef(storage, dtype.value if dtype else storage.dtype, offset, shape, stride)


_BUILDERS: dict[str, Callable[[_Named, tuple[Any, ...]], Any]] = {
    "dict": _make_dict,
    "tuple": lambda _, args: tuple(args[0]) if args and isinstance(args[0], list | tuple) else (),
    "device": lambda _, args: str(args[0])[:40] if args and isinstance(args[0], str) else "",
    "tensor": _make_tensor,
    "tensor_v3": _make_tensor,
    "parameter": lambda _, args: args[0],
    "unsupported": lambda function, _: Refused(function.value),
}


def _push_value(machine: _Machine, value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > 256:
        raise ValueError("an integer of more than 256 bits")
    machine.push(value)


def _pop(machine: _Machine, _: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"], _push_value),
    **dict.fromkeys(["STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"], _push_value),
    **dict.fromkeys(["UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"], _push_value),
    **dict.fromkeys(["PROTO", "FRAME", "STOP"], lambda machine, _: None),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"], _put),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda machine, index: machine.push(machine.memo[int(index)])),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": lambda machine, _: machine.push(Refused("a set")),
    "FROZENSET": lambda machine, _: machine.push(Refused("a set" if machine.pop_to_mark() else "an empty set")),
    "ADDITEMS": lambda machine, _: machine.pop_to_mark().clear(),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.pop_to_mark().clear(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push(machine.pop_many(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop_many(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop_many(3)),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.push(_pairs(machine.pop_to_mark())),
    "APPEND": lambda machine, _: _append(machine.stack[-2], [machine.pop()]),
    "APPENDS": lambda machine, _: _append(machine.stack[machine.marks[-1] - 1], machine.pop_to_mark()),
    "SETITEM": lambda machine, _: _set_items(machine.stack[-3], list(machine.pop_many(2))),
    "SETITEMS": lambda machine, _: _set_items(machine.stack[machine.marks[-1] - 1], machine.pop_to_mark()),
    "GLOBAL": lambda machine, name: _global(machine, name.replace(" ", ".", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
