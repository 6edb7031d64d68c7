"""Files of a training's configuration, the paths in them, and values of --set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from loratools.errors import InputError, UsageError
from loratools.training.config_load import load
from tests.training.configs import SMALLEST, refused, written


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf" + SMALLEST.encode(), SMALLEST.replace("\n", "\r\n").encode()], ids=["bom", "crlf"])
def test_byte_order_mark_and_line_ends(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "train.toml"
    path.write_bytes(data)
    assert load(path).train.steps == 100
    path.write_bytes(data.replace(b"100", b"0"))
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.details == ["[train] steps: expected at least 1, found 0 (line 6)"]


def test_no_toml(tmp_path: Path) -> None:
    path = written(tmp_path, "[model]\npath = base\n")
    with pytest.raises(InputError, match="not TOML") as caught:
        load(path)
    assert str(path) in caught.value.message
    assert caught.value.details == ["line 2: path = base"]
    assert "quotes" in str(caught.value.fix)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = 1" + "0" * 5000, "[train]\n[train]\n", "a = 'x", "a = 1\rb = 2"])
def test_what_breaks_parsers(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="not TOML"):
        load(written(tmp_path, text))


def test_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_bytes(SMALLEST.encode() + b"# K\xf6ln\n")
    with pytest.raises(InputError, match="line 7 is not UTF-8"):
        load(path)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are no configuration"):
        load(written(tmp_path, SMALLEST + "#" * (1 << 20)))


def test_no_file(tmp_path: Path) -> None:
    written(tmp_path, SMALLEST)
    with pytest.raises(InputError) as caught:
        load(tmp_path / "trian.toml")
    assert caught.value.fix == f"did you mean {tmp_path / 'train.toml'}?"
    with pytest.raises(InputError):
        load(tmp_path)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = (
        SMALLEST.replace('"base"', '"../models/base"')
        + "[save]\nfolder = '~/runs'\n[dreambooth]\nclass_prompt = 'a'\nclass_folder = '/class'\n"
    )
    written(tmp_path / "configs", text)
    config = load(Path("../configs/train.toml"), ["data.cache_folder=cache"])
    assert config.model.path.is_absolute()
    assert config.model.path.resolve() == (tmp_path / "models/base").resolve()
    assert config.data.folders[0].path.resolve() == (tmp_path / "configs/pictures").resolve()
    assert config.save.folder == tmp_path / "home/runs"
    assert config.dreambooth is not None
    assert config.dreambooth.class_folder == Path("/class")
    assert config.data.cache_folder is not None
    assert config.data.cache_folder.resolve() == (tmp_path / "configs/cache").resolve()


def test_a_path_is_not_followed(tmp_path: Path) -> None:
    """A link keeps its name: what it leads to may have none that tells what it is."""
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "base.safetensors").symlink_to(tmp_path / "blob")
    assert load(written(tmp_path, SMALLEST), ["model.path=base.safetensors"]).model.path == tmp_path / "base.safetensors"


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = Path(str(tmp_path) + "/\udcff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has text names only")
    with pytest.raises(InputError) as caught:
        load(written(folder, SMALLEST))
    assert "[model] path: expected a path that is UTF-8 throughout" in caught.value.details[0]


# --- --set


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=7", lambda c: c.train.steps == 7),
        (" train.steps = 7 ", lambda c: c.train.steps == 7),
        ("train.seed=0x10", lambda c: c.train.seed == 16),
        ("adapter.alpha=1e1", lambda c: c.adapter.alpha == 10.0),
        ("adapter.dora=true", lambda c: c.adapter.dora is True),
        ("model.family=sdxl", lambda c: c.model.family == "sdxl"),
        ('model.family="sdxl"', lambda c: c.model.family == "sdxl"),
        ("save.name='1'", lambda c: c.save.name == "1"),
        ("validation.negative=two words", lambda c: c.validation.negative == "two words"),
        ("validation.negative=a=b", lambda c: c.validation.negative == "a=b"),
        ("validation.negative=1\ny = 2", lambda c: c.validation.negative == "1\ny = 2"),
        ("validation.prompts=['a', \"b\"]", lambda c: c.validation.prompts == ("a", "b")),
        ("data.folders.0.repeats=3", lambda c: c.data.folders[0].repeats == 3),
        ("data.buckets={enabled = false}", lambda c: not c.data.buckets.enabled),
        ("dreambooth.class_prompt=a dog", lambda c: c.dreambooth.class_prompt == "a dog"),
        ("optimizer.options.d_coef=2", lambda c: c.optimizer.options == {"d_coef": 2}),
        ("adapter.rank=8", lambda c: (c.adapter.rank, c.adapter.alpha) == (8, 8.0)),
        ("log.wandb=", lambda c: c.log.wandb is None),
    ],
)
def test_set(tmp_path: Path, override: str, read: Any) -> None:
    assert read(load(written(tmp_path, SMALLEST), [override]))


def test_set_twice_the_last_counts(tmp_path: Path) -> None:
    assert load(written(tmp_path, SMALLEST), ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_set_nothing_takes_a_key_out(tmp_path: Path) -> None:
    config = load(written(tmp_path, SMALLEST), ["train.steps=", "train.epochs=2"])
    assert (config.train.steps, config.train.epochs) == (None, 2)
    assert load(written(tmp_path, SMALLEST + "[adapter]\nrank=2\n"), ["adapter="]).adapter.rank == 16


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=3", "[train] stpes: unknown key, did you mean 'steps'? (--set train.stpes=3)"),
        ("train.steps=many", '[train] steps: expected a whole number, found "many" (--set train.steps=many)'),
        ("train.steps=0", "[train] steps: expected at least 1, found 0 (--set train.steps=0)"),
        ("save.name=1", "[save] name: expected text, found 1 (--set save.name=1)"),
        ("validation.prompts=[1", '[validation] prompts: expected a list, found "[1" (--set validation.prompts=[1)'),
        ("data.folders.0.repeats=0", "[data.folders.0] repeats: expected at least 1, found 0 (--set data.folders.0.repeats=0)"),
        ("data.folders.1.repeats=2", "--set data.folders.1.repeats=2: data.folders is a list of 1 entry, counted from 0"),
        ("data.folders.a=2", "--set data.folders.a=2: data.folders is a list of 1 entry, counted from 0"),
        ("train.steps.x=2", "--set train.steps.x=2: train.steps is 100"),
        ("3=2", "--set 3=2: the file is a table"),
        ("dreambooth.class_images=3", "[dreambooth] class_prompt: missing (--set dreambooth.class_images=3)"),
        ("model=x", '[model]: expected a table, found "x" (--set model=x)'),
        ("model.path=", "[model] path: missing (--set model.path=)"),
        ("steps=3", "steps: unknown key, did you mean [train] steps or [validation] steps? (--set steps=3)"),
        ("train.steps", "--set train.steps: expected key.path=value, such as train.steps=1000"),
        ("=3", "--set =3: expected key.path=value, such as train.steps=1000"),
        ("train..steps=3", "--set train..steps=3: expected key.path=value, such as train.steps=1000"),
        ("", "--set : expected key.path=value, such as train.steps=1000"),
    ],
)
def test_set_what_is_wrong(tmp_path: Path, override: str, said: str) -> None:
    assert refused(tmp_path, SMALLEST, override, kind=UsageError) == [said]


def test_the_file_and_set_are_told_together(tmp_path: Path) -> None:
    text = SMALLEST + "[log]\nevery = 0\n"
    details = refused(tmp_path, text, "nonsense", "adapter.rank=0", kind=InputError)
    assert details == [
        "[log] every: expected at least 1, found 0 (line 8)",
        "2 problems with values of --set",
        "--set nonsense: expected key.path=value, such as train.steps=1000",
        "[adapter] rank: expected at least 1, found 0 (--set adapter.rank=0)",
    ]


def test_set_mends_what_the_file_has_wrong(tmp_path: Path) -> None:
    assert load(written(tmp_path, SMALLEST + "[log]\nevery = 0\n"), ["log.every=1"]).log.every == 1
