"""inspect on real files: what an adapter is, what is wrong with it, its hashes and its spectrum.

Expected counts and numbers come from how the file was built or from dense float64 matrices, never from the reader.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as library_save

from loratools.operations.inspect import inspect
from tests.operations.made import Make, Save

BLOCK = "lora_unet_up_blocks_3_attentions_0_"
Q = BLOCK + "transformer_blocks_0_attn1_to_q"
K = BLOCK + "transformer_blocks_0_attn1_to_k"
PROJ = BLOCK + "proj_in"
CONV = "lora_unet_up_blocks_3_resnets_0_conv1"
NORM = "lora_unet_up_blocks_3_resnets_0_norm1"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def lora(stem: str, randn: Make, *, out: int = 16, in_: int = 16, rank: int = 4, alpha: float | None = 2.0, **more: Any) -> dict[str, Any]:
    """One linear module in kohya's spelling; more: other tensors of the same module by leaf."""
    found = {f"{stem}.lora_down.weight": randn(rank, in_), f"{stem}.lora_up.weight": randn(out, rank)}
    if alpha is not None:
        found[f"{stem}.alpha"] = torch.tensor(alpha)
    return {**found, **{f"{stem}.{leaf}": tensor for leaf, tensor in more.items()}}


def sd1(randn: Make) -> dict[str, torch.Tensor]:
    """Three modules: linear, 1x1 convolution (SD1's proj_in), text encoder."""
    proj = {"lora_down.weight": randn(4, 16, 1, 1), "lora_up.weight": randn(16, 4, 1, 1), "alpha": torch.tensor(2.0)}
    return {**lora(Q, randn), **{f"{PROJ}.{leaf}": tensor for leaf, tensor in proj.items()}, **lora(TE, randn, rank=2, alpha=1.0)}


def codes(result: dict[str, Any], severity: str) -> set[str]:
    return {problem["code"] for problem in result["problems"] if problem["severity"] == severity}


# ------------------------------------------------------------------------------------------------- broken adapters (--check)


def zeroed(tensors: dict[str, torch.Tensor], *suffixes: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) if name.endswith(suffixes) else tensor for name, tensor in tensors.items()}


def planted(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "every up zero": (lambda t: zeroed(t, "lora_up.weight"), "dead-adapter"),
    "every up minus zero": (lambda t: {k: -v for k, v in zeroed(t, "lora_up.weight").items()}, "dead-adapter"),
    "every down zero": (lambda t: zeroed(t, "lora_down.weight"), "dead-adapter"),
    "one NaN": (lambda t: {**t, f"{Q}.lora_up.weight": planted(t[f"{Q}.lora_up.weight"], math.nan)}, "not-finite"),
    "one Inf, half precision": (lambda t: {**t, f"{Q}.lora_up.weight": planted(t[f"{Q}.lora_up.weight"], -math.inf).half()}, "not-finite"),
    "rank 0 (ZeRO-3)": (
        lambda t: {**t, f"{Q}.lora_up.weight": torch.empty(16, 0), f"{Q}.lora_down.weight": torch.empty(0, 16)},
        "empty-tensor",
    ),
    "size 0 (ZeRO-3)": (lambda t: {**t, f"{Q}.lora_down.weight": torch.empty(0)}, "empty-tensor"),
    "up alone": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_down.weight"}, "orphan"),
    "alpha alone": (lambda t: {**t, f"{K}.alpha": torch.tensor(1.0)}, "orphan"),
    "ranks differ": (lambda t: {**t, f"{Q}.lora_down.weight": torch.ones(3, 16)}, "rank-mismatch"),
    "alpha 0": (lambda t: {**t, f"{Q}.alpha": torch.tensor(0.0)}, "bad-alpha"),
    "alpha NaN": (lambda t: {**t, f"{Q}.alpha": torch.tensor(math.nan)}, "bad-alpha"),
    "false hash": (lambda t: t, "stale-hash"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_is_4_and_names_the_damage(name: str, save: Save, randn: Make, run: Any) -> None:
    """peft loads NaN without a word; ZeRO-3 saves size-0 tensors (peft#2892); a zero up is an untrained file (sd-scripts#91)."""
    damage, code = DAMAGE[name]
    metadata = {"sshs_model_hash": "0" * 64} if code == "stale-hash" else {}
    path = save("bad.safetensors", damage(sd1(randn)), metadata)
    result = run("inspect", path, "--check", "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert code in codes(found, "error")
    where = "sshs_model_hash" if code == "stale-hash" else "zero" if code == "dead-adapter" else K if name == "alpha alone" else Q
    assert any(where in problem["message"] for problem in found["problems"] if problem["code"] == code)
    assert run("inspect", path).exit_code == 0  # it says what the file is all the same
    assert run("inspect", path, "--spectrum", "--check").exit_code == 4  # and of the sound modules, how large they are
    rows = {row["keys"][0].partition(".")[0]: row for row in inspect(path, spectrum=True)["modules"]}
    assert rows[PROJ]["delta_norm"] > 0 or code == "dead-adapter"


def test_check_of_a_sound_file_is_0(save: Save, randn: Make, run: Any) -> None:
    result = run("inspect", save("good.safetensors", sd1(randn)), "--check", "--json")
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (0, [])


def test_some_zero_ups_are_a_warning_that_names_them(save: Save, randn: Make, run: Any) -> None:
    tensors = {**sd1(randn), f"{Q}.lora_up.weight": torch.zeros(16, 4)}
    result = run("inspect", save("some.safetensors", tensors), "--check", "--json")
    assert result.exit_code == 0
    (problem,) = json.loads(result.stdout)["problems"]
    assert (problem["severity"], problem["code"]) == ("warning", "dead-module")
    assert "attn1.to_q" in problem["site"]


UNTRAINED = {  # what LyCORIS starts from: one factor of each product is zero
    "loha": {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": None, "hada_w2_b": (2, 16)},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": None},
    "glora": {"a1.weight": (16, 2), "a2.weight": None, "b1.weight": None, "b2.weight": (2, 16)},
    "oft": {"oft_blocks": None},
    "dense": {"diff": None, "diff_b": None},
}
ZEROS = {
    "hada_w2_a": (16, 2),
    "lokr_w2_b": (2, 4),
    "a2.weight": (2, 16),
    "b1.weight": (16, 2),
    "oft_blocks": (4, 4, 4),
    "diff": (16, 16),
    "diff_b": (16,),
}


@pytest.mark.parametrize("kind", UNTRAINED)
def test_untrained_modules_of_every_kind_are_dead(kind: str, save: Save, randn: Make) -> None:
    factors = {f"{Q}.{leaf}": randn(*shape) if shape else torch.zeros(ZEROS[leaf]) for leaf, shape in UNTRAINED[kind].items()}
    assert codes(inspect(save("dead.safetensors", factors), check=True), "error") == {"dead-adapter"}
    alive = {name: tensor + 0.5 for name, tensor in factors.items()}
    assert not inspect(save("alive.safetensors", alive), check=True, arch="sd1")["problems"]


def test_a_bias_alone_keeps_a_module_alive(save: Save, randn: Make) -> None:
    tensors = {**zeroed(lora(Q, randn), "lora_up.weight"), f"{Q}.diff_b": randn(16)}
    assert not inspect(save("bias.safetensors", tensors), check=True, arch="sd1")["problems"]


def test_subnormal_halves_are_not_zero(save: Save, randn: Make) -> None:
    """0x0080 is 2^-17: its bytes are those of zeros and signs."""
    tensors = {**lora(Q, randn), f"{Q}.lora_up.weight": torch.full((16, 4), 2.0**-17, dtype=torch.float16)}
    assert not inspect(save("small.safetensors", tensors), check=True, arch="sd1")["problems"]


def test_wrapper_debris_is_an_error_of_check(save: Save, randn: Make, run: Any) -> None:
    """torch.compile and PEFT leave `_orig_mod` and `base_layer` in names: no loader finds the modules (vllm#55193, peft#2566)."""
    path = "base_model.model._orig_mod.up_blocks.3.attentions.0.proj_in.base_layer"
    tensors = {f"{path}.lora_A.weight": randn(4, 16, 1, 1), f"{path}.lora_B.weight": randn(16, 4, 1, 1)}
    result = run("inspect", save("debris.safetensors", tensors), "--check", "--json")
    assert result.exit_code == 4
    assert "wrapper-debris" in codes(json.loads(result.stdout), "error")


# ----------------------------------------------------------------------------------------------------- counts of every kind

# kind as listed → (stem, leaves, rank listed, parameters: all values but alpha and on_input)
KINDS: dict[str, tuple[str, str, dict[str, tuple[int, ...]], int | None, int]] = {
    "lora": ("lora", Q, {"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "alpha": ()}, 4, 128),
    "locon": ("lora", CONV, {"lora_down.weight": (4, 32, 3, 3), "lora_up.weight": (16, 4, 1, 1), "alpha": ()}, 4, 1216),
    "tucker": ("lora", CONV, {"lora_down.weight": (4, 32, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (16, 4, 1, 1)}, 4, 336),
    "dora": ("dora", Q, {"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "dora_scale": (16, 1), "alpha": ()}, 4, 144),
    "loha": ("loha", Q, {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16), "alpha": ()}, 2, 128),
    "lokr": ("lokr", Q, {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()}, 2, 32),
    "lokr, full": ("lokr", Q, {"lokr_w1": (4, 4), "lokr_w2": (4, 4), "alpha": ()}, None, 32),
    "full": ("dense", Q, {"diff": (16, 16), "diff_b": (16,)}, None, 272),
    "norm": ("dense", NORM, {"w_norm": (32,), "b_norm": (32,)}, None, 64),
    "ia3": ("ia3", Q, {"weight": (16,), "on_input": ()}, None, 16),
    "glora": ("glora", Q, {"a1.weight": (16, 2), "a2.weight": (2, 16), "b1.weight": (16, 2), "b2.weight": (2, 16), "alpha": ()}, 2, 128),
    "diag-oft": ("oft", Q, {"oft_blocks": (4, 4, 4), "alpha": ()}, None, 64),
    "boft": ("boft", Q, {"oft_blocks": (2, 4, 4, 4), "alpha": ()}, None, 128),
}


@pytest.mark.parametrize("name", KINDS)
def test_modules_are_counted_by_kind_not_by_tensor(name: str, save: Save, randn: Make) -> None:
    """Peers count tensors, and see none at all in LoHa and LoKr files."""
    kind, stem, leaves, rank, parameters = KINDS[name]
    tensors = {f"{stem}.{leaf}": randn(*shape) if shape else torch.tensor(1.0) for leaf, shape in leaves.items()}
    if f"{stem}.on_input" in tensors:
        tensors[f"{stem}.on_input"] = torch.tensor(False)
    result = inspect(
        save("kind.safetensors", {**tensors, **sd1(randn)} if stem != Q else {**sd1_without_q(randn), **tensors}), modules=True
    )
    others = 3 if stem != Q else 2
    facts = result["adapter"]
    assert facts["modules"] == others + 1
    assert facts["kinds"] == ({"lora": others + 1} if kind == "lora" else {"lora": others, kind: 1})
    assert facts["components"] == {"denoiser": others, "text_encoder": 1}
    plain = 4 * 16 * 2 * (others - 1) + 2 * 16 * 2
    assert facts["parameters"] == plain + parameters
    row = next(row for row in result["modules"] if any(key.startswith(stem + ".") for key in row["keys"]))
    assert (row["kind"], row["rank"]) == (kind, rank)
    assert sorted(row["keys"]) == sorted(tensors)
    assert result["unknown_keys"] == []


def sd1_without_q(randn: Make) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in sd1(randn).items() if not name.startswith(Q)}


def test_a_peft_folder_has_its_modules_and_its_alpha(peft: Any, randn: Make) -> None:
    """ "No UNet found" is what a peer says to PEFT names. Mixed ranks; alpha_pattern and rsLoRA decide the scale."""
    layer = "base_model.model.model.layers.{}.self_attn.{}_proj"
    tensors: dict[str, torch.Tensor] = {}
    for number, part, rank in ((0, "q", 8), (0, "v", 4), (1, "q", 8)):
        tensors[f"{layer.format(number, part)}.lora_A.weight"] = randn(rank, 32)
        tensors[f"{layer.format(number, part)}.lora_B.weight"] = randn(32, rank)
    config = {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
        "use_rslora": True,
    }
    result = inspect(peft("llm", tensors, {**config, "target_modules": ["q_proj", "v_proj"]}), modules=True)
    assert (result["container"], result["dialect"], result["architecture"]) == ("peft", "peft", "llm")
    assert (result["adapter"]["modules"], result["adapter"]["ranks"]) == (3, {"8": 2, "4": 1})
    assert result["adapter"]["alpha_source"] == "adapter_config"
    scales = {row["site"]: row["scale"] for row in result["modules"]}
    assert scales["model.model.layers.0.self_attn.q_proj"] == pytest.approx(16 / math.sqrt(8))
    assert scales["model.model.layers.0.self_attn.v_proj"] == pytest.approx(16 / math.sqrt(4))
    assert scales["model.model.layers.1.self_attn.q_proj"] == pytest.approx(2 / math.sqrt(8))


def test_alphas_of_every_stored_form(save: Save, randn: Make) -> None:
    """0-d, [1], integer and rounded bf16 all occur; absent is its own rank, and not the majority's alpha."""
    forms = {"q": torch.tensor(2.0), "k": torch.tensor([2.0]), "v": torch.tensor(2), "out_0": torch.tensor(2.8, dtype=torch.bfloat16)}
    tensors = {}
    for part, alpha in forms.items():
        tensors.update(
            {
                **lora(BLOCK + f"transformer_blocks_0_attn1_to_{part}", randn, alpha=None),
                BLOCK + f"transformer_blocks_0_attn1_to_{part}.alpha": alpha,
            }
        )
    tensors.update(lora(BLOCK + "transformer_blocks_0_attn2_to_q", randn, alpha=None))
    rows = {
        row["site"].rpartition("blocks.0.")[2]: row
        for row in inspect(save("forms.safetensors", tensors), modules=True, arch="sd1")["modules"]
    }
    bf16 = float(torch.tensor(2.8, dtype=torch.bfloat16))
    assert {site: row["alpha"] for site, row in rows.items()} == {
        "attn1.to_q": 2.0,
        "attn1.to_k": 2.0,
        "attn1.to_v": 2.0,
        "attn1.to_out.0": bf16,
        "attn2.to_q": None,
    }
    assert {site: row["scale"] for site, row in rows.items()}["attn2.to_q"] == 1.0
    assert rows["attn1.to_out.0"]["scale"] == bf16 / 4


# -------------------------------------------------------------------------------------------------------------------- hashes


@pytest.mark.parametrize("size", [1000, 300_000, 3_000_000])
def test_sshs_hashes_by_the_formula(size: int, save: Save, tmp_path: Path, randn: Make) -> None:
    """model = sha256 of all after the header; legacy = 64 KiB at 1 MiB of the file with its ss_ entries alone, first 8 digits."""
    tensors = {**sd1(randn), f"{K}.lora_down.weight": randn(4, size // 4), f"{K}.lora_up.weight": randn(16, 4)}
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    training = {"ss_network_dim": "4", "ss_tag_frequency": "{}" * 50}
    path = tmp_path / "hashed.safetensors"
    path.write_bytes(library_save(tensors, {**training, "modelspec.title": "x" * 999, "sshs_model_hash": "f" * 64, "format": "pt"}))
    data, blob = path.read_bytes(), library_save(tensors, training)
    start = 8 + int.from_bytes(data[:8], "little")
    hashes = inspect(path, hashes=True)["hashes"]
    assert hashes["sha256"] == hashlib.sha256(data).hexdigest()
    assert hashes["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert hashes["sshs_legacy_hash"] == hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
    assert (hashes["sshs_legacy_hash"] == "e3b0c442") == (len(blob) <= 0x100000)


def test_true_stored_hashes_are_no_problem(save: Save, randn: Make, tmp_path: Path) -> None:
    tensors = sd1(randn)
    plain = save("plain.safetensors", tensors)
    payload = plain.read_bytes()[8 + int.from_bytes(plain.read_bytes()[:8], "little") :]
    good = {"sshs_model_hash": hashlib.sha256(payload).hexdigest(), "sshs_legacy_hash": "e3b0c442"}
    assert not inspect(save("good.safetensors", tensors, good), check=True)["problems"]
    stale = inspect(save("stale.safetensors", tensors, {**good, "sshs_legacy_hash": "00000000"}), check=True)
    assert [problem["site"] for problem in stale["problems"]] == ["sshs_legacy_hash"]


# ------------------------------------------------------------------------------------------------------------------ spectrum


def dense(up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * (up.double().flatten(1) @ down.double().flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_spectrum_is_that_of_the_dense_delta(dtype: torch.dtype, save: Save, randn: Make) -> None:
    pairs = {
        Q: (randn(16, 4, dtype=dtype), randn(4, 24, dtype=dtype)),
        PROJ: (randn(16, 4, 1, 1, dtype=dtype), randn(4, 16, 1, 1, dtype=dtype)),
        CONV: (randn(16, 4, 1, 1, dtype=dtype), randn(4, 32, 3, 3, dtype=dtype)),
    }
    tensors: dict[str, torch.Tensor] = {}
    for stem, (up, down) in pairs.items():
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": torch.tensor(-3.0)}
    rows = inspect(save("spectrum.safetensors", tensors), spectrum=True)["modules"]
    for stem, (up, down) in pairs.items():
        row = next(row for row in rows if f"{stem}.alpha" in row["keys"])
        delta = dense(up, down, -3.0 / 4)
        values = torch.linalg.svdvals(delta)[:4]
        assert torch.tensor(row["singular_values"], dtype=torch.float64) == pytest.approx(values, rel=1e-6)
        assert row["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
        assert sum(value**2 for value in row["singular_values"]) == pytest.approx(float(delta.norm()) ** 2, rel=1e-12)
        energy = (values**2 / (values**2).sum()).tolist()
        assert row["stable_rank"] == pytest.approx(1 / energy[0], rel=1e-9)
        assert row["effective_rank"] == pytest.approx(math.exp(-sum(share * math.log(share) for share in energy)), rel=1e-9)


def test_ranks_by_hand(save: Save) -> None:
    """ΔW = diag(2, 2, 0, …): stable rank (4 + 4) / 4 = 2, effective rank exp(ln 2) = 2, though the rank is 4."""
    up, down = torch.zeros(16, 4), torch.zeros(4, 16)
    up[0, 0], up[1, 1], down[0, 0], down[1, 1] = 2.0, 2.0, 1.0, 1.0
    path = save("hand.safetensors", {f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down, f"{Q}.alpha": torch.tensor(4.0)})
    (row,) = inspect(path, spectrum=True)["modules"]
    assert row["rank"] == 4
    assert row["singular_values"] == pytest.approx([2.0, 2.0, 0.0, 0.0])
    assert (row["delta_norm"], row["stable_rank"], row["effective_rank"]) == pytest.approx((math.sqrt(8), 2.0, 2.0))


OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[dict[str, torch.Tensor]], torch.Tensor]]] = {
    "loha": (
        {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)},
        lambda f: 1.5 / 2 * (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]),
    ),
    "lokr": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
        lambda f: 1.5 / 2 * torch.kron(f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"]),
    ),
    "lokr full: alpha is ignored": ({"lokr_w1": (4, 4), "lokr_w2": (4, 4)}, lambda f: torch.kron(f["lokr_w1"], f["lokr_w2"])),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_norm_of_other_kinds(kind: str, save: Save, randn: Make) -> None:
    leaves, formula = OTHERS[kind]
    factors = {leaf: randn(*shape) for leaf, shape in leaves.items()}
    path = save("other.safetensors", {**{f"{Q}.{leaf}": tensor for leaf, tensor in factors.items()}, f"{Q}.alpha": torch.tensor(1.5)})
    (row,) = inspect(path, spectrum=True)["modules"]
    delta = formula({leaf: tensor.double() for leaf, tensor in factors.items()})
    assert row["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
    kept = len(row["singular_values"])
    assert torch.tensor(row["singular_values"], dtype=torch.float64) == pytest.approx(
        torch.linalg.svdvals(delta)[:kept], rel=1e-6, abs=1e-9
    )
    if kept < 16:  # what is listed is a head; the norm and the ranks are those of all of it
        assert sum(value**2 for value in row["singular_values"]) <= float(delta.norm()) ** 2 * (1 + 1e-12)


def test_a_zero_module_has_no_spectrum_worth_a_crash(save: Save, randn: Make) -> None:
    tensors = {**lora(Q, randn), f"{Q}.lora_up.weight": torch.zeros(16, 4)}
    (row,) = inspect(save("zero.safetensors", tensors), spectrum=True)["modules"]
    assert (row["delta_norm"], row["stable_rank"], row["effective_rank"]) == (0.0, 0.0, 0.0)


def test_dora_has_no_norm_without_its_base(save: Save, randn: Make) -> None:
    (row,) = inspect(save("dora.safetensors", lora(Q, randn, dora_scale=randn(16, 1).abs())), spectrum=True)["modules"]
    assert row["delta_norm"] is None


def test_nothing_is_imported_that_headers_do_not_need(save: Save, randn: Make) -> None:
    path = save("light.safetensors", sd1(randn))
    code = "import sys; from loratools.operations.inspect import inspect; inspect(sys.argv[1], modules=True, check=True, hashes=True)"
    said = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)", str(path)], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["False"]
