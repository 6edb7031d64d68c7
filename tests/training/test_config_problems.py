"""What a configuration of a training is refused for, in words, with lines, all at once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from pydantic import ValidationError

from loratools.errors import UsageError
from loratools.training.config import Config
from loratools.training.config_load import load
from tests.training.configs import SMALLEST, refused, written

# a line under a header → what is said of it, line number included; SMALLEST has six lines
WRONG = [
    ("[train]", "stpes = 3", "[train] stpes: unknown key, did you mean 'steps'? (line 1)"),
    ("[trian]", "steps = 3", "[trian]: unknown table, did you mean [train]? (line 1)"),
    ("[lora]", "rank = 3", "[lora]: unknown table; there are model, adapter, data, dreambooth, train, optimizer, schedule, loss, save, "
     "validation, log (line 1)"),
    ("", "resolution = 3", "resolution: unknown key, did you mean [data] resolution? (line 1)"),
    ("[adapter]", "rnak = 1", "[adapter] rnak: unknown key, did you mean 'rank'? (line 2)"),
    ("[adapter]", "lr = 1", "[adapter] lr: unknown key, did you mean [optimizer] lr? (line 2)"),
    ("[adapter]", "path = 'a'", "[adapter] path: unknown key, did you mean [model] path or [data.folders] path? (line 2)"),
    ("[log]", "zzzzz = 1", "[log] zzzzz: unknown key; there are every, tensorboard, wandb (line 2)"),
    ("[log]", '"a\\nb" = 1', "[log] a\\nb: unknown key; there are every, tensorboard, wandb (line 2)"),
    ("[loss.timesteps]", "lwo = 1", "[loss.timesteps] lwo: unknown key, did you mean 'low'? (line 2)"),
    ("[loss.timestep]", "low = 1", "[loss] timestep: unknown table, did you mean 'timesteps'? (line 1)"),
    ("[adapter]", "rank = 0", "[adapter] rank: expected at least 1, found 0 (line 2)"),
    ("[adapter]", "rank = 65537", "[adapter] rank: expected at most 65536, found 65537 (line 2)"),
    ("[adapter]", "rank = 1" + "0" * 400, "[adapter] rank: expected at most 65536, found 0x" + f"{10**400:x}"[:58] + "… (line 2)"),
    ("[adapter]", "rank = 4.0", "[adapter] rank: expected a whole number, found 4.0 (line 2)"),
    ("[adapter]", "rank = true", "[adapter] rank: expected a whole number, found true (line 2)"),
    ("[adapter]", "rank = '4'", '[adapter] rank: expected a whole number, found "4" (line 2)'),
    ("[adapter]", "rank = [4]", "[adapter] rank: expected a whole number, found [4] (line 2)"),
    ("[adapter]", "rank = {r = 4}", "[adapter] rank: expected a whole number, found a table (line 2)"),
    ("[adapter]", "alpha = 0", "[adapter] alpha: expected more than 0, found 0 (line 2)"),
    ("[adapter]", "alpha = nan", "[adapter] alpha: expected a finite number, found nan (line 2)"),
    ("[adapter]", "alpha = inf", "[adapter] alpha: expected a finite number, found inf (line 2)"),
    ("[adapter]", "alpha = 2020-01-02", "[adapter] alpha: expected a number, found 2020-01-02 (line 2)"),
    ("[adapter]", "alpha = true", "[adapter] alpha: expected a number, found true (line 2)"),
    ("[adapter]", "dora = 1", "[adapter] dora: expected true or false, found 1 (line 2)"),
    ("[adapter]", "dropout = 1.0", "[adapter] dropout: expected less than 1, found 1.0 (line 2)"),
    ("[adapter]", "dropout = -0.5", "[adapter] dropout: expected at least 0, found -0.5 (line 2)"),
    ("[adapter]", "init = 'pisa'",
     "[adapter] init: expected 'default', 'gaussian', 'orthogonal', 'pissa', 'olora' or 'loftq', or pissa_niter_N, "
     "found \"pisa\", did you mean 'pissa'? (line 2)"),
    ("[adapter]", "targets = 'atention'",
     "[adapter] targets: expected 'attention', 'attention+ff' or 'all-linear' or a list, found \"atention\", "
     "did you mean 'attention'? (line 2)"),
    ("[adapter]", "targets = ['a', 1]", "[adapter] targets[1]: expected text, found 1 (line 2)"),
    ("[adapter]", "targets = ['']", '[adapter] targets[0]: expected text that is not empty, found "" (line 2)'),
    ("[adapter]", "conv_rank = 0", "[adapter] conv_rank: expected at least 1, found 0 (line 2)"),
    ("[adapter]", "text_encoders = ['te']", "[adapter] text_encoders[0]: expected 'text_encoder', 'text_encoder_2' or 'text_encoder_3', "
     'found "te" (line 2)'),
    ("[adapter]", "text_encoders = ['text_encoder', 'text_encoder']", "[adapter] text_encoders: expected each entry once, "
     'found ["text_encoder", "text_encoder"] (line 2)'),
    ("[dreambooth]", "class_images = 3", "[dreambooth] class_prompt: missing (line 1)"),
    ("[dreambooth]", "class_prompt = ''", '[dreambooth] class_prompt: expected text that is not empty, found "" (line 2)'),
    ("[optimizer]", "name = 'adam'", "[optimizer] name: expected 'adamw', 'adamw8bit', 'prodigy', 'adafactor' or 'sgd', found \"adam\", "
     "did you mean 'adamw'? (line 2)"),
    ("[optimizer]", "lr = 0", "[optimizer] lr: expected more than 0, found 0 (line 2)"),
    ("[optimizer]", "betas = [0.9, 1.0]", "[optimizer] betas[1]: expected less than 1, found 1.0 (line 2)"),
    ("[optimizer]", "betas = [0.9]", "[optimizer] betas[1]: missing (line 2)"),
    ("[optimizer]", "betas = [0.9, 0.9, 0.9]", "[optimizer] betas: expected no more than 2 of them, found [0.9, 0.9, 0.9] (line 2)"),
    ("[optimizer]", "options = 3", "[optimizer] options: expected a table, found 3 (line 2)"),
    ("[optimizer]", "options = {a = {b = 1}}",
     "[optimizer.options] a: expected true or false or a whole number or a number or text or a list, "
     "found a table (line 2)"),
    ("[schedule]", "warmup = 1.0", "[schedule] warmup: expected a whole number or less than 1, found 1.0 (line 2)"),
    ("[schedule]", "warmup = -1", "[schedule] warmup: expected at least 0, found -1 (line 2)"),
    ("[loss]", "timesteps = 3", "[loss] timesteps: expected a table, found 3 (line 2)"),
    ("[save]", "folder = ''", '[save] folder: expected a path, found "" (line 2)'),
    ("[save]", "folder = 3", "[save] folder: expected a path, found 3 (line 2)"),
    ("[save]", 'folder = "a\\u0000"', '[save] folder: expected a path, found "a\\u0000" (line 2)'),
    ("[save]", "folder = '~nobody-of-that-name/x'", "[save] folder: expected a path below a home folder that exists, "
     'found "~nobody-of-that-name/x" (line 2)'),
    ("[save]", "name = 'a/b'", '[save] name: expected a file name without folders, found "a/b" (line 2)'),
    ("[save]", "name = '..'", '[save] name: expected a file name without folders, found ".." (line 2)'),
    ("[save]", "name = ''", '[save] name: expected a file name without folders, found "" (line 2)'),
    ("[save]", "formats = []", "[save] formats: expected at least 1 of them, found [] (line 2)"),
    ("[validation]", "size = [512, 510]", "[validation] size[1]: expected a multiple of 8, found 510 (line 2)"),
    ("[validation]", "prompts = 'one'", '[validation] prompts: expected a list, found "one" (line 2)'),
    ("[log]", "wandb = true", "[log] wandb: expected text, found true (line 2)"),
    ("[log]", "wandb = '" + "x" * 99 + "'\nevery = 0", "[log] every: expected at least 1, found 0 (line 3)"),
    ("[log]", "every = '" + "x" * 99 + "'", '[log] every: expected a whole number, found "' + "x" * 59 + "… (line 2)"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "line", "said"), WRONG, ids=[f"{header}{line[:30]}" for header, line, _ in WRONG])
def test_what_is_wrong_is_said(tmp_path: Path, header: str, line: str, said: str) -> None:
    if header == "[train]":  # a table may stand once: put the key into the one there is
        text = SMALLEST.replace("[train]\n", f"[train]\n{line}\n")
        said = said.replace("(line 1)", "(line 6)")
    else:
        text = f"{header}\n{line}\n{SMALLEST}" if header else f"{line}\n{SMALLEST}"
    assert refused(tmp_path, text) == [said]


def test_a_wrong_dialect_names_those_there_are(tmp_path: Path) -> None:
    (said,) = refused(tmp_path, SMALLEST + "[save]\nformats = ['kohya', 'difusers']\n")
    assert said.startswith("[save] formats[1]: expected a dialect: 'kohya', ")
    assert said.endswith(", found \"difusers\", did you mean 'diffusers'? (line 8)")
    (said,) = refused(tmp_path, SMALLEST + "[save]\nformats = ['cloneofsimo']\n")  # read, never written
    assert "'cloneofsimo'" not in said


FOLDERS = "[model]\npath = 'm'\n[train]\nsteps = 1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "[data]: missing"),
        ("[data]", "[data] folders: missing (line 5)"),
        ("[data]\nfolders = []", "[data] folders: expected at least 1 of them, found [] (line 6)"),
        ("[data]\nfolders = 'a'", '[data] folders: expected a list, found "a" (line 6)'),
        ("[data.folders]\npath = 'a'", "[data] folders: expected a list, found a table (line 5)"),
        ("[data]\nfolders = [3]", "[data] folders[0]: expected a table, found 3 (line 6)"),
        ("[[data.folders]]", "[data.folders.0] path: missing (line 5)"),
        ("[[data.folders]]\npath='a'\n[[data.folders]]\npath='b'\nrepeats=0",
     "[data.folders.1] repeats: expected at least 1, found 0 (line 9)"),
        ("[[data.folders]]\npath='a'\nrepeat=2", "[data.folders.0] repeat: unknown key, did you mean 'repeats'? (line 7)"),
        ("[[data.folders]]\npath='a'\ncaption_extension='txt'", "[data.folders.0] caption_extension: expected an extension such as '.txt', "
         "found \"txt\", did you mean '.txt'? (line 7)"),
        ("[[data.folders]]\npath='a'\ncaption_extension='./x'", "[data.folders.0] caption_extension: expected an extension such as '.txt', "
         'found "./x" (line 7)'),
        ("[data]\nfolders = [{path='a'},\n{path='b',\trepeats=0}]", "[data.folders.1] repeats: expected at least 1, found 0 (line 6)"),
    ],
)  # fmt: skip
def test_folders(tmp_path: Path, text: str, said: str) -> None:
    assert refused(tmp_path, FOLDERS + text) == [said]


# what two keys have to agree on: (lines that break it, lines that do not, a word of the message)
RULES = [
    ("train.epochs=2", "train.steps=3", "steps or epochs"),
    ("train.steps=", "train.steps=3", "steps or epochs"),
    ("schedule.warmup=101", "schedule.warmup=100", "longer than [train] steps"),
    ("data.buckets.step=520", "data.buckets.step=512", "longer than [data] resolution"),
    ("data.buckets.min_side=513", "data.buckets.min_side=512", "min_side to max_side"),
    ("data.buckets.max_side=511", "data.buckets.max_side=512", "min_side to max_side"),
    ("data.buckets.min_side=513", "data.buckets={min_side=513,enabled=false}", "min_side to max_side"),
    ("loss.timesteps.law=mode loss.timesteps.scale=1.76", "loss.timesteps.law=mode loss.timesteps.scale=1.75", "from -1 to 1.752 for mode"),
    ("loss.timesteps.law=mode loss.timesteps.scale=-2", "loss.timesteps.law=mode loss.timesteps.scale=-1", "from -1 to 1.752 for mode"),
    ("loss.timesteps.law=shift loss.timesteps.scale=0", "loss.timesteps.law=shift loss.timesteps.scale=0.1", "more than 0 for sigmoid"),
    ("loss.min_snr_gamma=5 loss.prediction=flow", "loss.min_snr_gamma=5 loss.prediction=v", 'take it out for prediction = "flow"'),
    ("loss.min_snr_gamma=5 model.family=flux", "loss.min_snr_gamma=5 model.family=sd2", "sd3 and flux predict flow"),
    ("loss.prediction=v model.family=sd3", "loss.prediction=flow model.family=sd3", 'has to be "flow" or "auto"'),
    ("loss.weighting=cosmap loss.prediction=epsilon", "loss.weighting=cosmap", "epsilon and v prediction have min_snr_gamma"),
    ("loss.weighting=cosmap model.family=sdxl", "loss.weighting=cosmap model.family=flux", "sd1, sd2 and sdxl have min_snr_gamma"),
    ("loss.timesteps.low=0.5 loss.timesteps.high=0.5", "loss.timesteps.low=0.4 loss.timesteps.high=0.5", "low has to be below high"),
    ("adapter.conv_alpha=2", "adapter.conv_alpha=2 adapter.conv_rank=1", "unless conv_rank is given"),
    ("adapter.init=pissa model.quantise=nf4", "adapter.init=pissa", "init is computed from the base's weights"),
    ("adapter.init=loftq model.quantise=int8", "adapter.init=gaussian model.quantise=int8", "init is computed from the base's weights"),
    ("model.family=sd1 adapter.text_encoders=['text_encoder_2']", "model.family=sdxl adapter.text_encoders=['text_encoder_2']",
     "text_encoders names one"),
    ("model.family=sd1 save.formats=['xlabs']", "model.family=flux save.formats=['xlabs']", "has no names for"),
    ("optimizer.text_encoder_lr=1e-5",
     "optimizer.text_encoder_lr=1e-5 adapter.text_encoders=['text_encoder']", "text_encoder_lr is without effect"),
    ("save.keep_best=true", "save.keep_best=true data.held_out=2", "set [data] held_out"),
    ("validation.every_steps=5", "validation.every_steps=5 validation.prompts=['a']", "has nothing to do"),
    ("validation.every_steps=5", "validation.every_steps=5 data.held_out=0.1", "has nothing to do"),
]  # fmt: skip


@pytest.mark.parametrize(("breaking", "keeping", "said"), RULES)
def test_keys_have_to_agree(tmp_path: Path, breaking: str, keeping: str, said: str) -> None:
    path = written(tmp_path, SMALLEST)
    load(path, keeping.split())
    details = refused(tmp_path, SMALLEST, *breaking.split(), kind=UsageError)
    assert len(details) == 1
    assert said in details[0]
    assert "(--set " in details[0]


@pytest.mark.parametrize(("breaking", "said"), [(row[0], row[2]) for row in RULES])
def test_they_have_to_agree_in_the_file_too(tmp_path: Path, breaking: str, said: str) -> None:
    """The same as keys of the file, with the line of one of them; in Python it is a ValidationError."""
    given: dict[str, Any] = tomllib.loads(SMALLEST)
    for text in breaking.split():
        key, _, value = text.partition("=")
        *tables, last = key.split(".")
        table = given
        for name in tables:
            table = table.setdefault(name, {})
        if value:
            table[last] = tomllib.loads(f"x = {value}")["x"] if value[0] in "[-0123456789" or value == "true" else value
        else:
            del table[last]
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(given)
    assert said in str(caught.value)


def test_a_broken_rule_has_its_line(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALLEST + "epochs = 3\n") == [
        "[train] has to say either steps or epochs, one of the two; --set train.epochs= takes one out (line 6)"
    ]
    assert refused(tmp_path, SMALLEST + "[adapter]\nrank = 3\n[save]\nkeep = 1\nkeep_best = true\n") == [
        "[save] keep_best goes by the validation loss, which needs pictures: set [data] held_out (line 11)"
    ]


def test_everything_is_listed_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = """\
seed = 1
[train]
stpes = 3
epochs = 1
steps = 1
[adapter]
rank = 0
conv_alpha = 3

[loss]
prediction = "flow"
min_snr_gamma = 5
kind = "l2"
"""
    details = refused(tmp_path, text)
    assert details[:2] == ["[model]: missing", "[data]: missing"]
    starts = [
        "seed: ",
        "[train] stpes",
        "[train] has to say",
        "[adapter] rank",
        "[adapter] conv_alpha",
        "[loss] min_snr_gamma",
        "[loss] kind",
    ]
    assert [next(start for start in starts if line.startswith(start)) for line in details[2:]] == starts
    assert [line.rpartition("(line ")[2].rstrip(")") for line in details[2:]] == ["1", "3", "5", "7", "8", "12", "13"]


def test_a_rule_waits_for_its_keys(tmp_path: Path) -> None:
    """A misspelt number of steps is not told of a second time as a missing one."""
    assert refused(tmp_path, SMALLEST.replace("steps = 100", "steps = '100'")) == [
        '[train] steps: expected a whole number, found "100" (line 6)'
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[log]\n# every = 1\nwandb = """\nevery = 1\n"""\nevery = 0\n', 6),
        ("[log]\nevery\t=\t0 # every = 1\n", 2),
        ('["log"]\n"every" = 0\n', 2),
        ("[ log ]\n\n  every = 0\n", 3),
        ("log.every = 0\n", 1),
        ("log = { wandb = 'a', every = 0 }\n", 1),
        ("[validation]\nprompts = [\n  'a',\n  'b', # ]\n]\n[log]\nevery = 0\n", 7),
    ],
)
def test_lines_are_right_however_it_is_written(tmp_path: Path, text: str, line: int) -> None:
    assert refused(tmp_path, text + SMALLEST) == [f"[log] every: expected at least 1, found 0 (line {line})"]


def test_no_line_is_told_behind_a_value_too_long_to_follow(tmp_path: Path) -> None:
    text = SMALLEST + "[validation]\nsteps = 0\nprompts = [\n" + "'a',\n" * 300 + "]\n[log]\nevery = 0\n"
    assert refused(tmp_path, text) == [
        "[log] every: expected at least 1, found 0",
        "[validation] steps: expected at least 1, found 0 (line 8)",
    ]
