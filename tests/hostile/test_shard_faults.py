"""Shards and their index when the process dies between two renames: what can be opened under OUT is all of one output.

The index names every shard, so it is put in place last; an earlier output's index goes before the first new shard comes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import LoraToolsError
from loratools.tensors.reader import open_source
from tests.hostile.conftest import tree
from tests.hostile.test_merge_faults import ends, inputs

__all__ = ["inputs"]

pytestmark = pytest.mark.hostile

SHARDS = 4
INDEX = "out.safetensors.index.json"

# SHARDS tensors in as many files; the process kills itself just before the n-th rename, whichever call does it
WRITING = """
    import os, signal, sys
    moment, value, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    count = [0]
    for name in ("rename", "replace"):
        def struck(*given, real=getattr(os, name), **options):
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)
        setattr(os, name, struck)
    from loratools.tensors.lazy import BytesTensor
    from loratools.tensors.writer import TensorSink
    tensors = {f"t{at}": BytesTensor(bytes([value + at]) * 64, "U8", (64,)) for at in range(%d)}
    with TensorSink(folder + "/out.safetensors", {}, force=True, max_shard_bytes=64) as sink:
        for key, tensor in tensors.items():
            sink.declare(key, tensor.dtype, tensor.shape)
        for key, tensor in tensors.items():
            sink.write(key, tensor)
    print(count[0])
"""


def write(folder: Path, value: int, moment: int = 0) -> subprocess.CompletedProcess[str]:
    """The writer in a process of its own, which imports no torch; moment 0: undisturbed."""
    command = [sys.executable, "-c", textwrap.dedent(WRITING % SHARDS), str(moment), str(value), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def opened(folder: Path) -> dict[str, bytes] | None:
    """What a reader finds under the index; None where it finds nothing, or refuses it."""
    try:
        source = open_source(folder / INDEX)
        return {name: b"".join(tensor.chunks()) for name, tensor in source.tensors.items()}
    except LoraToolsError:
        return None


def content(value: int) -> dict[str, bytes]:
    return {f"t{at}": bytes([value + at]) * 64 for at in range(SHARDS)}


@pytest.mark.parametrize("moment", range(1, SHARDS + 2))
def test_the_index_comes_last(moment: int, tmp_path: Path) -> None:
    """Before the last rename there is no index, and nothing that could be taken for the output; the next run clears up."""
    ended = write(tmp_path, 10, moment)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("out-*.safetensors"))) == moment - 1
    assert not (tmp_path / INDEX).exists()
    assert not (tmp_path / "out.safetensors").exists()
    assert opened(tmp_path) is None
    assert write(tmp_path, 20).returncode == 0
    assert opened(tmp_path) == content(20)
    assert len(tree(tmp_path)) == SHARDS + 1


def test_an_undisturbed_run_renames_once_a_file(tmp_path: Path) -> None:
    """So that the moments above are all there are."""
    ended = write(tmp_path, 10)
    assert (ended.returncode, ended.stdout.split()) == (0, [str(SHARDS + 1)])
    assert opened(tmp_path) == content(10)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {f"t{at}": f"out-{at + 1:05}-of-{SHARDS:05}.safetensors" for at in range(SHARDS)}


def test_old_and_new_shards_are_never_mixed(tmp_path: Path) -> None:
    """With an earlier output of the same names: what opens is all old or all new, at every one of the moments."""
    seen = []
    for moment in range(1, 4 * SHARDS):
        place = tmp_path / str(moment)
        place.mkdir()
        assert write(place, 10).returncode == 0
        ended = write(place, 20, moment)
        if ended.returncode == 0:
            break
        seen.append(opened(place))
        assert seen[-1] in (None, content(10), content(20)), moment
    assert opened(place) == content(20)
    assert seen[0] == content(10), "the first moment is before the first rename"
    assert len(seen) == 2 * (SHARDS + 1), "every old file is put aside and every new one in place"


# ------------------------------------------------------------------------------------------------------------------- of a merge


def _struck_at_rename(moment: int) -> None:
    """SIGKILL to this process just before its n-th rename."""
    count = [0]
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def struck(*given: Any, real: Any = real, **options: Any) -> Any:
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)

        setattr(os, name, struck)


@pytest.mark.filterwarnings("ignore")
def test_a_merged_folder_is_complete_or_not_there(inputs: Path, tmp_path: Path) -> None:
    """Four shards, an index, a config, a vocabulary: no OUT before the very last of all renames."""
    words = ["merge", str(inputs / "base"), str(inputs / "words"), str(tmp_path / "out")]
    moments = 0
    for moment in range(1, 30):
        code, _ = ends(words, _struck_at_rename, moment)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        moments += 1
        assert not (tmp_path / "out").exists(), moment
    assert moments >= 2
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 4
    assert set(open_source(tmp_path / "out").tensors) == set(open_source(inputs / "base").tensors)
    assert {name for name in tree(tmp_path) if "/" not in name} == {"out"}
