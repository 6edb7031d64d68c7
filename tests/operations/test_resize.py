"""resize against dense float64 by hand: what resizes have got wrong before (R2 to R4, R7, R8), and what must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from loratools.adapters.algebra import Criterion
from loratools.adapters.kinds import build
from loratools.errors import InputError, UsageError
from loratools.operations.resize import resize
from loratools.operations.resizing.modules import Goal, resized
from loratools.operations.resizing.spectrum import spectrum_of
from loratools.tensors.lazy import from_torch
from tests.operations.made import Make, Save, factors, parts, written
from tests.operations.resized import (
    A,
    C,
    P,
    anchor,
    error_of,
    kind_of,
    rank_in,
    same,
    spectrum,
    whole_error,
)  # fmt: skip
from tests.reference import deltas

# -------------------------------------------------------------------------------------------------------------- R2: how many are kept


def of_spectrum(shares: list[float], randn: Make) -> dict[str, torch.Tensor]:
    """A LoRA whose squared singular values have these shares, in float64."""
    left, right = (torch.linalg.qr(randn(16, len(shares), dtype=torch.float64))[0] for _ in range(2))
    sigma = torch.tensor(shares, dtype=torch.float64).sqrt()
    return written(A, left * sigma, right.t().contiguous(), float(len(shares)))


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.89, 1), (0.9, 1), (0.94, 2), (0.95, 2), (0.96, 3), (1.0, 3)])
def test_the_fewest_ranks_that_reach_the_energy(energy: float, rank: int, randn: Make, save: Save, tmp_path: Path) -> None:
    """R2: sv_cumulative kept one more than needed, and never fewer than two."""
    a, out = save("a.safetensors", {**of_spectrum([0.9, 0.05, 0.05], randn), **anchor(randn)}), tmp_path / "out.safetensors"
    resize(a, out, energy=energy)
    assert rank_in(out, A) == rank


@pytest.mark.parametrize(("error", "rank"), [(0.32, 1), (0.31, 2), (0.23, 2), (0.22, 3), (0.0, 3)])
def test_the_fewest_ranks_within_the_error(error: float, rank: int, randn: Make, save: Save, tmp_path: Path) -> None:
    """√0.1 = 0.3162 goes with two of them, √0.05 = 0.2236 with one."""
    a, out = save("a.safetensors", {**of_spectrum([0.9, 0.05, 0.05], randn), **anchor(randn)}), tmp_path / "out.safetensors"
    resize(a, out, error=error)
    assert rank_in(out, A) == rank


@pytest.mark.parametrize(("ratio", "rank"), [(1.0, 1), (2.9, 1), (3.0, 2), (9.0, 3), (26.0, 3), (27.0, 4)])
def test_the_ratio_of_singular_values(ratio: float, rank: int, randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", {**of_spectrum([1, 1 / 9, 1 / 81, 1 / 729], randn), **anchor(randn)})
    resize(a, tmp_path / "out.safetensors", ratio=ratio)
    assert rank_in(tmp_path / "out.safetensors", A) == rank


def test_the_most_caps_what_the_spectrum_asks_for(randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = {**kind_of("lora", randn), **kind_of("conv", randn), **anchor(randn)}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    resize(a, out, energy=0.99, conv_rank=2, max_rank=3)
    assert (rank_in(out, A), rank_in(out, C), rank_in(out, P)) == (3, 2, 1)
    resize(a, out, conv_rank=4, force=True)
    assert (rank_in(out, A), rank_in(out, C)) == (6, 4)
    resize(a, out, rank=2, conv_rank=5, max_rank=4, force=True)
    assert (rank_in(out, A), rank_in(out, C)) == (2, 4)


# --------------------------------------------------------------------------------------------------------------- R3: factors alone


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else (result,):
            if isinstance(found, torch.Tensor):
                self.size = max(self.size, found.numel())
        return result


OUT, IN = 320, 256


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA keys with the words of the canonical adapter."""
    return {key.replace("lora_up.weight", "up").replace("lora_down.weight", "down"): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("goal", [Criterion(rank=3), Criterion(energy=0.7), Criterion(error=0.5)], ids=["rank", "energy", "error"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr-full"])
def test_no_matrix_of_the_weights_size_is_made(kind: str, goal: Criterion, randn: Make, save: Save) -> None:
    """R3: a full SVD of up @ down takes hours on a large model."""
    tensors = {
        "lora": written(A, randn(OUT, 12), randn(12, IN), 3.0),
        "loha": {f"{A}.hada_w{n}_{part}": randn(*shape) for n in (1, 2) for part, shape in (("a", (OUT, 4)), ("b", (4, IN)))},
        "lokr": {f"{A}.lokr_w1": randn(8, 8), f"{A}.lokr_w2_a": randn(OUT // 8, 4), f"{A}.lokr_w2_b": randn(4, IN // 8)},
        "lokr-full": {f"{A}.lokr_w1": randn(8, 8), f"{A}.lokr_w2": randn(OUT // 8, IN // 8)},
    }[kind]
    path = save("a.safetensors", tensors)
    (module,) = build({key.partition(".")[2]: from_torch(tensor) for key, tensor in renamed(tensors).items()})
    with Largest() as watch:
        made = resized(module, Goal(goal, goal, "tensor"), None)
        for tensor in made.module.factors.values():
            tensor.load()
        sigma = spectrum_of(module).sigma
    assert made.module is not module
    assert 0 < watch.size < OUT * IN
    by_hand = torch.linalg.svdvals(deltas(path)[A])
    assert torch.allclose(sigma[:12], by_hand[:12], rtol=1e-6)
    assert made.fit is not None
    wanted = deltas(path)[A]
    found = made.module.delta()
    assert made.fit.relative_error == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- R4, R8: alpha


@pytest.mark.parametrize(
    "alpha",
    [None, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3), torch.tensor(3.0).bfloat16()],
    ids=["none", "0-d", "[1]", "int", "bf16"],
)
def test_alpha_in_every_form(alpha: torch.Tensor | None, randn: Make, save: Save, tmp_path: Path) -> None:
    """R4: `NoneType / NoneType`. The module keeps its scale: alpha = 3 / 4 · 2, in float32."""
    up, down = factors(randn, (16, 16))
    tensors = {**written(A, up, down, None), **({} if alpha is None else {f"{A}.alpha": alpha})}
    a, out = save("a.safetensors", {**tensors, **anchor(randn)}), tmp_path / "out.safetensors"
    resize(a, out, rank=2)
    found = load_file(out)
    assert (f"{A}.alpha" in found) is (alpha is not None)
    if alpha is not None:
        assert found[f"{A}.alpha"].dtype == torch.float32
        assert found[f"{A}.alpha"].shape == alpha.shape
        assert float(found[f"{A}.alpha"]) == 1.5
    sigma = torch.linalg.svdvals(up.double() @ down.double())
    assert error_of(a, out, A) == pytest.approx(float((sigma[2:].square().sum() / sigma.square().sum()).sqrt()), rel=1e-5)
    up, down = (found[f"{A}.lora_{side}.weight"].double() for side in ("up", "down"))
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-5), "√σ on both sides"


@pytest.mark.parametrize(("rank", "exact"), [(4, 100.3), (2, 50.15), (3, 75.225)])
def test_alpha_is_never_rounded_with_the_factors(rank: int, exact: float, randn: Make, save: Save, tmp_path: Path) -> None:
    """R8: bf16 made 100.5 of 100.3."""
    a, out = save("a.safetensors", {**written(A, *factors(randn, (16, 16)), 100.3), **anchor(randn)}), tmp_path / "out.safetensors"
    result = resize(a, out, rank=rank, dtype="bf16")
    found = load_file(out)
    assert found[f"{A}.alpha"].dtype == torch.float32
    assert float(found[f"{A}.alpha"]) == pytest.approx(exact, rel=1e-7)
    assert {found[f"{stem}.lora_{side}.weight"].dtype for stem in (A, P) for side in ("up", "down")} == {torch.bfloat16}
    assert result["relative_error"] == pytest.approx(whole_error(a, out), rel=1e-6)


def test_an_alpha_that_float32_cannot_hold_is_made_up_for(randn: Make, save: Save, tmp_path: Path) -> None:
    """alpha 1 of rank 7 at rank 3 is 3 / 7: the factors are those of the alpha as written."""
    up, down = randn(16, 7, dtype=torch.float64), randn(7, 16, dtype=torch.float64)
    up[:, 3:] = 0
    a, out = save("a.safetensors", {**written(A, up, down, 1.0), **anchor(randn)}), tmp_path / "out.safetensors"
    resize(a, out, rank=3)
    assert float(load_file(out)[f"{A}.alpha"]) == float(torch.tensor(3 / 7))
    assert error_of(a, out, A) < 1e-14


def test_a_dtype_that_is_too_narrow_is_refused(randn: Make, save: Save, tmp_path: Path) -> None:
    up, down = factors(randn, (16, 16))
    a = save("a.safetensors", {**written(A, up * 1e6, down * 1e6, 4.0), **anchor(randn)})
    with pytest.raises(InputError, match="overflows"):
        resize(a, tmp_path / "out.safetensors", rank=2, dtype="fp16")
    assert not (tmp_path / "out.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------- R7: the edges


EDGES: dict[str, tuple[tuple[int, ...], int]] = {  # shape of the weight, rank of its factors
    "rank above both sides": ((16, 16), 24),
    "already lower": ((16, 16), 2),
    "just as asked": ((16, 16), 3),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str, randn: Make, save: Save, tmp_path: Path) -> None:
    shape, rank = EDGES[edge]
    tensors = written(A, *factors(randn, shape, rank), 2.0)
    a, out = save("a.safetensors", {**tensors, **anchor(randn)}), tmp_path / "out.safetensors"
    resize(a, out, rank=3)
    found = load_file(out)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    if rank <= 3:
        assert same(tensors, found, [*tensors])
        return
    sigma = spectrum(a, A)
    assert rank_in(out, A) == 3
    assert error_of(a, out, A) == pytest.approx(float((sigma[3:].square().sum() / sigma.square().sum()).sqrt()), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (2, 16)])
def test_a_rank_beyond_a_side_is_cut_without_a_loss(shape: tuple[int, int], randn: Make, peft: Any, tmp_path: Path) -> None:
    """One output, one input: factors of rank 4 hold a ΔW of rank 1; what goes is nothing."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    up, down = factors(randn, shape, 4)
    a = peft("a", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj"]})
    result = resize(a, tmp_path / "out", rank=3)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found[f"{stem}.lora_A.weight"].shape == (min(shape), shape[1])
    assert found[f"{stem}.lora_B.weight"].shape == (shape[0], min(shape))
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert error_of(a, tmp_path / "out", stem) < 2e-7
    assert result["ranks_after"] == {str(min(shape)): 1}


@pytest.mark.parametrize("criterion", [{"rank": 2}, {"energy": 0.9}, {"error": 0.1}, {"ratio": 4.0}], ids=str)
def test_a_zero_delta_stays_zero(criterion: dict[str, Any], randn: Make, save: Save, tmp_path: Path) -> None:
    up, down = factors(randn, (16, 16))
    a, out = save("a.safetensors", {**written(A, up * 0, down, 2.0), **anchor(randn)}), tmp_path / "out.safetensors"
    result = resize(a, out, **criterion)
    assert rank_in(out, A) == 1
    assert float(deltas(out)[A].abs().max()) == 0
    assert result["relative_error"] < 1e-7


def test_what_fits_is_not_looked_into(randn: Make, save: Save, tmp_path: Path) -> None:
    """R7: a module that could be smaller without a loss stays what it is where a number alone is asked for."""
    up, down = factors(randn, (16, 16))
    up[:, 2:] = 0
    tensors = {**written(A, up, down, 2.0), **anchor(randn)}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    assert resize(a, out, rank=4)["changed"] == 0
    assert same(tensors, load_file(out), [*tensors])
    resize(a, out, energy=1.0, force=True)
    assert rank_in(out, A) == 2


def test_a_convolution_of_three_dimensions(randn: Make, save: Save, tmp_path: Path) -> None:
    """Conv3d crashed: the patch embedding of a video model is one."""
    block = "diffusion_model.blocks.0.self_attn.q"
    up, down = randn(32, 4, 1, 1, 1), randn(4, 16, 1, 2, 2)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        f"{block}.lora_down.weight": randn(2, 32),
        f"{block}.lora_up.weight": randn(32, 2),
    }
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    resize(a, out, rank=8, conv_rank=2, arch="wan")
    found = load_file(out)
    assert found["diffusion_model.patch_embedding.lora_down.weight"].shape == (2, 16, 1, 2, 2)
    assert found["diffusion_model.patch_embedding.lora_up.weight"].shape == (32, 2, 1, 1, 1)
    assert same(tensors, found, [f"{block}.lora_down.weight", f"{block}.lora_up.weight"])
    delta = up.double().flatten(1) @ down.double().flatten(1)
    sigma = torch.linalg.svdvals(delta)
    assert error_of(a, out, "diffusion_model.patch_embedding") == pytest.approx(
        float((sigma[2:].square().sum() / sigma.square().sum()).sqrt()), rel=1e-5
    )


def test_a_pointwise_convolution_is_a_matrix(randn: Make, save: Save, tmp_path: Path) -> None:
    """C16, DyLoRA: factors in two or four dimensions, of the linear rank, in the dimensions they had."""
    up, down = factors(randn, (16, 16, 1, 1), 6)
    for name, shaped in (("four", (up, down)), ("two", (up[:, :, 0, 0].contiguous(), down[:, :, 0, 0].contiguous()))):
        a, out = save(f"{name}.safetensors", written(P, *shaped, 3.0)), tmp_path / f"{name}-out.safetensors"
        resize(a, out, rank=4, conv_rank=2)
        found = load_file(out)
        assert found[f"{P}.lora_down.weight"].shape == (4, *shaped[1].shape[1:])
        assert found[f"{P}.lora_up.weight"].shape == (16, 4, *shaped[0].shape[2:])


def test_nothing_to_cut_is_the_same_file(randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = {**kind_of("lora", randn), **kind_of("tucker", randn), **anchor(randn)}
    header = {"ss_network_dim": "9", "ss_network_alpha": "7", "ss_network_args": '{"conv_dim": "64"}', "author": "x"}
    a, out = save("a.safetensors", tensors, header), tmp_path / "out.safetensors"
    result = resize(a, out, rank=6)
    assert parts(out) == parts(a)
    assert result["changed"] == 0
    assert result["relative_error"] == 0


def test_the_same_bytes_for_any_number_of_threads(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", {**kind_of("loha", randn), **kind_of("conv", randn), **anchor(randn)})
    for threads in (1, 3):
        resize(a, tmp_path / f"{threads}.safetensors", energy=0.8, threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_the_input_is_not_touched(randn: Make, save: Save, tmp_path: Path, digest: Any) -> None:
    a = save("a.safetensors", {**kind_of("loha", randn), **anchor(randn)})
    before = digest(a)
    resize(a, tmp_path / "out.safetensors", rank=2)
    assert digest(a) == before
    with pytest.raises(UsageError):
        resize(a, a, rank=2, force=True)


def test_a_nan_is_refused_by_name(randn: Make, save: Save, tmp_path: Path) -> None:
    tensors = kind_of("lora", randn)
    tensors[f"{A}.lora_up.weight"][3, 1] = float("nan")
    a = save("a.safetensors", {**tensors, **anchor(randn)})
    with pytest.raises(InputError, match="NaN or Inf in 1 tensor") as refused:
        resize(a, tmp_path / "out.safetensors", rank=2)
    assert refused.value.details == [f"a.safetensors: {A}.lora_up.weight"]
    assert not (tmp_path / "out.safetensors").exists()
