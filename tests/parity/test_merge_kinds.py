"""Every kind of adapter, merged, against its formula written by hand in float64: W' = W + weight · (K(W) − W).

Kohya files with LyCORIS' tensors on linear layers, 3x3 and 1x1 convolutions of the SD1 UNet; on fused and half-exchanged layers of
Flux; ComfyUI's replacements. The formulas are those of the kinds' papers, told without the library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from fixtures import checkpoints, layouts
from loratools.errors import LoraToolsError
from loratools.operations.merge import merge
from tests.parity.support import apart

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

Tensor = torch.Tensor
Leaves = dict[str, Tensor]
Made = tuple[Leaves, Callable[[Tensor], Tensor]]  # what the file holds for a module, and W → K(W)

RANK, ALPHA = 3, 2.0
UNET = "unet/diffusion_pytorch_model.safetensors"
SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # (16, 16)
WIDE = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"  # (256, 32)
CONV3, CONV1 = "down_blocks.1.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in"  # (32, 16, 3, 3), (32, 32, 1, 1)


def random(*shape: int, size: float = 0.1) -> Tensor:
    """Noise that depends on the shape alone."""
    noise = torch.Generator().manual_seed(sum((place + 1) * length for place, length in enumerate(shape)))
    return torch.randn(shape, generator=noise) * size


def alpha() -> Leaves:
    return {"alpha": torch.tensor(ALPHA)}


def plus(leaves: Leaves, delta: Tensor) -> Made:
    return leaves, lambda weight: weight + delta.reshape(weight.shape)


def lora(shape: tuple[int, ...]) -> Made:
    out, in_, *kernel = shape
    up, down = random(out, RANK, *(1 for _ in kernel)), random(RANK, in_, *kernel)
    delta = ALPHA / RANK * torch.einsum("or,r...->o...", up.double().flatten(1), down.double())
    return plus(alpha() | {"lora_up.weight": up, "lora_down.weight": down}, delta)


def tucker(shape: tuple[int, ...]) -> Made:
    out, in_, *kernel = shape
    up, mid, down = random(out, RANK, 1, 1), random(RANK, RANK, *kernel, size=0.3), random(RANK, in_, 1, 1)
    delta = ALPHA / RANK * torch.einsum("op,pqhw,qi->oihw", up.double()[..., 0, 0], mid.double(), down.double()[..., 0, 0])
    return plus(alpha() | {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, delta)


def dora(axis: str) -> Callable[[tuple[int, ...]], Made]:
    """m · (W + D) / |W + D|; the norm of each output row ("out"), or over outputs and kernel of each input ("in")."""

    def made(shape: tuple[int, ...]) -> Made:
        leaves, moved = lora(shape)
        ones = [1] * (len(shape) - 2)
        scale = 1 + random(shape[0], 1, *ones).abs() if axis == "out" else 1 + random(1, shape[1], *ones).abs()

        def changed(weight: Tensor) -> Tensor:
            whole = moved(weight)
            dims = tuple(range(1, whole.dim())) if axis == "out" else (0, *range(2, whole.dim()))
            return scale.double() * whole / whole.square().sum(dim=dims, keepdim=True).sqrt()

        return leaves | {"dora_scale": scale}, changed

    return made


def loha(shape: tuple[int, ...]) -> Made:
    columns = int(torch.tensor(shape[1:]).prod())
    one, two = ((random(shape[0] + at, RANK, size=0.5)[at:], random(RANK, columns + at, size=0.5)[:, at:]) for at in (0, 1))
    delta = ALPHA / RANK * (one[0].double() @ one[1].double()) * (two[0].double() @ two[1].double())
    named = {"hada_w1_a": one[0], "hada_w1_b": one[1], "hada_w2_a": two[0], "hada_w2_b": two[1]}
    return plus(alpha() | {key: value.contiguous() for key, value in named.items()}, delta)


def loha_tucker(shape: tuple[int, ...]) -> Made:
    """Each factor: core (r, r, h, w) times a (r, out) and b (r, in)."""
    out, in_, *kernel = shape
    leaves, whole = alpha(), torch.tensor(ALPHA / RANK, dtype=torch.float64)
    for at in (1, 2):
        core, a, b = (
            random(RANK, RANK, *kernel, size=0.5),
            random(RANK, out + at, size=0.5)[:, at:],
            random(RANK, in_ + at, size=0.5)[:, at:],
        )
        leaves |= {f"hada_t{at}": core, f"hada_w{at}_a": a.contiguous(), f"hada_w{at}_b": b.contiguous()}
        whole = whole * torch.einsum("ijhw,io,jn->onhw", core.double(), a.double(), b.double())
    return plus(leaves, whole)


def lokr(form: str) -> Callable[[tuple[int, ...]], Made]:
    """kron(w1, w2); the scale is 1 where both are whole, whatever alpha says, else alpha / rank."""

    def made(shape: tuple[int, ...]) -> Made:
        out, in_, *kernel = shape
        one = random(4, 4, size=0.5)
        leaves, scale = alpha() | {"lokr_w1": one}, ALPHA / RANK
        if form == "whole":
            two, scale = random(out // 4, in_ // 4, *kernel), 1.0
            leaves["lokr_w2"] = two
        elif form == "split":
            a, b = random(out // 4, RANK), random(RANK, in_ // 4 * int(torch.tensor(kernel).prod()))
            leaves |= {"lokr_w2_a": a, "lokr_w2_b": b}
            two = (a.double() @ b.double()).reshape(out // 4, in_ // 4, *kernel)
        else:
            core, a, b = random(RANK, RANK, *kernel, size=0.5), random(RANK, out // 4), random(RANK, in_ // 4)
            leaves |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
            two = torch.einsum("ijhw,io,jn->onhw", core.double(), a.double(), b.double())
        # kron(w1, w2)[a·p + i, b·q + j] = w1[a, b] · w2[i, j]
        product = torch.einsum("ab,ij...->aibj...", one.double(), two.double())
        return plus(leaves, scale * product.reshape(shape))

    return made


def dense(shape: tuple[int, ...]) -> Made:
    diff = random(*shape)
    return plus({"diff": diff}, diff.double())


def ia3(on_input: bool) -> Callable[[tuple[int, ...]], Made]:
    def made(shape: tuple[int, ...]) -> Made:
        ones = [1] * (len(shape) - 2)
        vector = random(shape[1], size=0.3).reshape(1, -1, *ones) if on_input else random(shape[0], size=0.3).reshape(-1, 1, *ones)
        leaves = {"weight": vector.flatten() if len(shape) == 2 else vector.reshape(1, -1, 1, 1), "on_input": torch.tensor(on_input)}
        return leaves, lambda weight: weight * (1 + vector.double())

    return made


def diag_oft(shape: tuple[int, ...]) -> Made:
    """Blocks of output rows turned by R^T, R = (I + Q)(I − Q)^-1, Q = B − B^T."""
    blocks, eye = random(shape[0] // 4, 4, 4), torch.eye(4, dtype=torch.float64)
    skew = blocks.double() - blocks.double().transpose(1, 2)
    turn = ((eye + skew) @ torch.linalg.inv(eye - skew)).transpose(1, 2)

    def changed(weight: Tensor) -> Tensor:
        return torch.einsum("nij,njk->nik", turn, weight.reshape(len(blocks), 4, -1)).reshape(weight.shape)

    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, changed


KINDS: dict[str, tuple[Callable[[tuple[int, ...]], Made], tuple[str, ...]]] = {
    "lora": (lora, (SQUARE, WIDE, CONV3, CONV1)),
    "tucker": (tucker, (CONV3,)),
    "dora-out": (dora("out"), (SQUARE, WIDE, CONV3, CONV1)),
    "dora-in": (dora("in"), (SQUARE, WIDE, CONV3, CONV1)),
    "loha": (loha, (SQUARE, WIDE, CONV3, CONV1)),
    "loha-tucker": (loha_tucker, (CONV3,)),
    "lokr-whole": (lokr("whole"), (SQUARE, WIDE, CONV3, CONV1)),
    "lokr-split": (lokr("split"), (SQUARE, WIDE, CONV3)),
    "lokr-tucker": (lokr("tucker"), (CONV3,)),
    "dense": (dense, (SQUARE, WIDE, CONV3, CONV1)),
    "ia3-output": (ia3(False), (SQUARE, WIDE)),
    "ia3-input": (ia3(True), (SQUARE, WIDE)),
    "diag-oft": (diag_oft, (SQUARE, WIDE, CONV3)),
}


def merged(tmp_path: Path, leaves: dict[str, Leaves], weight: float, **options: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A kohya file of {module: leaves} merged into the SD1 folder: the UNet's tensors before and after."""
    folder = checkpoints.folder("sd1", tmp_path / "base")
    tensors = {f"lora_unet_{name.replace('.', '_')}.{leaf}": value for name, found in leaves.items() for leaf, value in found.items()}
    save_file(tensors, tmp_path / "adapter.safetensors", {"ss_network_module": "lycoris.kohya"})
    merge(folder, [(tmp_path / "adapter.safetensors", weight)], tmp_path / "out", arch="sd1", **options)
    return load_file(folder / UNET), load_file(tmp_path / "out" / UNET)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_formula(kind: str, weight: float, tmp_path: Path) -> None:
    build, names = KINDS[kind]
    unet = checkpoints.models("sd1").models["unet"]
    made = {name: build(tuple(unet.get_submodule(name).weight.shape)) for name in names}
    before, after = merged(tmp_path, {name: leaves for name, (leaves, _) in made.items()}, weight)
    for name, (_, changed) in made.items():
        old = before[f"{name}.weight"].double()
        wanted = old + weight * (changed(old) - old)
        assert apart(wanted, old) > 1e-2, "the adapter does nothing, the test could not fail"
        assert apart(after[f"{name}.weight"], wanted) <= 2e-6, name
    others = before.keys() - {f"{name}.weight" for name in names}
    assert [key for key in others if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_norms_and_biases(weight: float, tmp_path: Path) -> None:
    """Norm deltas, and a bias delta beside a LoRA: alpha scales the LoRA alone, the weight everything."""
    norm = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"
    group = "down_blocks.1.resnets.0.norm1"
    leaves, changed = lora((32, 16, 3, 3))
    extra = random(32)
    parts = {
        norm: {"w_norm": random(16), "b_norm": random(16, size=0.2)},
        group: {"diff": random(16, size=0.3)},
        CONV3: leaves | {"diff_b": extra},
    }
    before, after = merged(tmp_path, parts, weight)
    old = {key: value.double() for key, value in before.items()}
    wanted = {
        f"{norm}.weight": old[f"{norm}.weight"] + weight * random(16).double(),
        f"{norm}.bias": old[f"{norm}.bias"] + weight * random(16, size=0.2).double(),
        f"{group}.weight": old[f"{group}.weight"] + weight * random(16, size=0.3).double(),
        f"{CONV3}.weight": old[f"{CONV3}.weight"] + weight * (changed(old[f"{CONV3}.weight"]) - old[f"{CONV3}.weight"]),
        f"{CONV3}.bias": old[f"{CONV3}.bias"] + weight * extra.double(),
    }
    for key, value in wanted.items():
        assert apart(value, old[key]) > 1e-3
        assert apart(after[key], value) <= 2e-6, key
    assert [key for key in before.keys() - wanted.keys() if not torch.equal(before[key], after[key])] == []


def test_a_core_that_fits_no_kernel_is_refused(tmp_path: Path) -> None:
    """(o, i, 1, 1) would broadcast over a 3x3 kernel."""
    leaves, _ = lora((32, 16, 1, 1))
    with pytest.raises(LoraToolsError) as refused:
        merged(tmp_path, {CONV3: leaves}, 1.0)
    assert refused.value.exit_code == 3
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- fused layers, replacements: Flux


FUSED = {  # in the original file: q, k, v in one; q, k, v and mlp in one; shift and scale, which diffusers exchanges
    "double_blocks.0.img_attn.qkv": (96, 32),
    "single_blocks.1.linear1": (224, 32),
    "final_layer.adaLN_modulation.1": (64, 32),
}


@pytest.mark.parametrize("target", ["single", "folder"])
@pytest.mark.parametrize("kind", ["lora", "dora-out", "dora-in", "loha", "lokr-whole", "lokr-split", "dense"])
def test_fused_layers(kind: str, target: str, tmp_path: Path) -> None:
    """The file's own layers are the original ones: there the formula holds as it stands, also where the base has q, k and v apart."""
    build, _ = KINDS[kind]
    made = {name: build(shape) for name, shape in FUSED.items()}
    tensors = {f"lora_unet_{name.replace('.', '_')}.{leaf}": value for name, (leaves, _) in made.items() for leaf, value in leaves.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    original = checkpoints.flux_bare(tmp_path / "flux.safetensors")
    before, adapter = load_file(original), [(tmp_path / "adapter.safetensors", 1.0)]
    if target == "single":
        merge(original, adapter, tmp_path / "out.safetensors", arch="flux")
        after = load_file(tmp_path / "out.safetensors")
    else:
        merge(checkpoints.folder("flux", tmp_path / "base"), adapter, tmp_path / "out", arch="flux")
        after = layouts.denoiser("flux", load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"))
    for name, (_, changed) in made.items():
        old = before[f"{name}.weight"].double()
        assert apart(changed(old), old) > 1e-2
        assert apart(after[f"{name}.weight"], changed(old)) <= 2e-6, name
    others = before.keys() - {f"{name}.weight" for name in made}
    assert [key for key in others if not torch.equal(before[key], after[key])] == []


def test_replacements(tmp_path: Path) -> None:
    """ComfyUI's set_weight: at weight 1 the file's values, to the bit."""
    norm, linear = "double_blocks.0.img_attn.norm.query_norm", "double_blocks.1.txt_attn.proj"
    leaves, changed = lora((32, 32))
    new = random(16) + 1
    tensors = {f"diffusion_model.{norm}.set_weight": new} | {f"diffusion_model.{linear}.{leaf}": value for leaf, value in leaves.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    base = checkpoints.flux_bare(tmp_path / "flux.safetensors")
    merge(base, [(tmp_path / "adapter.safetensors", 1.0)], tmp_path / "out.safetensors", arch="flux")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert torch.equal(after[f"{norm}.scale"], new)
    assert apart(after[f"{linear}.weight"], changed(before[f"{linear}.weight"].double())) <= 2e-6
    changed_keys = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed_keys == {f"{norm}.scale", f"{linear}.weight"}
