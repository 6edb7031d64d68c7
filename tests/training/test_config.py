"""The configuration of a training: what is read and filled in, written and compared."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("pydantic")

from pydantic import ValidationError

from loratools.mapping.architectures import registry
from loratools.training import config as module
from loratools.training.config import Config, LossSettings, ScheduleSettings, Settings, TimestepSettings
from loratools.training.config_dump import FREE, differences, dump
from loratools.training.config_load import load
from loratools.training.losses import LOSSES, TARGETS
from loratools.training.schedule import DECAYS
from loratools.training.timesteps import LAWS, WEIGHTINGS
from tests.training.configs import FULL, SMALLEST, written


def keys(value: Any, where: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of every field of every table, by walking the models themselves."""
    for name in type(value).model_fields:
        inner = getattr(value, name)
        for entry in inner if isinstance(inner, tuple) else (inner,):
            if isinstance(entry, Settings):
                yield from keys(entry, f"{where}{name}.")
        yield where + name, inner


def test_the_smallest_file(tmp_path: Path) -> None:
    config = load(written(tmp_path, SMALLEST))
    assert config.model.path == tmp_path / "base"
    assert config.data.folders[0].path == tmp_path / "pictures"
    assert config.save.folder == tmp_path / "output"
    assert (config.train.steps, config.train.epochs, config.dreambooth) == (100, None, None)
    assert (config.adapter.rank, config.adapter.alpha, config.optimizer.lr) == (16, 16.0, 1e-4)


def test_every_key_is_read(tmp_path: Path) -> None:
    config = load(written(tmp_path, FULL))
    given = tomllib.loads(FULL)
    for table in ("adapter", "train", "schedule", "validation", "log", "dreambooth"):
        for key, value in given[table].items():
            found = getattr(getattr(config, table), key)
            if key != "class_folder":
                assert found == (tuple(value) if isinstance(value, list) else value), key
    assert config.optimizer.options["eps"] == (1e-30, 1e-3)
    assert config.optimizer.options["safeguard_warmup"] is True
    assert type(config.optimizer.options["growth"]) is int
    assert config.save.formats == ("kohya", "diffusers")
    assert [type(value) for value in (config.schedule.warmup, config.data.held_out, config.data.caption_dropout)] == [float] * 3
    assert config.data.folders[0].suffix == ', "quoted" \\ \x7f\n'


def test_the_full_file_leaves_no_key_at_its_default(tmp_path: Path) -> None:
    """So that the round trip below is one of every key."""
    plain, full = load(written(tmp_path, SMALLEST)), dict(keys(load(written(tmp_path, FULL))))
    same = {key for key, value in keys(plain) if full[key] == value and key != "data.folders.path"}
    assert same == {"loss.weighting"} | {key for key in same if key.startswith("data.folders.")}  # the second folder has defaults
    folder = load(written(tmp_path, FULL)).data.folders[0]
    assert not [name for name, field in type(folder).model_fields.items() if getattr(folder, name) == field.get_default()]


def test_every_key_is_described() -> None:
    for table in vars(module).values():
        if isinstance(table, type) and issubclass(table, Settings):
            assert (table.__doc__ or "").startswith(("[", "The whole file", "What all tables share"))
            for name, field in table.model_fields.items():
                assert (field.description or "").endswith("."), f"{table.__name__}.{name}"
                assert "\n" not in (field.description or "")


@pytest.mark.parametrize(
    "text",
    [SMALLEST, FULL, SMALLEST + '[optimizer]\nname = "prodigy"\n', SMALLEST.replace("steps", "epochs")],
    ids=["smallest", "full", "prodigy", "epochs"],
)
def test_what_is_written_loads_to_the_same(tmp_path: Path, text: str) -> None:
    config = load(written(tmp_path, text))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = load(written(elsewhere, dump(config)))
    assert again == config
    assert dump(again) == dump(config)
    assert dict(keys(again)) == dict(keys(config))
    types = [(key, type(value)) for key, value in keys(config)]
    assert [(key, type(value)) for key, value in keys(again)] == types


def test_what_is_written_names_every_value(tmp_path: Path) -> None:
    """Resolved: defaults and absolute paths are in the text, None is not."""
    config = load(written(tmp_path, SMALLEST))
    read = tomllib.loads(dump(config))
    assert read["adapter"]["alpha"] == 16.0
    assert read["model"]["path"] == str(tmp_path / "base")
    assert read["data"]["folders"] == [
        {"path": str(tmp_path / "pictures"), "repeats": 1, "caption_extension": ".txt", "prefix": "", "suffix": ""}
    ]
    assert read["loss"]["timesteps"]["scale"] == 1.0
    assert read["optimizer"]["betas"] == [0.9, 0.999]
    assert "epochs" not in read["train"]
    assert "dreambooth" not in read
    assert {"model", "adapter", "data", "train", "optimizer", "schedule", "loss", "save", "validation", "log"} == read.keys()
    assert dump(config).startswith("[model]\n")
    assert dump(config).endswith("\n")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("rank = 4", (4, 4.0, None, None)),
        ("rank = 4\nalpha = 1", (4, 1.0, None, None)),
        ("alpha = 8", (16, 8.0, None, None)),
        ("conv_rank = 2", (16, 16.0, 2, 2.0)),
        ("conv_rank = 2\nconv_alpha = 0.5", (16, 16.0, 2, 0.5)),
    ],
)
def test_alpha_is_the_rank_where_none_is_given(tmp_path: Path, more: str, expected: tuple[Any, ...]) -> None:
    adapter = load(written(tmp_path, f"{SMALLEST}[adapter]\n{more}\n")).adapter
    assert (adapter.rank, adapter.alpha, adapter.conv_rank, adapter.conv_alpha) == expected


@pytest.mark.parametrize(("more", "scale"), [('law = "sigmoid"', 1.0), ('law = "mode"', 1.29), ('law = "mode"\nscale = 0', 0.0)])
def test_a_law_has_its_own_scale(tmp_path: Path, more: str, scale: float) -> None:
    assert load(written(tmp_path, f"{SMALLEST}[loss.timesteps]\n{more}\n")).loss.timesteps.scale == scale


@pytest.mark.parametrize(("more", "lr"), [('name = "sgd"', 1e-4), ('name = "prodigy"', 1.0), ('name = "prodigy"\nlr = 0.3', 0.3)])
def test_an_optimizer_has_its_own_learning_rate(tmp_path: Path, more: str, lr: float) -> None:
    assert load(written(tmp_path, f"{SMALLEST}[optimizer]\n{more}\n")).optimizer.lr == lr


@pytest.mark.parametrize(
    ("table", "line", "value"),
    [
        ("data", "held_out = 3", 3),
        ("data", "held_out = 0.5", 0.5),
        ("data", "cache = 'off'", "off"),
        ("schedule", "warmup = 100", 100),
        ("train", "checkpointing = 'on'", "on"),
        ("train", "checkpointing = 4", 4),
        ("adapter", "targets = 'all-linear'", "all-linear"),
        ("adapter", "targets = ['to_q']", ("to_q",)),
        ("adapter", "init = 'pissa_niter_16'", "pissa_niter_16"),
        ("adapter", "dora = true\ndropout = 0.5", True),
    ],
)
def test_values_of_more_than_one_kind(tmp_path: Path, table: str, line: str, value: object) -> None:
    text = SMALLEST.replace("[train]\n", f"[train]\n{line}\n") if table == "train" else f"{SMALLEST}[{table}]\n{line}\n"
    if table == "data":
        text = SMALLEST.replace("[[data.folders]]", f"[data]\n{line}\n[[data.folders]]")
    config = load(written(tmp_path, text))
    found = getattr(getattr(config, table), line.partition(" ")[0])
    assert (found, type(found)) == (value, type(value))


# --- what a resumed run has to keep


def test_no_difference(tmp_path: Path) -> None:
    config = load(written(tmp_path, FULL))
    assert differences(config, load(written(tmp_path, dump(config)))) == []


@pytest.mark.parametrize(
    ("override", "field", "old", "new"),
    [
        ("adapter.alpha=8", "adapter.alpha", 16.0, 8.0),
        ("adapter.text_encoders=['text_encoder']", "adapter.text_encoders", (), ("text_encoder",)),
        ("model.path=/other", "model.path", None, Path("/other")),
        ("data.folders.0.repeats=2", "data.folders.0.repeats", 1, 2),
        ("data.buckets.step=32", "data.buckets.step", 64, 32),
        ("data.held_out=1", "data.held_out", 0, 1),
        ("train.steps=200", "train.steps", 100, 200),
        ("train.batch=2", "train.batch", 1, 2),
        ("train.seed=1", "train.seed", 0, 1),
        ("train.threads=2", "train.threads", None, 2),
        ("train.precision=fp32", "train.precision", "bf16", "fp32"),
        ("optimizer.lr=1", "optimizer.lr", 1e-4, 1.0),
        ("optimizer.options.d=1", "optimizer.options.d", None, 1),
        ("schedule.warmup=5", "schedule.warmup", 0, 5),
        ("loss.timesteps.shift=3", "loss.timesteps.shift", 1.0, 3.0),
        ("loss.min_snr_gamma=5", "loss.min_snr_gamma", None, 5.0),
    ],
)
def test_what_matters_is_a_difference(tmp_path: Path, override: str, field: str, old: object, new: object) -> None:
    path = written(tmp_path, SMALLEST)
    (found,) = differences(load(path), load(path, [override]))
    assert (found.field, found.new) == (field, new)
    assert found.old == (tmp_path / "base" if field == "model.path" else old)
    (back,) = differences(load(path, [override]), load(path))
    assert (back.field, back.old, back.new) == (found.field, found.new, found.old)


@pytest.mark.parametrize(
    "override",
    ["save.folder=x", "save.every_steps=3", "log.every=3", "validation.seed=3", "data.cache_folder=x", "train.nan_check_every=1"],
)
def test_what_may_change_is_none(tmp_path: Path, override: str) -> None:
    path = written(tmp_path, SMALLEST)
    assert load(path) != load(path, [override])
    assert differences(load(path), load(path, [override])) == []


def test_tables_and_folders_that_come_and_go(tmp_path: Path) -> None:
    plain = load(written(tmp_path, SMALLEST))
    more = SMALLEST.replace("[train]", "[[data.folders]]\npath = '/b'\n[dreambooth]\nclass_prompt = 'a dog'\n[train]")
    found = {one.field: (one.old, one.new) for one in differences(plain, load(written(tmp_path, more)))}
    assert found["data.folders.1.path"] == (None, Path("/b"))
    assert found["dreambooth.class_prompt"] == (None, "a dog")
    assert found["dreambooth.class_images"] == (None, 100)
    assert not [field for field in found if field.startswith("data.folders.0")]


def test_all_that_may_change_exists(tmp_path: Path) -> None:
    names = {key for key, _ in keys(load(written(tmp_path, FULL)))}
    for free in FREE:
        assert [key for key in names if key == free or (free.endswith(".*") and key.startswith(free[:-1]))], free


# --- the models


def test_families_are_architectures() -> None:
    for family in ("sd1", "sd2", "sdxl", "sd3", "flux"):
        config = Config.model_validate(
            {"model": {"path": "m", "family": family}, "data": {"folders": [{"path": "d"}]}, "train": {"steps": 1}, "adapter": {
                "text_encoders": [part.name for part in registry()[family].components if part.name != "denoiser"]}}
        )  # fmt: skip
        assert config.model.family == family


@pytest.mark.parametrize(
    ("table", "field", "names"),
    [
        (ScheduleSettings, "name", DECAYS),
        (TimestepSettings, "law", LAWS),
        (LossSettings, "weighting", WEIGHTINGS),
        (LossSettings, "kind", LOSSES),
        (LossSettings, "prediction", {"auto", *TARGETS}),
    ],
)
def test_what_can_be_chosen_is_what_there_is(table: type[Settings], field: str, names: Iterable[str]) -> None:
    assert set(get_args(table.model_fields[field].annotation)) == set(names)


def test_a_config_does_not_change(tmp_path: Path) -> None:
    config = load(written(tmp_path, SMALLEST))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_without_pydantic_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["pydantic"] = None
import loratools, loratools.training
from loratools.errors import UnsupportedError
try:
    import loratools.training.config_load
except UnsupportedError as error:
    print(error.exit_code, error.fix)
"""
    assert run(code) == "3 pip install 'loratools[train]'"


def test_neither_torch_nor_pydantic_where_they_are_not_needed(tmp_path: Path) -> None:
    path = written(tmp_path, SMALLEST)
    code = f"""
import sys
from pathlib import Path
import loratools, loratools.cli.main
assert "pydantic" not in sys.modules
from loratools.training.config_load import load
from loratools.training.config_dump import dump
dump(load(Path({str(path)!r})))
print(sorted({{"torch", "diffusers", "peft"}} & set(sys.modules)))
"""
    assert run(code) == "[]"
