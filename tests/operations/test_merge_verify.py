"""`merge --verify` finds what is wrong: exit 4, the layer named, no output. That it passes what is right: `test_merge_verify_right`.

Defects are planted in the arithmetic, between the factors and the sum, or in the finished file before it is looked at. Deltas are
0.1 % of the weight: in bf16 three quarters of the entries do not move at all, and a wrong delta hides below that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.adapters.adapter import RowDelta
from loratools.errors import CheckFailed
from loratools.operations import merge as operation
from loratools.operations.merge import merge
from loratools.operations.merging import arithmetic
from tests.operations import merge_by_hand as hand
from tests.operations import test_merge_numbers as numbers
from tests.operations import test_merge_scaled as scales
from tests.operations.merge_by_hand import BLOCK, NORM, QKV, UP, Q, Tensors, noise

K, O = (Q.replace("q_proj", name) for name in ("k_proj", "o_proj"))  # noqa: E741
SQUARE = (Q, K, O)
SIZE = 256
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model(dtype: torch.dtype) -> Tensors:
    found = hand.language_model(SIZE, dtype)
    return found | {f"{name}.weight": noise(SIZE, SIZE, seed=number).to(dtype) for number, name in enumerate(SQUARE)}


def pairs_of(base: Tensors, ratio: float = 0.001) -> dict[str, hand.Pair]:
    return {
        name: hand.pair(base[f"{name}.weight"].shape, 8, 16.0, 10 * number).sized(ratio, base[f"{name}.weight"])
        for number, name in enumerate((*SQUARE, UP))
    }


class Case:
    """A base, an adapter for all its matrices, and a merge of them that verifies."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.base = folder, model(dtype)
        self.pairs = pairs_of(self.base)
        self.source = hand.save(folder / "base.safetensors", self.base)
        self.adapter = hand.peft(folder / "adapter", self.pairs)
        self.out = folder / "out.safetensors"

    def merge(self, **options: Any) -> dict[str, Any]:
        return merge(self.source, [(self.adapter, 1.0)], self.out, verify=True, **options)

    def found(self, *named: str, **options: Any) -> str:
        """What the failed check says: it names these tensors and no other, and leaves nothing behind."""
        before = sorted(self.folder.iterdir())
        with pytest.raises(CheckFailed) as caught:
            self.merge(**options)
        assert caught.value.exit_code == 4
        assert sorted(self.folder.iterdir()) == before
        assert sorted(named) == sorted(
            key for key in self.base if any(line.startswith((f"{key} ", f"{key}:")) for line in caught.value.details)
        )
        assert len(caught.value.details) == len(named)
        return "\n".join(caught.value.details)


@pytest.fixture(params=DTYPES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(tmp_path, DTYPES[request.param])


def sharded(folder: Path, base: Tensors) -> Path:
    """Two shards with an index: what an adapter changes in one, the rest and one of the matrices in the other."""
    folder.mkdir()
    files = {key: "model-00002-of-00002.safetensors" if key.startswith((NORM, UP)) else "model-00001-of-00002.safetensors" for key in base}
    for name in set(files.values()):
        hand.save(folder / name, {key: value for key, value in base.items() if files[key] == name})
    size = sum(value.numel() * value.element_size() for value in base.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}))
    return folder


# ------------------------------------------------------------------------------------------------- defects of the arithmetic


def planted(monkeypatch: pytest.MonkeyPatch, site: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """ΔW of one site (its path ends in `site`) replaced by what `change` makes of it."""
    original = arithmetic.row_delta

    def row_delta(term: Any, region: Any, base: Any, dtype: torch.dtype) -> RowDelta:
        block = original(term, region, base, dtype)
        if not str(region.site).endswith(site):
            return block
        height = region.place.stop - region.place.start
        weight = torch.zeros(height, base.tensors[region.place.key].shape[1], dtype=dtype)
        whole = change(block.rows(0, height, weight))
        return RowDelta(lambda start, stop, _: whole[start:stop].clone())

    monkeypatch.setattr(arithmetic, "row_delta", row_delta)


@pytest.mark.parametrize("times", [2.0, 0.5, 1.1, -1.0, 0.0])
def test_a_wrong_scale(times: float, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha twice, halved, a tenth too large, of the wrong sign; 0: the layer was skipped."""
    planted(monkeypatch, ".k_proj", lambda delta: delta * times)
    case.found(f"{K}.weight")


@pytest.mark.parametrize("times", [2.0, 0.0])
def test_a_wrong_scale_under_stochastic_rounding(times: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """|W| in [1, 2), Δ a fraction of a step: each value written is one of the two around its sum, and only their mean tells."""
    base = {key: (value.sign() * (1.25 + value.abs() % 0.7)).to(torch.bfloat16) for key, value in model(torch.float32).items()}
    adapter, source = hand.peft(tmp_path / "adapter", pairs_of(base, 0.0004)), hand.save(tmp_path / "base.safetensors", base)
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 5, "verify": True}
    assert merge(source, [(adapter, 1.0)], tmp_path / "right.safetensors", **options)["verify"]["ok"]
    planted(monkeypatch, ".mlp.up_proj", lambda delta: delta * times)
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", **options)
    assert [line.split(" ")[0] for line in caught.value.details] == [f"{UP}.weight"]
    assert "the projection on the delta is not what rounding predicts" in caught.value.details[0]


def test_a_wrong_scale_of_every_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "", lambda delta: delta * 1.1)
    case.found(*(f"{name}.weight" for name in (*SQUARE, UP)))


DEFECTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda delta: delta.t().contiguous(),
    "rows shifted": lambda delta: delta.roll(1, 0),
    "columns shifted": lambda delta: delta.roll(1, 1),
    "halves exchanged": lambda delta: delta.roll(SIZE // 2, 0),
    "last rows forgotten": lambda delta: torch.cat([delta[:-16], torch.zeros_like(delta[:16])]),
    "rounded to bf16": lambda delta: delta.bfloat16().to(delta.dtype) * 1.02,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_wrong_delta_on_a_square_layer(defect: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes fit, norms are right: only the values can tell."""
    planted(monkeypatch, ".o_proj", DEFECTS[defect])
    case.found(f"{O}.weight")


def test_b_transposed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """B^T read as B: (rank, out) laid out as (out, rank)."""
    one = case.pairs[O]
    wrong = hand.Pair(one.up.t().reshape(one.up.shape), one.down, one.alpha).delta()
    assert float(wrong.norm()) == pytest.approx(float(one.delta().norm()), rel=0.3)
    planted(monkeypatch, ".o_proj", lambda delta: wrong.to(delta.dtype))
    case.found(f"{O}.weight")


def test_q_and_k_exchanged(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, other in ((".q_proj", K), (".k_proj", Q)):
        wrong = case.pairs[other].delta()
        planted(monkeypatch, name, lambda delta, wrong=wrong: wrong.to(delta.dtype))
    case.found(f"{Q}.weight", f"{K}.weight")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_q_and_k_exchanged_in_a_joined_weight(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h = 96
    base = hand.flux(dtype, h)
    cut = base[f"{QKV}.weight"][:h]
    pairs = {f"{BLOCK}.to_{part}": hand.pair((h, h), 4, 4.0, seed).sized(0.001, cut) for seed, part in enumerate("qkv")}
    adapter = hand.diffusers(tmp_path / "adapter.safetensors", pairs)
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    assert merge(source, [(adapter, 1.0)], tmp_path / "right.safetensors", verify=True)["verify"]["sites"] == 3
    for name, other in ((".to_q", "k"), (".to_k", "q")):
        wrong = pairs[f"{BLOCK}.to_{other}"].delta()
        planted(monkeypatch, name, lambda delta, wrong=wrong: wrong.to(delta.dtype))
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], out, verify=True)
    assert not out.exists()
    assert sorted(line.split(":")[0] for line in caught.value.details) == [f"{QKV}.weight (denoiser.{BLOCK}.to_{part})" for part in "kq"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_wrong_bias(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = hand.flux(dtype, 64)
    modules = {QKV: {"diff_b": noise(192, seed=1) * 0.05}, hand.LAST: {"diff_b": noise(128, seed=2) * 0.05}}
    adapter = hand.lycoris(tmp_path / "adapter.safetensors", modules)
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    merge(source, [(adapter, 1.0)], tmp_path / "right.safetensors", arch="flux", verify=True)
    original = arithmetic.bias_delta

    def wrong(region: Any, base: Any) -> torch.Tensor:
        delta = original(region, base)
        return delta.roll(len(delta) // 2) if str(region.site).endswith("norm_out.linear") else delta

    monkeypatch.setattr(arithmetic, "bias_delta", wrong)
    with pytest.raises(CheckFailed, match="did not hold") as caught:
        merge(source, [(adapter, 1.0)], out, arch="flux", verify=True)
    assert not out.exists()
    assert [line.split(" ")[0] for line in caught.value.details] == [f"{hand.LAST}.bias"]


# ---------------------------------------------------------------------------------------------------- defects of what is written


def damaged(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """The finished file or folder changed before anything looks at it."""
    original = operation.write_checkpoint

    def write(*arguments: Any, check: Callable[[Path], None], **options: Any) -> Any:
        def checked(path: Path) -> None:
            change(path)
            check(path)

        return original(*arguments, check=checked, **options)

    monkeypatch.setattr(operation, "write_checkpoint", write)


def corrupted(monkeypatch: pytest.MonkeyPatch, key: str, change: Callable[[bytearray], bytearray], file: str = "") -> None:
    """The bytes of a tensor in the finished file (of a folder: in `file`) replaced."""
    damaged(monkeypatch, lambda path: overwrite(path / file if file else path, key, change))


def overwrite(path: Path, key: str, change: Callable[[bytearray], bytearray]) -> None:
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start, stop = (8 + size + offset for offset in json.loads(data[8 : 8 + size])[key]["data_offsets"])
    piece = change(data[start:stop])
    assert len(piece) == stop - start
    assert piece != data[start:stop]
    data[start:stop] = piece
    with path.open("r+b") as file:
        file.write(data)


def flipped(bit: int, place: float = 0.5) -> Callable[[bytearray], bytearray]:
    """One bit of the last byte of an entry, the one with sign and exponent; place: how far into the tensor."""

    def change(data: bytearray) -> bytearray:
        data[int(len(data) * place) // 4 * 4 + 3] ^= 1 << bit
        return data

    return change


@pytest.mark.parametrize("bit", [0, 7], ids=["exponent", "sign"])
@pytest.mark.parametrize("key", [f"{Q}.weight", f"{Q}.bias", f"{NORM}.weight"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_one_flipped_byte(key: str, bit: int, place: float, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a merged tensor and in two that no adapter touches."""
    corrupted(monkeypatch, key, flipped(bit, place))
    case.found(key)


def test_the_last_bit_of_an_untouched_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupted(monkeypatch, f"{NORM}.weight", lambda data: bytearray([data[0] ^ 1]) + data[1:])
    assert "no adapter changes it" in case.found(f"{NORM}.weight")


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_shifted_in_the_file(rows: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    width = SIZE * case.base[f"{UP}.weight"].element_size() * rows
    corrupted(monkeypatch, f"{UP}.weight", lambda data: data[width:] + data[:width])
    case.found(f"{UP}.weight")


def test_a_block_that_was_not_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's rows where merged ones belong: the delta is a thousandth of them."""
    old = hand.bits(case.base[f"{K}.weight"]).numpy().tobytes()
    half = len(old) // 2
    corrupted(monkeypatch, f"{K}.weight", lambda data: data[:half] + bytearray(old[half:]))
    case.found(f"{K}.weight")


def beside(case: Case, key: str, places: torch.Tensor, towards: torch.Tensor) -> Callable[[bytearray], bytearray]:
    """The values at these places of the flat tensor moved to their neighbours, up where `towards` is positive."""

    def change(data: bytearray) -> bytearray:
        codes = torch.frombuffer(data, dtype=torch.int16).clone()
        up = (towards[places] > 0) == (codes[places] >= 0)  # sign and magnitude: the next code is farther from zero
        codes[places] += torch.where(up, 1, -1).to(torch.int16)
        return bytearray(codes.numpy().tobytes())

    return change


def test_one_in_a_hundred_entries_rounded_the_wrong_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No entry is off by more than a step, and at random: the projection does not see it."""
    case, key = Case(tmp_path, torch.bfloat16), f"{K}.weight"
    places = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(1))[: SIZE * SIZE // 100]
    corrupted(monkeypatch, key, beside(case, key, places, noise(SIZE * SIZE, seed=2)))
    assert "not the nearest values" in case.found(key)


def test_few_entries_moved_along_the_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as chance may move, but those where Δ is largest, and all in its direction."""
    case, key = Case(tmp_path, torch.bfloat16), f"{K}.weight"
    delta = case.pairs[K].delta().flatten()
    places = (delta.abs() * case.base[key].double().flatten().abs()).argsort(descending=True)[: SIZE * SIZE // 250]
    corrupted(monkeypatch, key, beside(case, key, places, delta))
    assert "the projection on the delta is not what rounding predicts" in case.found(key)


def test_nan_in_the_file(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupted(monkeypatch, f"{O}.weight", lambda data: data[:-4] + bytearray(b"\xff\xff\xff\xff"))
    case.found(f"{O}.weight")


@pytest.mark.parametrize("key", [f"{UP}.weight", f"{NORM}.weight"])
def test_a_shard(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is looked at before it has its name, as a file is."""
    base = model(torch.bfloat16)
    folder, adapter = sharded(tmp_path / "base", base), hand.peft(tmp_path / "adapter", pairs_of(base))
    before = sorted(tmp_path.iterdir())
    corrupted(monkeypatch, key, flipped(7), "model-00002-of-00002.safetensors")
    with pytest.raises(CheckFailed) as caught:
        merge(folder, [(adapter, 1.0)], tmp_path / "out", verify=True)
    assert [line.split(" ")[0].rstrip(":") for line in caught.value.details] == [key]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_of_a_joined_weight_that_no_adapter_changes(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter for q alone: the rows of k and v must be the base's."""
    base = hand.flux(dtype)
    one = hand.pair((hand.WIDTH, hand.WIDTH), 4, 4.0)
    tensors = {f"transformer.{BLOCK}.to_q.lora_{leaf}.weight": value for leaf, value in (("A", one.down), ("B", one.up))}
    adapter = hand.save(tmp_path / "adapter.safetensors", tensors)
    source, out = hand.save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    corrupted(monkeypatch, f"{QKV}.weight", flipped(7, 0.8))
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], out, verify=True)
    assert f"{QKV}.weight" in str(caught.value.details)
    assert not out.exists()


def test_a_tensor_that_is_only_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, torch.float32)
    corrupted(monkeypatch, f"{NORM}.weight", flipped(7))
    case.found(f"{NORM}.weight", dtype="BF16")


@pytest.mark.parametrize("leaf", [f"{Q}.scale_weight", f"{Q}.weight", f"{UP}.input_scale", f"{NORM}.weight"])
def test_scaled_fp8_codes_scales_and_markers(leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = scales.scaled(*scales.SCALES["scale_weight"])
    adapter = hand.peft(tmp_path / "adapter", numbers.pairs_for(hand.language_model(176, torch.float32), 0.01))
    source = hand.save(tmp_path / "base.safetensors", base)
    corrupted(monkeypatch, leaf, flipped(7, 0.0) if not leaf.endswith("scale") else flipped(0, 0.0))
    with pytest.raises(CheckFailed) as caught:
        merge(source, [(adapter, 1.0)], tmp_path / "out.safetensors", verify=True)
    assert leaf.removesuffix(".scale_weight") in str(caught.value.details)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_output_that_was_there_stays(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """--force replaces the old output only with one that verified."""
    case.out.write_bytes(b"the old one")
    corrupted(monkeypatch, f"{Q}.weight", flipped(7))
    case.found(f"{Q}.weight", force=True)
    assert case.out.read_bytes() == b"the old one"
    monkeypatch.undo()
    case.merge(force=True)
    assert load_file(case.out).keys() == case.base.keys()


def test_without_verify_nothing_is_looked_at(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted defect is there: it is the verification that finds it."""
    planted(monkeypatch, ".k_proj", torch.zeros_like)
    result = merge(case.source, [(case.adapter, 1.0)], case.out)
    assert "verify" not in result
    with safe_open(case.out, "pt") as file:
        assert torch.equal(file.get_tensor(f"{K}.weight"), case.base[f"{K}.weight"])
