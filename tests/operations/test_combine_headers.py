"""combine where the header matters: scales that live there, alphas it remembers, errors over exact and shrunk sites together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.operations.combine import combine
from loratools.operations.convert import convert
from tests.operations.made import ATTENTION, CONV, FF, PROJ, SHAPES, Make, Save, dense, factors, kohya, kohya_file, parts
from tests.reference import deltas

SITES = (ATTENTION, PROJ)


def in_diffusers(randn: Make, save: Save, name: str, dtype: torch.dtype = torch.float16) -> Path:
    """A diffusers file whose scale of 3 / 4 is in the header alone."""
    header = json.dumps({"unet.r": 4, "unet.lora_alpha": 3, "unet.target_modules": ["to_q"]})
    tensors: dict[str, torch.Tensor] = {}
    for path in SITES:
        up, down = factors(randn, SHAPES[path])
        tensors |= {f"unet.{path}.lora_B.weight": up.to(dtype), f"unet.{path}.lora_A.weight": down.to(dtype)}
    return save(name, tensors, {"lora_adapter_metadata": header})


@pytest.mark.parametrize("weight", [0.5, -0.3])
def test_a_weight_on_a_scale_in_the_header_is_obeyed_by_every_reader(randn: Make, save: Save, tmp_path: Path, weight: float) -> None:
    """Those that trust the header and those that do not look; 3 / 8 in float16 would be rounded, so it is float32."""
    a, out = in_diffusers(randn, save, "a.safetensors"), tmp_path / "out.safetensors"
    combine([(a, weight)], out)
    bare = save("bare.safetensors", load_file(out))
    for name, delta in deltas(a).items():
        torch.testing.assert_close(deltas(out)[name], weight * delta, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(deltas(bare)[name], weight * delta, rtol=1e-6, atol=1e-7)


def test_a_folder_of_alpha_one_is_kept_as_it_is(randn: Make, save: Save, tmp_path: Path) -> None:
    a, out = in_diffusers(randn, save, "a.safetensors"), tmp_path / "out.safetensors"
    combine([(a, 1.0)], out)
    assert parts(out)[1] == parts(a)[1]
    assert parts(out)[0]["__metadata__"]["lora_adapter_metadata"] == parts(a)[0]["__metadata__"]["lora_adapter_metadata"]


def test_alphas_remembered_by_a_conversion_are_used_once(randn: Make, save: Save, tmp_path: Path) -> None:
    """float16 files whose alpha a conversion to diffusers folded: their sum goes there and back without a bit lost."""
    files, known = [], []
    for name, rank, alpha in (("a", 4, 2.0), ("b", 8, 8.0)):
        pairs = {path: tuple(tensor.half() for tensor in factors(randn, SHAPES[path], rank)) for path in SITES}
        path = save(f"{name}.safetensors", kohya_file(pairs, alpha))
        convert(path, tmp_path / f"{name}-d.safetensors", "diffusers")
        files.append((tmp_path / f"{name}-d.safetensors", 1.0))
        known.append({site: dense(*pair, alpha / rank) for site, pair in pairs.items()})
    combine(files, tmp_path / "sum.safetensors")
    convert(tmp_path / "sum.safetensors", tmp_path / "back.safetensors", "kohya")
    combine(files, tmp_path / "direct.safetensors", to="kohya")
    for out in ("back", "direct"):
        for site in SITES:
            expected = known[0][site] + known[1][site]
            error = float((deltas(tmp_path / f"{out}.safetensors")[kohya(site)].flatten(1) - expected).norm())
            assert error <= 1e-12 * float(expected.norm())
        dtypes = {entry["dtype"] for name, entry in parts(tmp_path / f"{out}.safetensors")[0].items() if name.endswith("weight")}
        assert dtypes == {"F16"}


def test_the_error_of_the_file_counts_sites_that_lost_nothing(randn: Make, save: Save, tmp_path: Path) -> None:
    """√(Σ‖error‖² / Σ‖ΔW‖²): two sites of rank 4 are exact at --rank 4, two of rank 8 are not."""
    left = {path: factors(randn, SHAPES[path]) for path in (ATTENTION, PROJ, CONV)}
    right = {path: factors(randn, SHAPES[path]) for path in (ATTENTION, FF, CONV)}
    a, b = save("a.safetensors", kohya_file(left)), save("b.safetensors", kohya_file(right))
    result = combine([(a, 1.0), (b, -2.0)], tmp_path / "out.safetensors", rank=4, arch="sd1")
    error = norm = 0.0
    for path in {**left, **right}:
        delta = sum(w * dense(*pairs[path], 0.5) for w, pairs in ((1, left), (-2, right)) if path in pairs)
        error += float((deltas(tmp_path / "out.safetensors")[kohya(path)].flatten(1) - delta).norm()) ** 2
        norm += float(delta.norm()) ** 2
    assert result["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-6)
    assert {row["site"] for row in result["worst"]} == {f"denoiser.{path}" for path in (ATTENTION, CONV)}
