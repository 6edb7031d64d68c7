"""rescale-alpha in every other dialect: alpha tensors and the header say one thing, and readers agree.

Expected deltas are scale · up · down in float64 from the values put into the file; tests.reference reads what came out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import UnsupportedError
from loratools.operations.convert import convert
from loratools.operations.rescale import rescale_alpha
from tests.operations.made import (
    ATTENTION,
    CONV,
    FF,
    NATIVE,
    PROJ,
    Make,
    Save,
    factors,
    kohya_file,
    parts,
)
from tests.operations.rescaled import (
    CONFIGS,
    RANKS,
    REQUESTS,
    check,
    header,
    pairs_of,
    spelled,
)


def diffusers_file(randn: Make, save: Save, recorded: Mapping[str, Any] | None) -> Path:
    metadata = {"format": "pt", "author": "somebody"}
    if recorded is not None:
        metadata["lora_adapter_metadata"] = json.dumps({f"unet.{key}": value for key, value in recorded.items()}, sort_keys=True)
    return save("a.safetensors", spelled(pairs_of(randn), "unet."), metadata)


@pytest.mark.parametrize("recorded", [None, *CONFIGS.values()], ids=["no header", *CONFIGS])
@pytest.mark.parametrize("request_", REQUESTS)
def test_diffusers_files(recorded: dict[str, Any] | None, request_: str, randn: Make, save: Save, tmp_path: Path) -> None:
    """A strength goes into the factors, so that readers of the header and others agree; --alpha is written to the header."""
    asked = REQUESTS[request_]
    a, out = diffusers_file(randn, save, recorded), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, **asked)
    check(a, out, asked.get("strength", 1.0))
    assert [*parts(out)[0]] == [*parts(a)[0]]
    assert header(out)["author"] == "somebody"
    if "strength" in asked:
        assert header(out) == header(a)
        return
    fields = json.loads(header(out).get("lora_adapter_metadata", "null"))
    if recorded is None and request_ != "alpha":
        assert fields is None
        assert result["alpha_after"] == {"none": 4}
        assert parts(out)[1] == parts(a)[1]
        return
    assert fields["unet.lora_alpha"] == (16 if request_ == "alpha" else 4)
    assert list(fields["unet.alpha_pattern"].values()) == ([] if request_ == "alpha" else [8])
    assert fields["unet.r"] == 4
    assert fields.get("unet.use_rslora", False) is False
    assert result["alpha_after"] == ({"16": 4} if request_ == "alpha" else {"4": 3, "8": 1})


def test_only_the_component_that_changed_is_described_anew(randn: Make, save: Save, tmp_path: Path) -> None:
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    fields = {"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"proj_in": 8}, "unet.alpha_pattern": {"proj_in": 8.0}}
    fields |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    metadata = {"lora_adapter_metadata": json.dumps(fields)}
    tensors = {**spelled(pairs_of(randn), "unet."), **spelled({encoder: factors(randn, (12, 12))})}
    a, out = save("a.safetensors", tensors, metadata), tmp_path / "out.safetensors"
    result = rescale_alpha(a, out, alpha="rank")
    check(a, out)
    new = {"text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {}, "text_encoder.use_rslora": False}
    assert json.loads(header(out)["lora_adapter_metadata"]) == {**fields, **new}
    assert result["changed"] == 1


def test_a_dialect_without_alpha(randn: Make, save: Save, tmp_path: Path) -> None:
    """diffusers' attention processors: nothing but the factors; another alpha than the rank has no place."""
    stem = ATTENTION.rpartition(".")[0] + ".processor.to_q_lora"
    up, down = factors(randn, (16, 16))
    linear = {f"unet.{PROJ}.lora.down.weight": randn(4, 16, 1, 1), f"unet.{PROJ}.lora.up.weight": randn(16, 4, 1, 1)}
    a = save("a.safetensors", {f"unet.{stem}.down.weight": down, f"unet.{stem}.up.weight": up, **linear})
    out = tmp_path / "out.safetensors"
    with pytest.raises(UnsupportedError) as refused:
        rescale_alpha(a, out, alpha=16.0, arch="sd1")
    assert len(refused.value.details) == 2
    assert "no place for alpha" in refused.value.details[0]
    rescale_alpha(a, out, alpha="rank", arch="sd1")
    assert parts(out)[1] == parts(a)[1]
    rescale_alpha(a, out, strength=-0.3, arch="sd1", force=True)
    assert set(load_file(out)) == set(load_file(a))
    check(a, out, -0.3)


# --------------------------------------------------------------------------------------------------------- kohya, comfy, others


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("scheme", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")])
def test_comfy_keeps_its_words(request_: str, scheme: tuple[str, str], randn: Make, save: Save, tmp_path: Path) -> None:
    pairs = {f"diffusion_model.{NATIVE[path]}": pair for path, pair in pairs_of(randn).items()}
    tensors = spelled(pairs, "", *scheme)
    first = next(iter(pairs))
    tensors[f"{first}.alpha"] = torch.tensor(3.0)  # the others have none: their scale is 1
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    asked = REQUESTS[request_]
    result = rescale_alpha(a, out, **asked)
    check(a, out, asked.get("strength", 1.0))
    factors_ = [key for key in tensors if not key.endswith("alpha")]
    assert [key for key in parts(out)[0] if key in factors_] == factors_
    alphas = {key for key in load_file(out) if key.endswith("alpha")}
    assert alphas == (set() if request_ == "fold" else {f"{path}.alpha" for path in pairs})
    assert result["alpha_before"] == {"none": 3, "3": 1}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_header_beside_alpha_tensors_says_the_same(request_: str, randn: Make, save: Save, tmp_path: Path) -> None:
    """Two records of one alpha that differ are refused when read again."""
    pairs = pairs_of(randn)
    recorded = {"unet.r": 4, "unet.lora_alpha": 3, "unet.rank_pattern": {".*proj_in": 8}}
    native = {NATIVE[path]: pair for path, pair in pairs.items()}
    tensors = spelled(native, "diffusion_model.")
    a = save("a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(recorded)})
    assert rescale_alpha(a, tmp_path / "probe.safetensors", strength=1.0)["alpha_before"] == {"3": 4}
    asked, out = REQUESTS[request_], tmp_path / "out.safetensors"
    rescale_alpha(a, out, **asked)
    again = rescale_alpha(out, tmp_path / "again.safetensors", strength=1.0)  # reads both records
    fields, values = json.loads(header(out)["lora_adapter_metadata"]), load_file(out)
    alphas = {key: float(tensor) for key, tensor in values.items() if key.endswith("alpha")}
    assert len(alphas) == (0 if request_ == "fold" else 4)
    assert fields["unet.lora_alpha"] == pytest.approx({"alpha": 16, "rank": 4, "fold": 4, "double": 6, "weak": 0.9}[request_])
    by_rank = {"4": 3, "8": 1}
    wanted = {"fold": by_rank, "rank": by_rank, "alpha": {"16": 4}, "double": {"6": 4}, "weak": {"0.9": 4}}
    assert again["alpha_before"] == wanted[request_]
    for path, (up, down) in pairs.items():
        stem = f"diffusion_model.{NATIVE[path]}"
        rank = RANKS[path]
        new = values[f"{stem}.lora_B.weight"].double().flatten(1) @ values[f"{stem}.lora_A.weight"].double().flatten(1)
        delta = asked.get("strength", 1.0) * 3 / rank * (up.double().flatten(1) @ down.double().flatten(1))
        torch.testing.assert_close(alphas.get(f"{stem}.alpha", rank) / rank * new, delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "dim_alpha"),
    [
        ({"alpha": 16.0}, "16"),
        ({"alpha": "rank"}, "Dynamic"),
        ({"strength": 2.0}, "4"),
        ({"strength": 1.0}, "2.0"),
        ({"fold": True}, "Dynamic"),
    ],
)
def test_metadata_follow(asked: dict[str, Any], dim_alpha: str, randn: Make, save: Save, tmp_path: Path) -> None:
    given = {
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "2.0",
        "ss_network_module": "lycoris.kohya",
        "author": "somebody",
        "sshs_model_hash": "0" * 64,
    }
    a, out = save("a.safetensors", kohya_file(pairs_of(randn)), given), tmp_path / "out.safetensors"
    rescale_alpha(a, out, **asked)
    found = header(out)
    assert found.pop("ss_network_alpha") == dim_alpha
    assert found.pop("sshs_model_hash") not in ("", "0" * 64)
    found.pop("sshs_legacy_hash", None)
    assert found == {key: given[key] for key in ("ss_network_dim", "ss_network_module", "author")}


def test_what_a_conversion_noted_about_alpha_goes_with_it(randn: Make, save: Save, tmp_path: Path) -> None:
    """kohya → diffusers remembers alpha for the way back; after --alpha the new one is the truth."""
    a = save("a.safetensors", kohya_file(pairs_of(randn), 3.0))
    there, new, back = (tmp_path / f"{name}.safetensors" for name in ("there", "new", "back"))
    convert(a, there, "diffusers")
    assert "loratools.alpha" in header(there)
    rescale_alpha(there, new, alpha=16.0)
    assert "loratools.alpha" not in header(new)
    check(there, new)
    convert(new, back, "kohya")
    assert {float(tensor) for key, tensor in load_file(back).items() if key.endswith("alpha")} == {16.0}
    check(a, back)
    rescale_alpha(there, new, strength=1.0, force=True)
    assert new.read_bytes() == there.read_bytes()


def test_keys_of_two_spellings_stay_apart(randn: Make, save: Save, tmp_path: Path) -> None:
    """diffusers#14548: one file, two spellings; each keeps its own."""
    pairs = pairs_of(randn)
    tensors = {**kohya_file({path: pairs[path] for path in (PROJ, CONV, FF)}), **spelled({ATTENTION: pairs[ATTENTION]}, "unet.")}
    a, out = save("a.safetensors", tensors), tmp_path / "out.safetensors"
    rescale_alpha(a, out, strength=0.5)
    assert set(tensors) <= set(load_file(out))
    check(a, out, 0.5)


# ------------------------------------------------------------------------------------------------------------ other readers


def test_diffusers_computes_the_same_from_a_folded_file(tmp_path: Path) -> None:
    """A kohya file with a mixture of alphas, folded: diffusers' own reader gives the hand merge's output."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from fixtures import make
    from tests.parity.support import apart, made, merged, save_kohya, truth_of

    of = make.base("sd1")
    of = make.Base("sd1", {"unet": of.models["unet"]})
    parts_ = made(of, ranks=(4, 4, 6), alphas=(2.0, 1.0, None, 3.0, 8.0))
    source = save_kohya(tmp_path / "a.safetensors", "sd1", parts_)
    rescale_alpha(source, tmp_path / "folded.safetensors", fold=True)
    full = make.base("sd1")
    make.pipeline(full).load_lora_weights(tmp_path, weight_name="folded.safetensors")
    found = make.forward(make.Base("sd1", {"unet": full.models["unet"]}))["unet"]
    wanted, bare = make.forward(merged(of, truth_of(parts_)))["unet"], make.forward(of)["unet"]
    assert apart(wanted, bare) > 1e-3
    assert apart(found, wanted) < 3e-6
