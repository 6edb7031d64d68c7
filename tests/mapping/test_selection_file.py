"""Files of block weights: what is read from them, and everything they are refused for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratools.adapters.adapter import Site
from loratools.errors import InputError
from loratools.mapping.architectures import registry
from loratools.mapping.selection import BlockWeights, Rules, Selection, read_block_weights


def read(folder: Path, text: str) -> BlockWeights:
    path = folder / "weights.toml"
    path.write_text(text, encoding="utf-8")
    return read_block_weights(path)


def refused(folder: Path, text: str) -> list[str]:
    """The problems a file is refused for."""
    with pytest.raises(InputError) as caught:
        read(folder, text)
    assert str(folder / "weights.toml") in caught.value.message
    assert caught.value.exit_code == 3
    return caught.value.details


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    weights = read(tmp_path, "# nothing yet\n")
    assert weights == BlockWeights(Rules(), {}, tmp_path / "weights.toml")
    site, architecture = Site("text_encoder", "text_model.encoder.layers.3.mlp.fc1"), registry()["sd1"]
    assert Selection(blocks=weights).factor(site, architecture, "a") == Selection().factor(site, architecture, "a") == 1.0


def test_components_replace_the_default_on_any_architecture(tmp_path: Path) -> None:
    weights = read(tmp_path, 'default = 0.5\n[components]\ntext_encoder = 2\n[sites]\n"single_transformer_blocks.*" = 0\n')
    chosen, architecture = Selection(blocks=weights), registry()["flux"]
    assert chosen.factor(Site("denoiser", "transformer_blocks.0.attn.to_q"), architecture, "a") == 0.5
    assert chosen.factor(Site("text_encoder", "text_model.encoder.layers.3.mlp.fc1"), architecture, "a") == 2.0
    assert chosen.factor(Site("denoiser", "single_transformer_blocks.0.attn.to_q"), architecture, "a") == 0.0


@pytest.mark.parametrize(
    "text", ['"1,0,0.5,-2,3,4,5,6,7,8,9,1e1"', '" [1, 0, 0.5, -2, 3, 4, 5, 6, 7, 8, 9, 10] "', "[1, 0, 0.5, -2, 3, 4, 5, 6, 7, 8, 9, 10]"]
)
def test_a_list_as_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"kohya = {text}").rules.kohya == (1.0, 0.0, 0.5, -2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("defualt = 1", "defualt: unknown key; did you mean 'default'?"),
        ("[adapter]", "adapter: unknown key; did you mean 'adapters'?"),
        ("[site]", "site: unknown key; did you mean 'sites'?"),
        ('"x y" = 1', '"x y": unknown key; the keys are default, kohya, components, sites, adapters'),
        ("default = true", "default: expected a number, found True"),
        ('default = "1"', "default: expected a number, found '1'"),
        ("default = 1979-05-27", "default: expected a number, found datetime.date(1979, 5, 27)"),
        ("default = nan", "default: expected a finite number, found nan"),
        ("default = -inf", "default: expected a finite number, found -inf"),
        ("default = 1" + "0" * 400, "default: expected a finite number, found 1" + "0" * 59),
        ("default = [1]", "default: expected a number, found a list"),
        ("components = 0.5", "components: expected a table of numbers, found 0.5"),
        ("[components]\ntext_encoder = false", "components.text_encoder: expected a number, found False"),
        ('[sites]\n"a.*" = "0.5"', "sites.\"a.*\": expected a number, found '0.5'"),
        ("[sites]\ndenoiser.mid_block = 1", "sites.denoiser: expected a number, found a table (a name with dots needs quotes)"),
        ('[sites]\n"a\\nb" = []', 'sites."a\\nb": expected a number, found a list'),
        ("kohya = 1", "kohya: expected a list of numbers, found 1"),
        ("kohya = true", "kohya: expected a list of numbers, found True"),
        ("kohya = []", "kohya: 0 numbers, but the lists have 12 (sdxl), 17 (sd1, sd2), 20 (sdxl), 26 (sd1, sd2)"),
        ('kohya = "1,1"', "kohya: 2 numbers, but the lists have 12 (sdxl), 17 (sd1, sd2), 20 (sdxl), 26 (sd1, sd2)"),
        ("kohya = [1,1,true,1,1,1,1,1,1,1,1,1]", "kohya (IN05): expected a number, found True"),
        ("kohya = [1,1,1,1,1,nan,1,1,1,1,1,1]", "kohya (MID): expected a finite number, found nan"),
        ('kohya = [1,1,1,1,1,1,"1",1,1,1,1,1]', "kohya (OUT00): expected a number, found '1'"),
        ('kohya = "1,1,1,1,1,1,1,1,1,1,1,R"', "kohya (OUT05): expected a number, found 'R'"),
        ('kohya = "inf,1,1,1,1,1,1,1,1,1,1,1"', "kohya (BASE): expected a finite number, found inf"),
        (
            "kohya = [1,1,1,1,1,1,1,1,1,1,1,1]\ncomponents.denoiser = 1",
            "components.denoiser: kohya has the denoiser's numbers already; remove one of the two",
        ),
        ("adapters = 1", 'adapters: expected tables such as [adapters."style.safetensors"], found 1'),
        (
            '[adapters]\n"style.safetensors" = 0.5',
            'adapters."style.safetensors": expected a table with the keys default, kohya, components, sites, found 0.5',
        ),
        (
            "[adapters.style.safetensors]\ndefault = 1",
            "adapters.style.safetensors: unknown key; the keys are default, kohya, components, sites; a file name with dots needs quotes",
        ),
        ('[adapters."a.pt"]\nadapters = 1', 'adapters."a.pt".adapters: unknown key; the keys are default, kohya, components, sites'),
        ('[adapters."a.pt".sites]\nx = true', 'adapters."a.pt".sites.x: expected a number, found True'),
    ],
)
def test_files_with_one_problem(tmp_path: Path, text: str, problem: str) -> None:
    assert refused(tmp_path, text) == [problem]


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    text = 'defualt = 1\ndefault = true\nkohya = [1]\n[sites]\na = nan\nb = 1\n[adapters.x]\nkohya = "1"\nsits = 2\n'
    assert [problem.partition(":")[0] for problem in refused(tmp_path, text)] == [
        "defualt", "default", "kohya", "sites.a", "adapters.x.kohya", "adapters.x.sits",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b"[sites]\ndown_blocks.* = 1\n",
        b"default = 1\ndefault = 2\n",
        b"default = " + b"[" * 5000,
        b"default = " + b"9" * 5000,
    ],
    ids=["bare star", "twice", "deep", "long number"],
)
def test_what_is_not_toml(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_block_weights(path)
    assert caught.value.message.startswith(f"{path}: not TOML: ")
    assert "quotes" in str(caught.value.fix)


def told(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_block_weights(path)
    return caught.value


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_parse_error_names_the_line(tmp_path: Path, ends: str) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes(ends.join(["default = 1", "", "[sites]", "  down_blocks.* = 0.5", '"mid.*" = 1', ""]).encode())
    assert "at line 4" in told(path).message
    assert told(path).details == ["line 4: down_blocks.* = 0.5"]


def test_what_is_no_utf8_names_the_line_too(tmp_path: Path) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes("default = 1\n[sites]\n# caf\u00e9\n".encode("latin-1"))
    assert told(path).message == f"{path}: not TOML: line 3 is not UTF-8"
    assert "UTF-8" in str(told(path).fix)
    path.write_bytes("default = 1\n".encode("utf-16"))  # what `>` writes in an old PowerShell
    assert told(path).message == f"{path}: not TOML: line 1 is not UTF-8"


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    """Windows editors write one."""
    path = tmp_path / "weights.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b"default = 0.25\r\n")
    assert read_block_weights(path).rules == Rules(default=0.25)


def test_a_file_that_is_not_there_has_a_fix(tmp_path: Path) -> None:
    missing = tmp_path / "weigths.toml"
    assert "TOML file" in str(told(missing).fix)
    (tmp_path / "weights.toml").write_text("")
    assert told(missing).fix == f"did you mean {tmp_path / 'weights.toml'}?"
    assert "TOML file" in str(told(tmp_path / "nowhere" / "weights.toml").fix)


def test_what_is_no_file_to_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "model.safetensors").write_bytes(bytes((1 << 20) + 1))
    for name, words in [("absent", "no such file"), ("", "a folder"), ("pipe", "a FIFO"), ("model.safetensors", "1048577 bytes")]:
        assert words in told(tmp_path / name).message
        assert "TOML file" in str(told(tmp_path / name).fix)
