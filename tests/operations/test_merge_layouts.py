"""merge into every layout: the base's own layout comes out, with W + Σ weight · s · BA in it and every other byte as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fixtures import adapters, checkpoints, layouts
from loratools.errors import UsageError
from loratools.operations.merge import merge
from loratools.operations.merging import arithmetic
from tests.operations.merged import Change, Raw, State, assert_merged, base_states, changes, in_folder, in_single, weights
from tests.parity.merging import ALPHAS, RANKS, Factors, factors_of, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

Rename = Callable[[Mapping[str, State]], State]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """diffusers takes seconds to import: not in the first test's time."""
    checkpoints.models("sd1")


def made(architecture: str, seed: int = 0, only: tuple[str, ...] = ()) -> Factors:
    """Factors of mixed ranks and alphas on every layer of every model, or of some of them."""
    found = factors_of(architecture, ranks=RANKS, alphas=ALPHAS, seed=seed)
    return {folder: parts for folder, parts in found.items() if not only or folder in only}


def change_of(architecture: str, rename: Rename, *given: tuple[Factors, float]) -> Change:
    deltas, sizes = changes(base_states(architecture), given)
    return Change(rename(deltas), rename(sizes))


def adapter(folder: Path, architecture: str, factors: Factors, dialect: str = "diffusers", name: str = "style") -> Path:
    return save_adapter(folder / f"{name}.safetensors", architecture, dialect, factors)


def single(architecture: str) -> Rename:
    return lambda states: in_single(architecture, states)


def folder(architecture: str) -> Rename:
    return lambda states: in_folder(architecture, states)


# -------------------------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize(
    ("architecture", "dtype", "dialect"),
    [
        ("sd1", "float16", "kohya"),
        ("sd2", "float32", "diffusers"),
        ("sdxl", "float16", "diffusers"),  # q, k, v of the second encoder are rows of one parameter
        ("sd3", "bfloat16", "diffusers"),
        ("flux", "float32", "kohya"),
    ],
)
def test_original_single_files(architecture: str, dtype: str, dialect: str, tmp_path: Path) -> None:
    """VAE, EMA copies, integer buffers and schedules of another dtype pass through; denoiser and text encoders change."""
    factors = made(architecture)
    base, given = checkpoints.single(architecture, tmp_path / "base.safetensors", dtype), adapter(tmp_path, architecture, factors, dialect)
    result = merge(base, [(given, 0.7)], tmp_path / "out.safetensors")
    change = change_of(architecture, single(architecture), (factors, 0.7))
    assert result["changed"] == assert_merged(base, tmp_path / "out.safetensors", change, [(given, 0.7)])
    assert result["sites"] == sum(len(modules) for modules in factors.values())
    assert result["changed"] + result["unchanged"] == result["tensors"] == len(Raw.of(base).entries)


def test_flux_and_sd35_without_the_rest_of_the_pipeline(tmp_path: Path) -> None:
    model = checkpoints.sd35_transformer()
    sd35 = {"transformer": adapters.factors(model, adapters.layers(model), ranks=RANKS, alphas=ALPHAS)}
    flux = made("flux", only=("transformer",))
    flux_states = {"transformer": base_states("flux")["transformer"]}
    cases: list[tuple[str, Path, Factors, Mapping[str, State], Rename]] = [
        ("flux", checkpoints.flux_bare(tmp_path / "bare.safetensors"), flux, flux_states, lambda states: in_single("flux", states, "")),
        ("flux", checkpoints.flux_prefixed(tmp_path / "prefixed.safetensors", "float16"), flux, flux_states, single("flux")),
        (
            "sd3",
            checkpoints.sd35_bare(tmp_path / "sd35.safetensors"),
            sd35,
            {"transformer": checkpoints.state(model)},
            lambda states: layouts.denoiser("sd3", states["transformer"]),
        ),
    ]
    for architecture, base, factors, states, rename in cases:
        given, out = adapter(tmp_path, architecture, factors, name=f"for-{base.stem}"), tmp_path / f"out-{base.name}"
        merge(base, [(given, -1.3)], out)
        deltas, sizes = changes(states, [(factors, -1.3)])
        assert assert_merged(base, out, Change(rename(deltas), rename(sizes)), [(given, -1.3)]) >= 36


def test_a_pickle_becomes_safetensors(tmp_path: Path) -> None:
    """The state dict of a .ckpt, in its order; what is beside it (global_step) is no tensor. A pickle is never written."""
    factors = made("sd1")
    base, given = checkpoints.sd1_ckpt(tmp_path / "base.ckpt", "float16"), adapter(tmp_path, "sd1", factors)
    merge(base, [(given, 0.7)], tmp_path / "out.safetensors")
    same = checkpoints.single("sd1", tmp_path / "same.safetensors", "float16")
    merge(same, [(given, 0.7)], tmp_path / "from-same.safetensors")
    found, wanted = Raw.of(tmp_path / "out.safetensors"), Raw.of(tmp_path / "from-same.safetensors")
    assert list(found.entries) == list(checkpoints.single_tensors("sd1", "float16"))
    assert {key: found.bytes(key) for key in found.entries} == {key: wanted.bytes(key) for key in wanted.entries}
    assert {key: entry["dtype"] for key, entry in found.entries.items()} == {key: entry["dtype"] for key, entry in wanted.entries.items()}
    assert json.loads(found.metadata["loratools.merge"])[0]["base"]["name"] == "base.ckpt"
    assert found.metadata["format"] == "pt"
    for name in ("out.ckpt", "out.pt", "out.bin"):
        with pytest.raises(UsageError, match="only safetensors is written"):
            merge(base, [(given, 0.7)], tmp_path / name)
        assert not (tmp_path / name).exists()


# ------------------------------------------------------------------------------------------------------------------- folders


def others(path: Path) -> dict[str, bytes]:
    """Every file of a folder that holds no weights and is no index."""
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".safetensors" and ".index." not in file.name]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize(("architecture", "dtype"), [("sd1", "float16"), ("sdxl", "float32"), ("sd3", "float16"), ("flux", "bfloat16")])
def test_pipeline_folders(architecture: str, dtype: str, tmp_path: Path) -> None:
    """Configurations, tokenizers, the scheduler and what a person put beside them come along as they are."""
    factors = made(architecture)
    base, given = checkpoints.folder(architecture, tmp_path / "base", dtype), adapter(tmp_path, architecture, factors)
    (base / "README.md").write_bytes(b"by hand\r\n")
    (base / "scheduler" / "notes").mkdir()
    (base / "scheduler" / "notes" / "thumb.png").write_bytes(b"\x89PNG\0")
    merge(base, [(given, 0.7)], tmp_path / "out")
    assert_merged(base, tmp_path / "out", change_of(architecture, folder(architecture), (factors, 0.7)), [(given, 0.7)])
    assert others(tmp_path / "out") == others(base)
    assert {"model_index.json", "README.md", "scheduler/notes/thumb.png"} <= others(base).keys()


def test_a_model_folder_alone(tmp_path: Path) -> None:
    """`unet` or `transformer` of a pipeline, given by itself."""
    for architecture, part in (("sd1", "unet"), ("flux", "transformer")):
        factors = made(architecture, only=(part,))
        base = shutil.copytree(checkpoints.folder(architecture, tmp_path / f"{architecture}-all") / part, tmp_path / f"{architecture}-part")
        given, out = adapter(tmp_path, architecture, factors, name=architecture), tmp_path / f"{architecture}-out"
        merge(base, [(given, 0.7)], out)
        deltas, sizes = changes({part: base_states(architecture)[part]}, [(factors, 0.7)])
        assert_merged(base, out, Change(deltas[part], sizes[part]), [(given, 0.7)])
        assert others(out) == others(base) != {}


@pytest.mark.parametrize("through", ["folder", "index"])
def test_shards_and_their_index(through: str, tmp_path: Path) -> None:
    """Shards stay shards, each with the tensors it had; total_size is what was written, other entries of the index survive."""
    factors = made("flux", only=("transformer",))
    pipeline = checkpoints.folder("flux", tmp_path / "pipeline", "float16", max_shard_size="100KB")
    base = pipeline / "transformer"
    index = base / "diffusion_pytorch_model.safetensors.index.json"
    page = json.loads(index.read_text())
    page["metadata"] |= {"total_size": 12, "made_by": "hand"}
    index.write_text(json.dumps(page))
    given, opened = adapter(tmp_path, "flux", factors), index if through == "index" else base
    merge(opened, [(given, 0.7)], tmp_path / "out")
    deltas, sizes = changes({"transformer": base_states("flux")["transformer"]}, [(factors, 0.7)])
    change = Change(deltas["transformer"], sizes["transformer"])
    assert len(weights(base)) == 3
    assert assert_merged(base, tmp_path / "out", change, [(given, 0.7)], opened.name) == len(factors["transformer"])
    written = json.loads((tmp_path / "out" / index.name).read_text())
    assert written["weight_map"] == page["weight_map"]
    assert written["metadata"] == {**page["metadata"], "total_size": sum(len(Raw.of(file).payload) for file in weights(base).values())}
    assert others(tmp_path / "out") == others(base)


def test_a_variant_is_left_out_or_is_the_model(tmp_path: Path) -> None:
    """Plain weights and their fp16 variant: the variant would be the unmerged model, so it stays behind, and the result says so."""
    factors = made("flux", only=("transformer",))
    given = adapter(tmp_path, "flux", factors)
    base = checkpoints.folder("flux", tmp_path / "base")
    only = checkpoints.folder("flux", tmp_path / "only", "float16", variant="fp16")
    variants = list(only.rglob("*.fp16.safetensors"))
    assert len(variants) == 4
    change = change_of("flux", folder("flux"), (factors, 0.7))
    result = merge(only, [(given, 0.7)], tmp_path / "out-only")
    assert result["left_out"] == []
    assert_merged(only, tmp_path / "out-only", change, [(given, 0.7)])
    for file in variants:
        shutil.copy(file, base / file.relative_to(only))
    (base / "transformer" / "model.onnx").write_bytes(b"old weights")
    (base / ".git").mkdir()
    (base / ".git" / "config").write_text("history")
    result = merge(base, [(given, 0.7)], tmp_path / "out")
    left = {str(file.relative_to(only)) for file in variants} | {"transformer/model.onnx"}
    assert {one["path"] for one in result["left_out"]} == left
    assert all("unchanged weights" in one["reason"] for one in result["left_out"])
    assert all(any(name in warning for warning in result["warnings"]) for name in left)
    for name in (*left, ".git"):
        assert not (tmp_path / "out" / name).exists()
        (shutil.rmtree if name == ".git" else Path.unlink)(base / name)
    assert_merged(base, tmp_path / "out", change, [(given, 0.7)])
    assert others(tmp_path / "out") == others(base)


# ---------------------------------------------------------------------------------------------------------- several adapters


@pytest.fixture
def flux(tmp_path: Path) -> tuple[Path, list[tuple[Path, float]], Change]:
    """An all-in-one Flux in half precision, and three adapters of other dialects, ranks and weights."""
    sets = [made("flux", seed=10), made("flux", seed=20, only=("transformer",)), made("flux", seed=30, only=("text_encoder",))]
    dialects, amounts = ("kohya", "diffusers", "diffusers"), (0.8, -0.5, 1.7)
    paths = [adapter(tmp_path, "flux", one, dialect, f"{number}") for number, (one, dialect) in enumerate(zip(sets, dialects, strict=True))]
    change = change_of("flux", single("flux"), *zip(sets, amounts, strict=True))
    return checkpoints.single("flux", tmp_path / "base.safetensors", "float16"), list(zip(paths, amounts, strict=True)), change


def test_several_adapters_are_summed_in_no_order(flux: Any, tmp_path: Path) -> None:
    base, given, change = flux
    digests = set()
    for number, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 0, 2])):
        for threads in (1, 4):
            out = tmp_path / f"out-{number}-{threads}.safetensors"
            result = merge(base, [given[index] for index in order], out, threads=threads)
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
            assert [(one["path"], one["weight"]) for one in result["adapters"]] == [(str(given[at][0]), given[at][1]) for at in order]
    assert len(digests) == 1
    assert_merged(base, out, change, given)


@pytest.mark.parametrize("block", [1, 300, 4000])
def test_blocks_of_rows_do_not_show(block: int, flux: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Tensors larger than a block: rows of q, k and v that begin and end within one, halves that are exchanged across two."""
    base, given, change = flux
    monkeypatch.setattr(arithmetic, "BLOCK", block)
    merge(base, given, tmp_path / "out.safetensors", threads=3, verify=True)
    assert_merged(base, tmp_path / "out.safetensors", change, given)


def test_the_same_file_twice_is_the_sum_of_its_weights(flux: Any, tmp_path: Path) -> None:
    base, given, _ = flux
    path = given[0][0]
    merge(base, [(path, 0.3), (path, 0.5)], tmp_path / "twice.safetensors")
    assert_merged(base, tmp_path / "twice.safetensors", _first_alone(), [(path, 0.3), (path, 0.5)])


def _first_alone() -> Change:
    return change_of("flux", single("flux"), (made("flux", seed=10), 0.3), (made("flux", seed=10), 0.5))


def test_weight_0_changes_nothing(flux: Any, tmp_path: Path) -> None:
    """Alone it leaves the base's very bytes; beside another adapter it adds not a bit."""
    base, given, _ = flux
    result = merge(base, [(given[0][0], 0.0)], tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == base.read_bytes()
    assert (result["changed"], result["unchanged"], result["delta_retained"]) == (0, result["tensors"], None)
    assert "plan" not in result  # that is what --dry-run tells
    merge(base, [(given[1][0], 0.8), (given[0][0], 0.0)], tmp_path / "with.safetensors")
    merge(base, [(given[1][0], 0.8)], tmp_path / "without.safetensors")
    found, wanted = Raw.of(tmp_path / "with.safetensors"), Raw.of(tmp_path / "without.safetensors")
    assert found.payload == wanted.payload != Raw.of(base).payload


def test_taking_an_adapter_out_again(tmp_path: Path) -> None:
    """+1, then -1 on the result: in float32 the base to 1e-6; both merges are on record."""
    factors = made("flux")
    base, given = checkpoints.single("flux", tmp_path / "base.safetensors"), adapter(tmp_path, "flux", factors)
    merge(base, [(given, 1.0)], tmp_path / "there.safetensors")
    merge(tmp_path / "there.safetensors", [(given, -1.0)], tmp_path / "back.safetensors")
    first, there, back = (Raw.of(tmp_path / f"{name}.safetensors") for name in ("base", "there", "back"))
    records = json.loads(back.metadata["loratools.merge"])
    assert [(record["base"]["name"], record["adapters"][0]["weight"]) for record in records] == [
        ("base.safetensors", 1.0),
        ("there.safetensors", -1.0),
    ]
    moved = 0
    for key, entry in first.entries.items():
        if entry["dtype"] != "F32":
            continue
        old, apart = first.tensor(key), (there.tensor(key) - first.tensor(key)).norm()
        moved += bool(apart > 1e-3 * old.norm())
        assert (back.tensor(key) - old).norm() <= 1e-6 * (old.norm() + apart), key
    assert moved == len(change_keys(factors))


def change_keys(factors: Factors) -> set[str]:
    """The tensors of a single file that an adapter reaches."""
    change = change_of("flux", single("flux"), (factors, 1.0))
    return {key for key, size in change.size.items() if size.any()}
