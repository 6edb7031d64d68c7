"""rescale-alpha of PEFT folders: adapter_config.json says what the factors mean, before and after, to PEFT too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import UnsupportedError, UsageError
from loratools.operations.convert import convert
from loratools.operations.rescale import rescale_alpha
from tests.operations.made import (
    ATTENTION,
    PROJ,
    SHAPES,
    Make,
    Save,
    factors,
    kohya_file,
    parts,
)
from tests.operations.rescaled import (
    CONFIGS,
    REQUESTS,
    TARGETS,
    Peft,
    check,
    config_of,
    pairs_of,
    spelled,
)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_peft_folders(config: str, request_: str, randn: Make, peft: Peft, tmp_path: Path) -> None:
    asked = REQUESTS[request_]
    given = {**CONFIGS[config], "target_modules": TARGETS, "base_model_name_or_path": "somebody/sd15"}
    a = peft("a", spelled(pairs_of(randn), "base_model.model."), given)
    out = tmp_path / "out"
    result = rescale_alpha(a, out, **asked)
    strength = asked.get("strength", 1.0)
    check(a, out, strength)
    found, file = config_of(out), "adapter_model.safetensors"
    for field in ("r", "rank_pattern", "target_modules", "base_model_name_or_path", "lora_dropout"):
        assert found.get(field) == given.get(field), field
    assert [*parts(out / file)[0]] == [*parts(a / file)[0]]
    if request_ == "alpha":
        assert (found["lora_alpha"], found["alpha_pattern"], found["use_rslora"]) == (16, {}, False)
        assert result["alpha_after"] == {"16": 4}
    elif request_ in ("rank", "fold"):
        assert found["lora_alpha"] == 4
        assert list(found["alpha_pattern"].values()) == [8]  # the one module of rank 8
        assert found["use_rslora"] is False
        assert result["alpha_after"] == {"4": 3, "8": 1}
    else:
        assert found["lora_alpha"] == pytest.approx(given["lora_alpha"] * abs(strength))
        assert found.get("alpha_pattern", {}) == pytest.approx(
            {key: value * abs(strength) for key, value in given.get("alpha_pattern", {}).items()}
        )
        assert found.get("use_rslora", False) == (config == "rslora")
        assert (parts(out / file)[1] == parts(a / file)[1]) == (strength > 0)  # a minus goes into a factor


def test_fold_of_a_uniform_folder_has_no_patterns(randn: Make, peft: Peft, tmp_path: Path) -> None:
    pairs = {path: factors(randn, SHAPES[path]) for path in (ATTENTION, PROJ)}
    a = peft("a", spelled(pairs, "base_model.model."), {"r": 4, "lora_alpha": 3, "alpha_pattern": {"to_q": 6}, "use_rslora": True})
    rescale_alpha(a, tmp_path / "out", fold=True)
    check(a, tmp_path / "out")
    found = config_of(tmp_path / "out")
    assert (found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]) == (4, 4, {}, {})
    assert found["use_rslora"] is False


def test_strength_one_leaves_the_folder_as_it_is(randn: Make, peft: Peft, tmp_path: Path) -> None:
    given = {"lora_alpha": 8, "r": 4, "rank_pattern": {"proj_in": 8}, "use_rslora": True, "layers_pattern": None, "task_type": "X"}
    a = peft("a", spelled(pairs_of(randn), "base_model.model."), given)
    result = rescale_alpha(a, tmp_path / "out", strength=1.0)
    assert result["changed"] == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (a / "adapter_model.safetensors").read_bytes()
    assert given.items() <= config_of(tmp_path / "out").items()


def test_a_lora_bias_is_under_the_scale(randn: Make, peft: Peft, tmp_path: Path) -> None:
    """PEFT's lora_B.bias: s · bias."""
    tensors = spelled({ATTENTION: factors(randn, (16, 16)), PROJ: factors(randn, SHAPES[PROJ])}, "base_model.model.")
    key = f"base_model.model.{ATTENTION}.lora_B.bias"
    a = peft("a", {**tensors, key: randn(16)}, {"r": 4, "lora_alpha": 3, "lora_bias": True})
    for asked in REQUESTS.values():
        out = tmp_path / "out"
        rescale_alpha(a, out, force=True, **asked)
        before, after = (load_file(folder / "adapter_model.safetensors")[key].double() for folder in (a, out))
        scale = config_of(out)["lora_alpha"] / 4
        torch.testing.assert_close(scale * after, asked.get("strength", 1.0) * 0.75 * before, rtol=3e-7, atol=1e-9)


def test_an_embedding_of_a_language_model(randn: Make, peft: Peft, tmp_path: Path) -> None:
    stem = "base_model.model.model.embed_tokens"
    layer = spelled({"model.layers.0.self_attn.q_proj": factors(randn, (16, 16))}, "base_model.model.")
    a = peft("a", {f"{stem}.lora_embedding_A": randn(4, 30), f"{stem}.lora_embedding_B": randn(16, 4), **layer}, {"r": 4, "lora_alpha": 3})
    for asked in REQUESTS.values():
        rescale_alpha(a, tmp_path / "out", force=True, **asked)
        check(a, tmp_path / "out", asked.get("strength", 1.0))


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_peft_lokr_of_two_full_factors_is_always_scaled(request_: str, randn: Make, peft: Peft, tmp_path: Path) -> None:
    stem = f"base_model.model.{ATTENTION}"
    tensors = {f"{stem}.lokr_w1": randn(4, 4), f"{stem}.lokr_w2": randn(4, 4)}
    second = f"base_model.model.{PROJ}"
    tensors |= {f"{second}.lokr_w1": randn(4, 4), f"{second}.lokr_w2": randn(4, 4, 1, 1)}
    a = peft("a", tensors, {"peft_type": "LOKR", "r": 6, "alpha": 9, "target_modules": TARGETS})
    asked = REQUESTS[request_]
    rescale_alpha(a, tmp_path / "out", arch="sd1", **asked)
    check(a, tmp_path / "out", asked.get("strength", 1.0))
    wanted = {"alpha": 16, "rank": 6, "fold": 6, "double": 18, "weak": 2.7}[request_]
    assert config_of(tmp_path / "out")["alpha"] == pytest.approx(wanted)


def test_peft_keys_without_their_config(randn: Make, save: Save, tmp_path: Path) -> None:
    """Scale 1 is assumed, with a warning that does not advise --alpha, which is another thing here; what is written has a config."""
    a = save("a.safetensors", spelled(pairs_of(randn), "base_model.model."))
    with pytest.raises(UsageError, match="folder"):
        rescale_alpha(a, tmp_path / "out.safetensors", alpha=16.0)
    result = rescale_alpha(a, tmp_path / "out", alpha=16.0)
    assert result["alpha_before"] == {"none": 4}
    assert any("scale 1 is assumed" in text and "--alpha" not in text for text in result["warnings"])
    check(a, tmp_path / "out")
    assert config_of(tmp_path / "out")["lora_alpha"] == 16


def test_modules_to_save_have_no_strength(randn: Make, peft: Peft, tmp_path: Path) -> None:
    layer = spelled({"model.layers.0.self_attn.q_proj": factors(randn, (16, 16))}, "base_model.model.")
    a = peft("a", {**layer, "base_model.model.lm_head.weight": randn(30, 16)}, {"r": 4, "lora_alpha": 3, "modules_to_save": ["lm_head"]})
    with pytest.raises(UnsupportedError) as refused:
        rescale_alpha(a, tmp_path / "out", strength=2.0)
    assert len(refused.value.details) == 1
    assert "lm_head" in refused.value.details[0]
    rescale_alpha(a, tmp_path / "out", alpha="rank")
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(kept, load_file(a / "adapter_model.safetensors")["base_model.model.lm_head.weight"])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["lm_head"]


def test_a_peft_folder_with_a_memory_is_read_as_it_is(randn: Make, save: Save, tmp_path: Path) -> None:
    a = save("a.safetensors", kohya_file(pairs_of(randn), 3.0))
    convert(a, tmp_path / "there", "peft")
    rescale_alpha(tmp_path / "there", tmp_path / "out", alpha=16.0)
    assert config_of(tmp_path / "out")["lora_alpha"] == 16
    check(tmp_path / "there", tmp_path / "out")
    rescale_alpha(tmp_path / "there", tmp_path / "same", strength=1.0)
    file = "adapter_model.safetensors"
    assert (tmp_path / "same" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()


def test_a_folder_of_two_components(randn: Make, save: Save, tmp_path: Path) -> None:
    """unet/ and text_encoder/ with a config each; read back as kohya."""
    encoder = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    up, down = factors(randn, (12, 12))
    tensors = {**kohya_file(pairs_of(randn), 3.0), f"{encoder}.lora_down.weight": down, f"{encoder}.lora_up.weight": up}
    a = save("a.safetensors", {**tensors, f"{encoder}.alpha": torch.tensor(1.5)})
    convert(a, tmp_path / "folder", "peft")
    rescale_alpha(tmp_path / "folder", tmp_path / "out", strength=2.0)
    for name, alpha in (("unet", 6), ("text_encoder", 3)):
        assert config_of(tmp_path / "out" / name)["lora_alpha"] == alpha
        file = f"{name}/adapter_model.safetensors"
        assert parts(tmp_path / "out" / file)[1] == parts(tmp_path / "folder" / file)[1]
    convert(tmp_path / "out", tmp_path / "back.safetensors", "kohya")
    check(a, tmp_path / "back.safetensors", 2.0)


def test_peft_computes_the_same_from_every_form(tmp_path: Path) -> None:
    """The outputs of a tiny Llama with the folder before and after, loaded by PEFT."""
    pytest.importorskip("transformers")
    peft_ = pytest.importorskip("peft")
    from fixtures import adapters, make

    model = make.llama()
    targets = [name for name in adapters.layers(model) if name.endswith(("q_proj", "down_proj"))]
    config = adapters.lora_config(model, rank=4, alpha=6, targets=targets, use_rslora=True, alpha_pattern={"q_proj": 3})
    wrapped = adapters.peft_folder(tmp_path / "a", model, config)
    ids = torch.tensor([[3, 14, 15, 92, 65, 35]])
    with torch.no_grad():
        wanted, bare = wrapped(input_ids=ids).logits, make.llama()(input_ids=ids).logits
        assert float((wanted - bare).norm() / bare.norm()) > 1e-3
        for number, asked in enumerate(({"alpha": 16.0}, {"alpha": "rank"}, {"fold": True}, {"strength": 1.0})):
            out = tmp_path / str(number)
            rescale_alpha(tmp_path / "a", out, **asked)  # type: ignore[arg-type]
            found = peft_.PeftModel.from_pretrained(make.llama(), out).eval()(input_ids=ids).logits
            assert float((found - wanted).norm() / wanted.norm()) < 2e-6
        rescale_alpha(tmp_path / "a", tmp_path / "off", strength=1e-20)
        found = peft_.PeftModel.from_pretrained(make.llama(), tmp_path / "off").eval()(input_ids=ids).logits
        assert float((found - bare).norm() / bare.norm()) < 2e-6
