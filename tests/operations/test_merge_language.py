"""merge into language models: tied heads, vocabularies that grew, changed bases, transposed layers, names of other library versions.

Every adapter is written by hand under PEFT's keys, and every expected value is W + weight · alpha / r · B A in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import checkpoints, language_models, make
from loratools.errors import InputError, LoraToolsError
from loratools.operations.merge import merge
from tests.operations.made import written
from tests.operations.merged import Change, Raw, State, assert_merged, assert_sum, weights, whole

pytestmark = pytest.mark.filterwarnings("ignore")

Lora = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module → (B, A)

PREFIX = "base_model.model."
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture
def lora(randn: Any) -> Callable[..., Lora]:
    """`lora({module: (out, in)}, rank)` → random factors, small enough to matter and no more."""
    return lambda shapes, rank=4: {name: (randn(out, rank) * 0.1, randn(rank, in_) * 0.1) for name, (out, in_) in shapes.items()}


def keys(found: Lora) -> dict[str, torch.Tensor]:
    """The tensors as PEFT saves them; an embedding's factors are transposed and have no `.weight`."""
    tensors = {}
    for name, (up, down) in found.items():
        if name.endswith(("embed_tokens", "wte")):
            tensors |= {f"{PREFIX}{name}.lora_embedding_A": down, f"{PREFIX}{name}.lora_embedding_B": up}
        else:
            tensors |= {f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up}
    return tensors


def deltas(found: Lora, scale: float) -> tuple[State, State]:
    """({tensor: scale · BA}, the size of its terms); of an embedding (vocabulary, dim) = (BA)ᵀ."""
    delta, size = {}, {}
    for name, (up, down) in found.items():
        products = scale * up.double() @ down.double(), abs(scale) * up.double().abs() @ down.double().abs()
        turned = name.endswith(("embed_tokens", "wte"))
        delta[f"{name}.weight"], size[f"{name}.weight"] = (value.T if turned else value for value in products)
    return delta, size


def config(**more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **more}


def told(error: LoraToolsError) -> str:
    return "\n".join([error.message, *error.details])


def refused(*arguments: Any, **options: Any) -> str:
    """What a refusal says; it is exit 3 and leaves no output."""
    with pytest.raises(InputError) as caught:
        merge(*arguments, **options)
    assert caught.value.exit_code == 3
    assert not Path(arguments[2]).exists()
    return told(caught.value)


# -------------------------------------------------------------------------------------------------------- folders, shards, a file


@pytest.mark.parametrize("form", ["folder", "shards", "file"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(form: str, dtype: str, lora: Any, peft: Any, tmp_path: Path) -> None:
    """Tokenizer, chat template and generation settings come along; the index is that of the base."""
    if form == "file":
        base = language_models.llama_single(tmp_path / "base.safetensors", dtype)
    else:
        base = language_models.llama_folder(tmp_path / "base", dtype, max_shard_size="20KB" if form == "shards" else None)
    found = lora({Q: (32, 32), DOWN: (32, 56), "model.layers.1.self_attn.v_proj": (16, 32), HEAD: (100, 32)})
    adapter, out = peft("style", keys(found), config()), tmp_path / ("out.safetensors" if form == "file" else "out")
    result = merge(base, [(adapter, -0.6)], out)
    assert assert_merged(base, out, Change(*deltas(found, -0.6 * 1.5)), [(adapter, -0.6)]) == result["changed"] == 4
    if form != "file":
        names = {str(file.relative_to(base)) for file in base.rglob("*") if file.suffix != ".safetensors"}
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
        assert names == {str(file.relative_to(out)) for file in out.rglob("*") if file.suffix != ".safetensors"}
        for name in names:
            assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert (form == "shards") == (len(weights(out)) >= 3)


def test_ranks_and_alphas_of_a_config(lora: Any, peft: Any, tmp_path: Path) -> None:
    """L4: patterns with escaped dots, rsLoRA; a rank that is not the tensors' is refused."""
    base = language_models.llama_folder(tmp_path / "base")
    small, large = lora({Q: (32, 32)}, 4), lora({DOWN: (32, 56)}, 9)
    patterns = {"rank_pattern": {r"layers\.1\.mlp\.down_proj": 9}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3}}
    adapter = peft("mixed", keys(small | large), config(use_rslora=True, **patterns))
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    first, second = deltas(small, 6 / 2), deltas(large, 3 / 3)  # alpha / sqrt(r)
    assert_merged(base, tmp_path / "out", Change(first[0] | second[0], first[1] | second[1]), [(adapter, 1.0)])
    wrong = peft("wrong", keys(small | large), config())
    assert DOWN in refused(base, [(wrong, 1.0)], tmp_path / "other")


# ----------------------------------------------------------------------------------------------------------------- tied heads


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("which", ["head", "embedding", "both"])
def test_tied_weights_that_part(which: str, shards: str | None, lora: Any, peft: Any, tmp_path: Path) -> None:
    """L1: a change of one must not reach the other: the head is a tensor of its own then, and the configuration says so."""
    base = language_models.llama_folder(tmp_path / "base", tied=True, max_shard_size=shards)
    head, embedding = lora({HEAD: (100, 32)}), lora({EMBED: (32, 100)})
    found = {"head": head, "embedding": embedding, "both": head | embedding}[which]
    adapter = peft("style", keys(found | (inner := lora({Q: (32, 32)}))), config())
    merge(base, [(adapter, 0.5)], tmp_path / "out", verify=True)
    before, after = whole(base), whole(tmp_path / "out")
    assert after.keys() == before.keys() | {"lm_head.weight"}
    delta, size = deltas(found | inner, 0.5 * 1.5)
    for key in after:
        old = before[f"{EMBED}.weight" if key == "lm_head.weight" else key]
        if key in delta:
            assert_sum(key, after[key], old, delta[key], size[key], "F32")
            assert (after[key] - old).abs().max() > 1e-3
        else:
            assert torch.equal(after[key], old), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert old["tie_word_embeddings"] is True
    assert new == {**old, "tie_word_embeddings": False}
    _index_is_right(tmp_path / "out")


def _index_is_right(folder: Path) -> None:
    """Every tensor is in the shard the index names, total_size is their bytes."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        assert list(weights(folder)) == ["model.safetensors"]
        return
    raws = {name: Raw.of(file) for name, file in weights(folder).items()}
    index = json.loads(path.read_text())
    assert index["weight_map"] == {key: name for name, raw in raws.items() for key in raw.entries}
    assert index["metadata"]["total_size"] == sum(len(raw.payload) for raw in raws.values())


def test_tied_weights_that_stay_together(lora: Any, peft: Any, tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base", tied=True)
    adapter = peft("style", keys(found := lora({Q: (32, 32)})), config())
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert_merged(base, tmp_path / "out", Change(*deltas(found, 1.5)), [(adapter, 1.0)])
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("site", [{HEAD: (100, 32)}, {EMBED: (32, 100)}])
def test_a_tied_single_file_is_refused(site: Mapping[str, tuple[int, int]], lora: Any, peft: Any, tmp_path: Path) -> None:
    """Nothing in it could say that the head is no longer the embedding."""
    folder = language_models.llama_folder(tmp_path / "base", tied=True)
    single = (folder / "model.safetensors").rename(tmp_path / "single.safetensors")
    words = refused(single, [(peft("style", keys(lora(site)), config()), 1.0)], tmp_path / "out.safetensors")
    assert "config.json" in words
    assert EMBED in words
    found = lora({Q: (32, 32)})
    merge(single, [(peft("inner", keys(found), config()), 1.0)], tmp_path / "out.safetensors")


# ---------------------------------------------------------------------------------------------------------------- vocabulary


def grown(randn: Any, *modules: str, rows: int = 102) -> dict[str, torch.Tensor]:
    """modules_to_save as PEFT keeps them: the whole new weight."""
    return {f"{PREFIX}{name}.weight": randn(rows, 32) for name in modules}


def tokenizer(folder: Path, tokens: int) -> dict[str, str]:
    """Write the files of a tokenizer whose highest id is tokens - 1. Returns them."""
    added = [{"id": number, "content": f"<new{number}>", "special": True} for number in range(100, tokens)]
    files = {
        "tokenizer.json": json.dumps({"version": "1.0", "added_tokens": added, "model": {"type": "WordLevel", "vocab": {}}}),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "note": "the adapter's"}),
        "added_tokens.json": json.dumps({one["content"]: one["id"] for one in added}),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return files


@pytest.mark.parametrize("tied", [False, True])
def test_new_words_with_their_rows(tied: bool, lora: Any, peft: Any, randn: Any, tmp_path: Path) -> None:
    """L2: embedding and head are the saved ones, vocab_size and the tokenizer follow."""
    base = language_models.llama_folder(tmp_path / "base", tied=tied)
    saved, found = grown(randn, EMBED, HEAD), lora({Q: (32, 32)})
    adapter = peft("words", saved | keys(found), config(modules_to_save=["embed_tokens", "lm_head"]))
    files = tokenizer(adapter, 102)
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    after = whole(tmp_path / "out")
    for name in (EMBED, HEAD):
        assert after[f"{name}.weight"].shape == (102, 32)
        assert float((after[f"{name}.weight"] - saved[f"{PREFIX}{name}.weight"].double()).abs().max()) < 1e-6
    delta, size = deltas(found, 1.5)
    assert_sum(Q, after[f"{Q}.weight"], whole(base)[f"{Q}.weight"], delta[f"{Q}.weight"], size[f"{Q}.weight"], "F32")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert new == {**old, "vocab_size": 102, "tie_word_embeddings": False}
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text, name
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


@pytest.mark.parametrize("only", [EMBED, HEAD])
def test_new_rows_in_one_place_only(only: str, lora: Any, peft: Any, randn: Any, tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base")
    adapter = peft("words", grown(randn, only) | keys(lora({Q: (32, 32)})), config(modules_to_save=[only.rpartition(".")[2]]))
    words = refused(base, [(adapter, 1.0)], tmp_path / "out")
    for fact in (f"{only}.weight has 102 rows", "has 100 rows", "lm_head.weight", f"{EMBED}.weight"):
        assert fact in words


def test_new_rows_of_unequal_number(lora: Any, peft: Any, randn: Any, tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base")
    adapter = peft("words", grown(randn, EMBED) | grown(randn, HEAD, rows=103) | keys(lora({Q: (32, 32)})), config())
    assert "103 rows" in refused(base, [(adapter, 1.0)], tmp_path / "out")


def test_a_single_file_cannot_grow(lora: Any, peft: Any, randn: Any, tmp_path: Path) -> None:
    base = language_models.llama_single(tmp_path / "base.safetensors")
    adapter = peft("words", grown(randn, EMBED, HEAD) | keys(lora({Q: (32, 32)})), config())
    assert "vocab_size" in refused(base, [(adapter, 1.0)], tmp_path / "out.safetensors")


@pytest.mark.parametrize(("tokens", "missing"), [(100, 0), (102, 2)])
def test_new_words_without_their_rows(tokens: int, missing: int, lora: Any, peft: Any, tmp_path: Path) -> None:
    """LlamaFactory#3125: the tokenizer beside the adapter knows more words than there are rows."""
    base = language_models.llama_folder(tmp_path / "base")
    adapter = peft("words", keys(lora({Q: (32, 32)})), config())
    tokenizer(adapter, tokens)
    if not missing:
        assert merge(base, [(adapter, 1.0)], tmp_path / "out")["changed"] == 1
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        return
    words = refused(base, [(adapter, 1.0)], tmp_path / "out")
    assert "2 tokens" in words
    assert "words" in words


# ---------------------------------------------------------------------------------------------------------- what a config says


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_init_that_changed_the_base(init: str, lora: Any, peft: Any, tmp_path: Path) -> None:
    """L5: alone it is wrong on the original base; with its initial factors taken away it is W + s (BA - B0 A0)."""
    base = language_models.llama_folder(tmp_path / "base")
    tuned, start = lora({Q: (32, 32), DOWN: (32, 56)}), lora({Q: (32, 32), DOWN: (32, 56)})
    after, before = (peft(name, keys(one), config(init_lora_weights=init)) for name, one in (("tuned", tuned), ("start", start)))
    for given in ([(after, 1.0)], [(after, 1.0), (before, 1.0)], [(after, 1.0), (before, -0.5)]):
        assert init in refused(base, given, tmp_path / "out")
    merge(base, [(after, 1.0), (before, -1.0)], tmp_path / "out")
    (delta, size), (away, more) = deltas(tuned, 1.5), deltas(start, -1.5)
    change = Change({key: delta[key] + away[key] for key in delta}, {key: size[key] + more[key] for key in size})
    assert assert_merged(base, tmp_path / "out", change, [(after, 1.0), (before, -1.0)]) == 2


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_init_that_left_the_base_alone(init: Any, lora: Any, peft: Any, tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base")
    merge(base, [(peft("style", keys(lora({Q: (32, 32)})), config(init_lora_weights=init)), 1.0)], tmp_path / "out")


UNSUPPORTED: Mapping[str, Any] = {
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "trainable_token_indices": {"embed_tokens": [3, 4]},
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_changes_what_the_tensors_mean(field: str, lora: Any, peft: Any, tmp_path: Path) -> None:
    """L6: named, not passed over; at its default it is no matter."""
    base, tensors = language_models.llama_folder(tmp_path / "base"), keys(lora({Q: (32, 32)}))
    assert field in refused(base, [(peft("style", tensors, config(**{field: UNSUPPORTED[field]})), 1.0)], tmp_path / "out")
    merge(base, [(peft("plain", tensors, config(**{field: None})), 1.0)], tmp_path / "out")


@pytest.mark.parametrize("kind", ["ADALORA", "PREFIX_TUNING", "VERA", "VBLORA"])
def test_another_kind_of_adapter(kind: str, lora: Any, peft: Any, tmp_path: Path) -> None:
    base = language_models.llama_folder(tmp_path / "base")
    adapter = peft("style", keys(lora({Q: (32, 32)})), config())
    (adapter / "adapter_config.json").write_text(json.dumps(config(peft_type=kind)))
    assert kind in refused(base, [(adapter, 1.0)], tmp_path / "out")


def test_a_field_nobody_knows(lora: Any, peft: Any, tmp_path: Path) -> None:
    """L6: a field of a later PEFT that is set may change every number; none of today's defaults does."""
    from peft import LoraConfig

    base, tensors = language_models.llama_folder(tmp_path / "base"), keys(lora({Q: (32, 32)}))
    today = {key: list(value) if isinstance(value, set) else value for key, value in LoraConfig(r=4, lora_alpha=6).to_dict().items()}
    merge(base, [(peft("today", tensors, today), 1.0)], tmp_path / "known")
    assert "use_tomorrow" in refused(base, [(peft("tomorrow", tensors, {**today, "use_tomorrow": True}), 1.0)], tmp_path / "out")


def test_trained_biases_replace_the_bases(lora: Any, peft: Any, randn: Any, tmp_path: Path) -> None:
    """L6, bias = "all": the file holds whole biases, which alpha does not scale; weight 0.5 goes half of the way."""
    base, name = language_models.gpt2_folder(tmp_path / "base"), "transformer.h.1.mlp.c_fc"
    saved = randn(32)
    adapter = peft("style", keys(lora({name: (32, 32)})) | {f"{PREFIX}{name}.bias": saved}, config(bias="all", fan_in_fan_out=True))
    old = whole(base)[f"{name}.bias"]
    for weight in (1.0, 0.5):
        result = merge(base, [(adapter, weight)], tmp_path / "out", force=True)
        assert any("bias" in warning for warning in result["warnings"])
        found, wanted = whole(tmp_path / "out")[f"{name}.bias"], old + weight * (saved.double() - old)
        assert float((found - wanted).abs().max()) < 1e-6


# --------------------------------------------------------------------------------------------------- transposed layers, names


@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_transposed_layers(weight: float, lora: Any, peft: Any, tmp_path: Path) -> None:
    """L7: GPT-2 keeps (in, out). attn.c_proj and the mlp are square here: a delta the wrong way round would fit."""
    base = language_models.gpt2_folder(tmp_path / "base")
    shapes = {f"transformer.h.{at}.{name}": (32, 32) for at in (0, 1) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    found = lora(shapes | {"transformer.h.0.attn.c_attn": (96, 32)})
    adapter = peft("style", keys(found), config(fan_in_fan_out=True))
    assert merge(base, [(adapter, weight)], tmp_path / "out", verify=True)["changed"] == 7
    delta, size = ({key: value.T for key, value in part.items()} for part in deltas(found, weight * 1.5))
    assert_merged(base, tmp_path / "out", Change(delta, size), [(adapter, weight)])


ALIASES = [  # (what the adapter's names begin with, what the base's do)
    ("model.", "model."),
    ("model.", ""),
    ("", "model."),
    ("model.language_model.", "model."),
    ("model.", "model.language_model."),
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "model.language_model."),
]


@pytest.mark.parametrize(("mine", "theirs"), ALIASES)
def test_names_of_other_versions(mine: str, theirs: str, lora: Any, peft: Any, tmp_path: Path) -> None:
    """L11: wrappers moved the text model about; the same layers get the same change whatever both are called."""
    state = {key.replace("model.", theirs, 1): value.clone() for key, value in make.llama().state_dict().items()}
    base = checkpoints.write(tmp_path / "base.safetensors", state, "a llama of another version")
    inner = {"layers.0.self_attn.q_proj": (32, 32), "layers.1.mlp.down_proj": (32, 56)}
    found = lora({mine + name: shape for name, shape in inner.items()})
    adapter = peft("style", keys(found), config())
    merge(base, [(adapter, 0.8)], tmp_path / "out.safetensors")
    delta, size = ({theirs + key.removeprefix(mine): value for key, value in part.items()} for part in deltas(found, 0.8 * 1.5))
    assert assert_merged(base, tmp_path / "out.safetensors", Change(delta, size), [(adapter, 0.8)]) == 2


def test_gpt2_with_and_without_its_wrapper(lora: Any, peft: Any, tmp_path: Path) -> None:
    """`h.0.…` in files of the bare model, `transformer.h.0.…` in those of the one with a head."""
    folder = language_models.gpt2_folder(tmp_path / "base")
    bare = {key.removeprefix("transformer."): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    found = lora({"transformer.h.1.mlp.c_fc": (32, 32)})
    adapter = peft("style", keys(found), config(fan_in_fan_out=True))
    merge(folder, [(adapter, 1.0)], tmp_path / "out")
    delta, size = ({key.removeprefix("transformer."): value.T for key, value in part.items()} for part in deltas(found, 1.5))
    assert_merged(folder, tmp_path / "out", Change(delta, size), [(adapter, 1.0)])


def test_a_layer_the_base_does_not_have(lora: Any, peft: Any, tmp_path: Path) -> None:
    """A third layer's adapter on two layers: its keys are listed with the nearest name; the rest is not merged either."""
    base = language_models.llama_folder(tmp_path / "base")
    missing = "model.layers.2.self_attn.q_proj"
    words = refused(base, [(peft("style", keys(lora({Q: (32, 32), missing: (32, 32)})), config()), 1.0)], tmp_path / "out")
    for leaf in ("lora_A.weight", "lora_B.weight"):
        assert f"{PREFIX}{missing}.{leaf}" in words
    assert "the nearest is model.layers." in words
    assert f"{PREFIX}{Q}" not in words


def test_kohya_names_of_a_language_model(randn: Any, save: Any, tmp_path: Path) -> None:
    """Flattened names have no dots to go by and no table; the base's own names say where they lay. A name it has not is refused."""
    base, stem = language_models.llama_folder(tmp_path / "base"), "lora_te_model_layers_0_self_attn_q_proj"
    up, down, name = randn(32, 4), randn(4, 32), "model.layers.0.self_attn.q_proj.weight"
    merge(base, [(save("flat.safetensors", written(stem, up, down, 2.0)), 1.0)], tmp_path / "out")
    before, after = whole(base), whole(tmp_path / "out")
    change = up.double() @ down.double() * 2 / 4
    assert_sum(name, after[name], before[name], change, up.double().abs() @ down.double().abs() / 2, "F32")
    assert [key for key in before if not torch.equal(before[key], after[key])] == [name]
    gone = "lora_te_model_layers_9_self_attn_q_proj"
    elsewhere = save("gone.safetensors", written(gone, up, down))
    assert f"{gone}.lora_up.weight" in refused(base, [(elsewhere, 1.0)], tmp_path / "out2")
