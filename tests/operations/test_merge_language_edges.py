"""merge into language models whose configuration is not the plain one: parts of a multimodal model, encoders, heads that are there anyway.

Bases and adapters are a few tensors each, with a config.json by hand; every expected value is W + alpha / r · B A in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import InputError
from loratools.operations.merge import merge
from tests.operations.merge_by_hand import Pair, noise

Tensors = dict[str, torch.Tensor]

WORDS, WIDTH = 20, 8
Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"
EMBED = {"text": "model.embed_tokens", "parts": "model.language_model.embed_tokens", "bare": "embed_tokens"}
LAYER = {"text": Q, "parts": "model.language_model.layers.0.self_attn.q_proj", "bare": "layers.0.self_attn.q_proj"}


def base(folder: Path, config: Mapping[str, Any], form: str = "text", head: bool = False) -> Path:
    """A folder with an embedding, one projection and, if asked for, a head that holds the embedding's values."""
    folder.mkdir()
    words = noise(WORDS, WIDTH, seed=1)
    tensors = {f"{EMBED[form]}.weight": words, f"{LAYER[form]}.weight": noise(WIDTH, WIDTH, seed=2)}
    save_file(tensors | ({f"{HEAD}.weight": words.clone()} if head else {}), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pair(name: str) -> Pair:
    """Factors of rank 2 and alpha 3; an embedding's B A is (width, words)."""
    out, in_ = {HEAD: (WORDS, WIDTH)}.get(name, (WIDTH, WORDS) if "embed" in name else (WIDTH, WIDTH))
    return Pair(noise(out, 2, seed=3), noise(2, in_, seed=4), 3.0)


def adapter(folder: Path, *names: str, more: Tensors | None = None) -> Path:
    folder.mkdir()
    tensors: Tensors = dict(more or {})
    for name in names:
        one, stem = pair(name), f"base_model.model.{name}"
        leaves = ("lora_embedding_A", "lora_embedding_B") if "embed" in name else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{stem}.{leaves[0]}": one.down, f"{stem}.{leaves[1]}": one.up}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    return folder


def merged(source: Path, given: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """(tensors before, after, config.json after) of a verified merge."""
    out = source.parent / "out"
    merge(source, [(given, 1.0)], out, verify=True)
    tensors = (load_file(folder / "model.safetensors") for folder in (source, out))
    return *tensors, json.loads((out / "config.json").read_text())  # type: ignore[return-value]


def assert_moved(after: torch.Tensor, before: torch.Tensor, delta: torch.Tensor) -> None:
    assert float(delta.abs().max()) > 0.1
    assert float((after.double() - before.double() - delta).abs().max()) < 1e-5


# --------------------------------------------------------------------------------------------------------- who says it is tied


NAMED = {"architectures": ["LlamaForCausalLM"]}
PARTS = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}

TIED = [  # form, config, is there a head in the file?, config of the result
    ("text", {**NAMED, "tie_word_embeddings": True}, False, {**NAMED, "tie_word_embeddings": False}),
    ("text", {**NAMED, "tie_word_embeddings": True}, True, {**NAMED, "tie_word_embeddings": False}),
    ("text", NAMED, False, {**NAMED, "tie_word_embeddings": False}),  # it says nothing: the file does
    (
        "parts",
        {**PARTS, "text_config": {"tie_word_embeddings": True, "vocab_size": WORDS}},
        True,
        {**PARTS, "text_config": {"tie_word_embeddings": False, "vocab_size": WORDS}},
    ),
    ("parts", {**PARTS, "text_config": {"vocab_size": WORDS}}, False,
     {**PARTS, "text_config": {"vocab_size": WORDS}, "tie_word_embeddings": False}),
    (
        "parts",
        {**PARTS, "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}},
        False,
        {**PARTS, "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
    ),
]  # fmt: skip


@pytest.mark.parametrize("which", ["head", "embedding"])
@pytest.mark.parametrize(("form", "config", "head", "wanted"), TIED)
def test_tied_whoever_says_so(which: str, form: str, config: dict[str, Any], head: bool, wanted: dict[str, Any], tmp_path: Path) -> None:
    """A runtime that ties would overwrite one with the other: both are written, and every part of the configuration says so."""
    name = HEAD if which == "head" else EMBED[form]
    before, after, found = merged(base(tmp_path / "base", config, form, head), adapter(tmp_path / "style", name))
    words, delta = before[f"{EMBED[form]}.weight"], pair(name).delta()
    assert after.keys() == before.keys() | {f"{HEAD}.weight"}
    if which == "head":
        assert_moved(after[f"{HEAD}.weight"], words, delta)
        assert torch.equal(after[f"{EMBED[form]}.weight"], words)
    else:
        assert_moved(after[f"{EMBED[form]}.weight"], words, delta.T)
        assert torch.equal(after[f"{HEAD}.weight"], words)
    assert found == wanted


APART = [  # form, config, is there a head in the file?
    ("text", {**NAMED, "tie_word_embeddings": False}, True),
    ("text", NAMED, True),
    ("parts", {**PARTS, "text_config": {"tie_word_embeddings": False}}, True),
    ("parts", {**PARTS, "text_config": {"tie_word_embeddings": False}}, False),  # a model without a head, whatever it is called
    ("bare", {"architectures": ["LlamaModel"]}, False),  # encoders: an embedding and no head at all
    ("bare", {"architectures": ["Qwen3Model"], "tie_word_embeddings": True}, False),
    ("text", {"architectures": ["LlamaForSequenceClassification"]}, False),
]


@pytest.mark.parametrize(("form", "config", "head"), APART)
def test_a_head_that_shares_nothing(form: str, config: dict[str, Any], head: bool, tmp_path: Path) -> None:
    """The embedding alone changes; no tensor is added, the configuration keeps its bytes."""
    source = base(tmp_path / "base", config, form, head)
    before, after, found = merged(source, adapter(tmp_path / "style", EMBED[form]))
    assert list(after) == list(before)
    assert_moved(after[f"{EMBED[form]}.weight"], before[f"{EMBED[form]}.weight"], pair(EMBED[form]).delta().T)
    assert not head or torch.equal(after[f"{HEAD}.weight"], before[f"{HEAD}.weight"])
    assert found == config
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("head", [False, True])
def test_tied_weights_nobody_touches(head: bool, tmp_path: Path) -> None:
    source = base(tmp_path / "base", {**NAMED, "tie_word_embeddings": True}, head=head)
    before, after, found = merged(source, adapter(tmp_path / "style", Q))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if key != f"{Q}.weight")
    assert found["tie_word_embeddings"] is True


HEADS = ["language_model.lm_head", "embed_out", "output"]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_under_another_name(name: str, tmp_path: Path) -> None:
    """Llava before transformers 4.52, GPT-NeoX, InternLM 2; their configurations need not say that nothing is tied."""
    source = base(tmp_path / "base", NAMED)
    tensors = load_file(source / "model.safetensors") | {f"{name}.weight": noise(WORDS, WIDTH, seed=9)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    before, after, found = merged(source, adapter(tmp_path / "style", EMBED["text"]))
    assert after.keys() == before.keys() == tensors.keys()
    assert_moved(after[f"{EMBED['text']}.weight"], before[f"{EMBED['text']}.weight"], pair(EMBED["text"]).delta().T)
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert found == NAMED


@pytest.mark.parametrize("config", [PARTS, {**PARTS, "tie_word_embeddings": False}])
def test_the_head_of_a_wrapped_text_model(config: dict[str, Any], tmp_path: Path) -> None:
    """Adapters say lm_head today where older files say language_model.lm_head: it is that tensor, not a new one."""
    source = base(tmp_path / "base", config)
    tensors = load_file(source / "model.safetensors") | {f"language_model.{HEAD}.weight": noise(WORDS, WIDTH, seed=9)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    before, after, found = merged(source, adapter(tmp_path / "style", HEAD))
    assert after.keys() == before.keys() == tensors.keys()
    assert_moved(after[f"language_model.{HEAD}.weight"], before[f"language_model.{HEAD}.weight"], pair(HEAD).delta())
    assert found == config


@pytest.mark.parametrize("config", [{**NAMED, "tie_word_embeddings": False}, {"architectures": ["LlamaModel"]}])
def test_a_head_the_base_does_not_have_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    """Not made of an embedding that nothing shares."""
    source, given = base(tmp_path / "base", config), adapter(tmp_path / "style", Q, HEAD)
    with pytest.raises(InputError) as caught:
        merge(source, [(given, 1.0)], tmp_path / "out")
    assert "the base has no lm_head" in "\n".join([caught.value.message, *caught.value.details])
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_grew_in_a_model_of_parts(tmp_path: Path) -> None:
    """vocab_size stands with the text model's settings, and only there."""
    config = {**PARTS, "text_config": {"vocab_size": WORDS, "tie_word_embeddings": False}}
    saved = {f"base_model.model.{name}.weight": noise(WORDS + 2, WIDTH, seed=7) for name in (EMBED["parts"], HEAD)}
    given = adapter(tmp_path / "words", LAYER["parts"], more=saved)
    _, after, found = merged(base(tmp_path / "base", config, "parts", True), given)
    assert found == {**PARTS, "text_config": {"vocab_size": WORDS + 2, "tie_word_embeddings": False}}
    for name in (EMBED["parts"], HEAD):
        assert float((after[f"{name}.weight"] - saved[f"base_model.model.{name}.weight"]).abs().max()) < 1e-6


# ------------------------------------------------------------------------------------------------------- the tokenizer's files


def listed(*ids: int) -> str:
    return json.dumps({"version": "1.0", "added_tokens": [{"id": number, "content": f"<{number}>"} for number in ids], "model": {}})


COUNTED = {  # one of the two files alone tells how many tokens there are
    "added_tokens.json": lambda last: json.dumps({"<new>": last, "<old>": 3}),
    "tokenizer.json": lambda last: listed(last, 3),
}


@pytest.mark.parametrize("file", COUNTED)
@pytest.mark.parametrize(("last", "missing"), [(WORDS - 1, 0), (WORDS, 1), (WORDS + 4, 5)])
def test_tokens_without_rows(file: str, last: int, missing: int, tmp_path: Path) -> None:
    source, given = base(tmp_path / "base", NAMED, head=True), adapter(tmp_path / "words", Q)
    (given / file).write_text(COUNTED[file](last))
    if not missing:
        merge(source, [(given, 1.0)], tmp_path / "out")
        return
    with pytest.raises(InputError) as caught:
        merge(source, [(given, 1.0)], tmp_path / "out")
    told = "\n".join([caught.value.message, *caught.value.details])
    assert f"{missing} tokens" in told
    assert "words" in told
    assert not (tmp_path / "out").exists()


def test_the_file_that_knows_more_tokens_counts(tmp_path: Path) -> None:
    for number, (added, listing) in enumerate(((WORDS + 6, WORDS), (WORDS, WORDS + 6))):
        place = tmp_path / str(number)
        place.mkdir()
        source, given = base(place / "base", NAMED, head=True), adapter(place / "words", Q)
        (given / "added_tokens.json").write_text(COUNTED["added_tokens.json"](added))
        (given / "tokenizer.json").write_text(COUNTED["tokenizer.json"](listing))
        with pytest.raises(InputError) as caught:
            merge(source, [(given, 1.0)], place / "out")
        assert "7 tokens" in "\n".join([caught.value.message, *caught.value.details])


VOCABULARY = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def test_every_file_of_a_vocabulary_goes_with_its_rows(tmp_path: Path) -> None:
    """The adapter's own, in place of the base's or beside them; what else lies in its folder is not the model's."""
    source = base(tmp_path / "base", {**NAMED, "vocab_size": WORDS}, head=True)
    for name in ("chat_template.jinja", "tokenizer.model", "generation_config.json"):
        (source / name).write_text(f"the base's {name}")
    saved = {f"base_model.model.{name}.weight": noise(WORDS + 1, WIDTH, seed=7) for name in (EMBED["text"], HEAD)}
    given = adapter(tmp_path / "words", Q, more=saved)
    texts = {name: json.dumps({"file": name}) for name in VOCABULARY} | {"added_tokens.json": json.dumps({"<new>": WORDS})}
    for name in (*texts, "README.md", "generation_config.json", "trainer_state.json"):
        (given / name).write_text(texts.get(name, "{}"))
    merge(source, [(given, 1.0)], tmp_path / "out")
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_text() == text, name
    wanted = {*VOCABULARY, "model.safetensors", "config.json", "generation_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == wanted
    assert (tmp_path / "out" / "generation_config.json").read_text() == "the base's generation_config.json"


def test_a_vocabulary_that_did_not_grow_stays_the_bases(tmp_path: Path) -> None:
    source = base(tmp_path / "base", NAMED, head=True)
    (source / "chat_template.jinja").write_text("the base's")
    given = adapter(tmp_path / "style", Q)
    for name in ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"):
        (given / name).write_text("{}")
    merge(source, [(given, 1.0)], tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the base's"
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
