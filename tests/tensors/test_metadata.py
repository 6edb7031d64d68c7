"""Metadata as trainers really write them: typed, broken, private."""

from __future__ import annotations

import json

import pytest

from loratools.errors import InputError
from loratools.report import Finding
from loratools.tensors.metadata import (
    base_model_hint,
    bool_field,
    float_field,
    json_field,
    lora_adapter_metadata,
    parse_value,
    peft_metadata,
    private_values,
    strip_private,
    text_field,
    trigger_words,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None), ("", None), ("null", None), ("True", True), ("False", False), ("false", False),
        ("8", 8), ("-1", -1), ("1e-4", 1e-4), ("0.5", 0.5), (" 16 ", 16),
        ('["a", 1]', ["a", 1]), ('{"a": null}', {"a": None}), ('"x"', "x"),
        ("Dynamic", "Dynamic"), ("networks.lora", "networks.lora"),
        ("{broken", "{broken"), ("[1, 2", "[1, 2"), ("NaN", "NaN"), ("[NaN]", "[NaN]"),
        ("1_000", "1_000"), ("1.2.3", "1.2.3"), ("[" * 100_000, "[" * 100_000), ("9" * 5000, "9" * 5000), ("2024-01-02", "2024-01-02"),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_values(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_typed_fields() -> None:
    metadata = {
        "dim": "8",
        "alpha": "None",
        "flag": "False",
        "one": "1",
        "mixed": "Dynamic",
        "none": "None",
        "args": '{"conv_dim": "4"}',
        "bad": '{"a"',
    }
    assert (float_field(metadata, "dim"), float_field(metadata, "alpha"), float_field(metadata, "mixed")) == (8.0, None, None)
    assert (bool_field(metadata, "flag"), bool_field(metadata, "one"), bool_field(metadata, "dim")) == (False, True, None)
    assert float_field(metadata, "flag") is None  # False is no number
    assert (text_field(metadata, "mixed"), text_field(metadata, "none"), text_field(metadata, "absent")) == ("Dynamic", None, None)
    warnings: list[Finding] = []
    assert json_field(metadata, "args", warnings) == {"conv_dim": "4"}
    assert json_field(metadata, "absent", warnings) is None
    assert warnings == []
    assert json_field(metadata, "bad", warnings) is None
    assert [(warning.severity, warning.site) for warning in warnings] == [("warning", "bad")]


def test_base_model_hint() -> None:
    assert base_model_hint({"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "x"}) == "sdxl_base_v1-0"
    assert base_model_hint({"ss_base_model_version": "None", "modelspec.architecture": "flux-1-dev/lora"}) == "flux-1-dev/lora"
    assert base_model_hint({}) is None


# --- trigger words ----------------------------------------------------------------------------------------------------

TRIGGERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "modelspec": ({"modelspec.trigger_phrase": "ohwx man, oil painting"}, ["ohwx man", "oil painting"]),
    "tag frequency": ({"ss_tag_frequency": '{"img": {"mychar": 40, "1girl": 38, "smile": 20}}'}, ["mychar"]),
    "tag frequency and image count": (
        {
            "ss_tag_frequency": '{"img": {"mychar": 40, "1girl": 38, "hat": 20}}',
            "ss_dataset_dirs": '{"img": {"n_repeats": 1, "img_count": 38}}',
        },
        ["mychar", "1girl"],
    ),
    "class tokens": ({"ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10, "img_count": 5}, "reg": {}}'}, ["sks dog"]),
    "ai-toolkit's tag frequency": ({"ss_tag_frequency": '{"1_p3r5on": {"p3r5on": 1}}'}, ["p3r5on"]),
    "trainer's own field": ({"trigger_word": "p3r5on", "training_info": '{"step": 5, "trigger_word": "other"}'}, ["p3r5on", "other"]),
    "list of words": ({"trigger_words": '["a", "b"]'}, ["a", "b"]),
    "captions that are sentences": ({"ss_tag_frequency": json.dumps({"img": {f"a photo, number {i}": 1 for i in range(9)}})}, []),
    "each word once": ({"modelspec.trigger_phrase": "sks", "ss_dataset_dirs": '{"3_sks": {}}'}, ["sks"]),
    "None": ({"modelspec.trigger_phrase": "None", "ss_tag_frequency": "{}", "ss_dataset_dirs": "None"}, []),
    "broken": ({"ss_tag_frequency": '{"a": {', "ss_dataset_dirs": '["10_x"]'}, []),
    "odd types": (
        {"ss_tag_frequency": '{"a": [1], "b": {"t": "many"}, "c": {"t": null}, "d": {"word": 4}}', "ss_dataset_dirs": "[]"},
        ["word"],
    ),
    "nothing": ({}, []),
}


@pytest.mark.parametrize("row", TRIGGERS)
def test_trigger_words(row: str) -> None:
    metadata, expected = TRIGGERS[row]
    assert trigger_words(metadata) == expected


def test_a_megabyte_of_tags() -> None:
    tags = {f"some quite ordinary tag number {i}": i % 50 for i in range(30_000)}
    metadata = {"ss_tag_frequency": json.dumps({"10_mychar": {"mychar": 99, **tags}})}
    assert len(metadata["ss_tag_frequency"]) > 1_000_000
    assert trigger_words(metadata) == ["mychar"]
    assert private_values(metadata) == []


# --- private values ---------------------------------------------------------------------------------------------------

PRIVATE: dict[str, tuple[str, str | None]] = {  # text → what is left of it
    "/home/alice/models/sd15.safetensors": None,
    "/home/alice/my models/sd 15.safetensors": None,
    "/workspace": None,
    "C:\\Users\\bob\\x.safetensors": None,
    "d:/loras/x": None,
    "\\\\nas\\share\\x": None,
    "~/loras/x": None,
    "~bob/loras": None,
    "file:///home/alice/x.png": None,
    "trained from /home/alice/set for fun": "trained from  for fun",
    "run on DESKTOP-8ABC12X by me": "run on  by me",
    "by bob@workstation": "by ",
    "args: --in=/data/set/a --lr=1": "args: --in= --lr=1",
    "see C:\\Users\\bob\\notes.txt, please": "see , please",
    '{"dir": "/data/x/y", "n": 3}': '{"n": 3}',
    '{"dirs": ["/data/x/y", "kept"], "n": {"m": "C:\\\\u\\\\v"}}': '{"dirs": ["kept"], "n": {}}',
    '{"/home/alice/set": {"count": 1}, "b": 2}': '{"b": 2}',
    '["/home/alice/set"]': "[]",
    '{"hostname": "box7", "epochs": 3}': '{"epochs": 3}',
    '{"a":1,"d":"/x/y"}': '{"a":1}',
}

HARMLESS = [
    "https://huggingface.co/a/b/c", "git+https://github.com/a/b.git", "http://host:8080/a/b", "and/or", "10/16",
    "2024/01/02 10:11:12", "w/ love", "networks.lora", "sd_xl_base_1.0.safetensors",
    "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))", "0.5", "None", "/", "a / b",
    "data:image/jpeg;base64,/9j/4AAQSkZJRg/AQ/x", '{"a": "https://x.y/z/w", "b": [1, "1girl, :/ , hat"]}',
    "stabilityai/stable-diffusion-xl-base-1.0",
    "10_cat/dog", "12:30:00", "a:b", "ratio 1:/2", '{"user": null, "host": "None"}', "{broken /json",
]  # fmt: skip


@pytest.mark.parametrize("text", PRIVATE)
def test_private_values_are_taken_out(text: str) -> None:
    metadata = {"first": "kept", "key": text, "last": "kept too"}
    assert {key for key, _ in private_values(metadata)} == {"key"}
    stripped = strip_private(metadata)
    rest = PRIVATE[text]
    assert stripped == ({"first": "kept", "last": "kept too"} if rest is None else {"first": "kept", "key": rest, "last": "kept too"})
    assert list(stripped) == [key for key in metadata if key in stripped]
    assert private_values(stripped) == []  # nothing left, and nothing new
    if text[0] in "{[":
        json.loads(stripped["key"])


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_values_keep_every_byte(text: str) -> None:
    assert private_values({"key": text}) == []
    assert strip_private({"key": text}) == {"key": text}


def test_keys_that_name_a_machine_or_a_user() -> None:
    metadata = {
        "ss_hostname": "box7",
        "user": "alice",
        "machine_name": "m",
        "ss_session_id": "123",
        "modelspec.author": "Alice",
        "username": "None",
    }
    assert [key for key, _ in private_values(metadata)] == ["ss_hostname", "user", "machine_name"]
    assert list(strip_private(metadata)) == ["ss_session_id", "modelspec.author", "username"]


def test_json_keeps_its_layout() -> None:
    text = json.dumps({"unet.r": 4, "unet.base": "/home/a/b", "z": "ü"}, indent=2)
    assert strip_private({"k": text})["k"] == json.dumps({"unet.r": 4, "z": "ü"}, indent=2)


# --- lora_adapter_metadata --------------------------------------------------------------------------------------------


def test_peft_metadata_round_trip() -> None:
    components = {"unet": {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"], "rank_pattern": {"a.b": 2}}, "text_encoder": {"r": 2}}
    text = lora_adapter_metadata(components)
    assert peft_metadata({"lora_adapter_metadata": text}) == components
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text.startswith('{\n  "text_encoder.r": 2,\n  "unet.lora_alpha": 8,')
    assert peft_metadata({"format": "pt"}) == {}


@pytest.mark.parity
def test_peft_metadata_as_diffusers_writes_it() -> None:
    """The text that diffusers' save_lora_weights packs into the header, read by our parser and equal to our writer's."""
    lora_base = pytest.importorskip("diffusers.loaders.lora_base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["to_k", "to_q"], "bias": "none"}
    text = json.dumps(lora_base._pack_dict_with_prefix(config, "unet"), indent=2, sort_keys=True)
    assert peft_metadata({"lora_adapter_metadata": text}) == {"unet": config}
    assert lora_adapter_metadata({"unet": config}) == text


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"unet.r": 4, "unet.r": 8}', '{"unet.r": NaN}', "", "[" * 50_000])
def test_broken_peft_metadata_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="lora_adapter_metadata"):
        peft_metadata({"lora_adapter_metadata": text})
