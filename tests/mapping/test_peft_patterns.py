"""rank_pattern and alpha_pattern as PEFT reads them, and as they are written; the fields that make tensors mean something else.

PEFT: `re.match(rf"(.*\\.)?({key})$", name)`, the first key that matches. Keys from people are regular expressions, in which `.` is
any character; keys written here are names, so it is escaped.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapters.adapter import Module
from loratools.adapters.kinds import Lora
from loratools.errors import LoraToolsError
from loratools.mapping.peft_config import UNSUPPORTED, alpha_of, complaints, config_for, rank_of
from loratools.operations.convert import convert
from tests.mapping.builders import Blank

Q = "model.layers.0.self_attn.q_proj"

READ = [  # patterns in their order, a module's name, the value PEFT takes (None: the one for all)
    ({"q_proj": 8}, Q, 8),
    ({"self_attn.q_proj": 8}, Q, 8),
    ({Q: 8}, Q, 8),
    ({f"^{Q}": 8}, Q, 8),
    ({"^q_proj": 8}, Q, None),  # anchored at the beginning of the whole name
    ({f"^{Q}$": 8}, Q, 8),
    ({"proj": 8}, Q, None),  # a part of a name between dots is matched whole
    ({"q_pro": 8}, Q, None),
    ({"model": 8}, Q, None),  # and at the end
    ({"k_proj": 8, "q_proj": 16}, Q, 16),
    ({"q_proj": 8, Q: 16}, Q, 8),  # the first of two
    ({Q: 16, "q_proj": 8}, Q, 16),
    ({r"layers\.\d+\.self_attn\.(q|k)_proj": 8}, Q, 8),
    ({r"layers\.[1-9]\.self_attn\..*": 8}, Q, None),
    ({r".*\.(to_q|q_proj)": 8}, Q, 8),
    ({"k_proj|q_proj": 8}, Q, 8),  # the alternatives are held together
    ({"down.0": 8}, "blocks.down_0", 8),  # an unescaped dot is any character
    ({r"down\.0": 8}, "blocks.down_0", None),
    ({r"down\.0": 8}, "blocks.down.0", 8),
    ({"layers.1.q": 8}, "layers.11.q", None),
    ({"layers.1.q": 8}, "layers.1.q", 8),
    ({"q_proj": 8}, "q_proj", 8),  # a module at the top
    ({}, Q, None),
]


@pytest.mark.parametrize(("patterns", "name", "value"), READ)
def test_patterns_are_read_as_peft_reads_them(patterns: dict[str, int], name: str, value: int | None) -> None:
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": patterns, "alpha_pattern": patterns}
    assert rank_of(config, name) == (4 if value is None else value)
    assert alpha_of(config, name, 4) == (6.0 if value is None else float(value))
    assert alpha_of({**config, "use_rslora": True}, name, 4) == (6.0 if value is None else float(value)) * 2  # alpha / sqrt(r), r = 4
    other = pytest.importorskip("peft.utils.other")
    assert patterns.get(other.get_pattern_key(patterns.keys(), name)) == value, "the table above is not what PEFT does"


# ------------------------------------------------------------------------------------------------------------------- written


def lora(rank: int, alpha: float) -> Module:
    return Lora({"up": Blank((8, rank)), "down": Blank((rank, 8))}, alpha)


ALIKE = {  # every name of the left would match one of the right, were its dots any character or its end or beginning open
    "blocks.a.b": (8, 3.0),
    "blocks.axb": (4, 4.0),
    "blocks.a_b": (4, 4.0),
    "blocks.1.q": (16, 5.0),
    "blocks.11.q": (4, 4.0),
    "blocks.1xq": (4, 4.0),
    "other.blocks.1.q": (4, 4.0),
    "other.blocks.a.b": (2, 4.0),
    "blocks.c+d": (8, 1.5),  # a name is no expression, whatever is in it
    "blocks.ccd": (4, 4.0),
}


@pytest.mark.parametrize("turned", [False, True])
def test_written_patterns_are_the_names_and_no_others(turned: bool) -> None:
    """What PEFT takes from the written config for each module is that module's own rank and alpha, in any order of the modules."""
    other = pytest.importorskip("peft.utils.other")
    names = list(ALIKE)[::-1] if turned else list(ALIKE)
    config = config_for({name: lora(*ALIKE[name]) for name in names}, names, {}, "peft")
    assert (config["r"], config["lora_alpha"]) == (4, 4)  # the commonest: only the others are in the patterns
    assert (len(config["rank_pattern"]), len(config["alpha_pattern"])) == (4, 3)
    for name, (rank, alpha) in ALIKE.items():
        for field, value, usual in (("rank_pattern", rank, 4), ("alpha_pattern", alpha, 4)):
            patterns = config[field]
            assert patterns.get(other.get_pattern_key(patterns.keys(), name), usual) == value, (name, field)
        assert rank_of(config, name) == rank
        assert alpha_of(config, name, rank) == alpha


def test_a_clips_name_is_matched_with_and_without_its_wrapper() -> None:
    """transformers 5 dropped `text_model.`: one written config serves models of both versions, and no name that only looks like it."""
    other = pytest.importorskip("peft.utils.other")
    one, two = "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.mlp.fc1"
    config = config_for({one: lora(8, 3.0), two: lora(4, 4.0), "text_model.encoder.layers.2.mlp.fc1": lora(4, 4.0)}, [], {}, "peft")
    patterns = config["rank_pattern"]
    strangers = ("text_modelxencoder.layers.0.mlp.fc1", "encoder.layersx0.mlp.fc1", "text_model.encoder.layers.0.mlpxfc1")
    wanted = {one: 8, one.removeprefix("text_model."): 8, two: None, **dict.fromkeys(strangers)}
    for name, rank in wanted.items():
        assert patterns.get(other.get_pattern_key(patterns.keys(), name)) == rank, name


# ------------------------------------------------------------------------------------------------------------- fields refused


REFUSED: dict[str, tuple[Any, str]] = {  # field → (a value that is not its default, a word of what is told)
    "target_parameters": (["mlp.experts.gate_up_proj"], "bare parameters"),
    "layer_replication": ([[0, 2], [1, 2]], "repeats layers"),
    "trainable_token_indices": ({"embed_tokens": [3, 4]}, "embedding rows"),
    "use_qalora": (True, "QA-LoRA"),
    "use_bdlora": ({"nblocks": 2}, "BD-LoRA"),
    "alora_invocation_tokens": ([1, 2], "aLoRA"),
    "arrow_config": ({"top_k": 3}, "Arrow"),
    "velora_config": ({"num_groups": 4}, "VeLoRA"),
    "kasa_config": ({"beta": 1e-4}, "KaSA"),
    "monteclora_config": ({"num_samples": 2}, "MonteCLoRA"),
}


def folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    tensors = {f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 8), f"base_model.model.{Q}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return path


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_changes_what_the_tensors_mean_is_refused_by_name(field: str, tmp_path: Path) -> None:
    value, word = REFUSED[field]
    (told,) = complaints({"peft_type": "LORA", field: value})
    assert told[0] == "error"
    assert field in told[1]
    assert word in told[1]
    with pytest.raises(LoraToolsError) as refused:
        convert(folder(tmp_path / "set", **{field: value}), tmp_path / "out", "peft", dtype="fp16")
    assert refused.value.exit_code == 3
    assert field in "\n".join([refused.value.message, *refused.value.details])
    assert not (tmp_path / "out").exists()
    convert(folder(tmp_path / "unset", **{field: None}), tmp_path / "out", "peft", dtype="fp16")


def test_every_field_that_is_refused_is_tried_above() -> None:
    assert UNSUPPORTED.keys() == REFUSED.keys()


def test_a_scale_by_pattern_is_the_scale_of_the_delta(tmp_path: Path) -> None:
    """Through the whole road: alpha 12 by a pattern with dots for any character, rank 2 by the tensors: scale 12 / sqrt(2)."""
    import loratools

    path = folder(tmp_path / "a", alpha_pattern={"self_attn.q.proj": 12}, use_rslora=True)
    ((site, modules),) = loratools.load(path).modules.items()
    assert site.path == Q
    expected = torch.full((8, 8), 2 * 12 / math.sqrt(2), dtype=torch.float64)
    assert torch.allclose(modules[0].delta(), expected, rtol=1e-12)
