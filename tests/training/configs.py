"""Configurations for the tests of training, and what is done with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import InputError, LoraToolsError
from loratools.training.config_load import load

SMALLEST = """\
[model]
path = "base"
[[data.folders]]
path = "pictures"
[train]
steps = 100
"""

# every key with a value that is not its default, and with every rule kept
FULL = """\
[model]
path = "/models/sdxl.safetensors"
family = "sdxl"
dtype = "fp16"
quantise = "nf4"
variant = "fp16"

[adapter]
rank = 8
alpha = 4
rslora = true
dora = true
dropout = 0.1
init = "gaussian"
targets = ["*.to_q", "*.to_v"]
conv_rank = 4
conv_alpha = 2.5
text_encoders = ["text_encoder_2", "text_encoder"]

[data]
resolution = 768
crop = "random"
flip = true
caption_dropout = 1
shuffle_tags = true
keep_tags = 1
tag_separator = ";"
variants = 3
drop_last = true
cache = "memory"
cache_folder = "cached"
held_out = 0.05

[data.buckets]
enabled = false
step = 32
min_side = 320
max_side = 1280

[[data.folders]]
path = "a"
repeats = 2
caption_extension = ".caption"
prompt = "a photo of sks dog"
prefix = "sks, "
suffix = ", \\"quoted\\" \\\\ \\u007f\\n"

[[data.folders]]
path = "b"

[dreambooth]
class_prompt = "a photo of a dog"
class_folder = "class"
class_images = 20
prior_weight = 0.5

[train]
epochs = 3
batch = 2
accumulate = 3
seed = 9223372036854775807
clip = 0
precision = "fp32"
checkpointing = 2
compile = true
ema = 0.999
threads = 1
deterministic = true
nan_check_every = 0

[optimizer]
name = "prodigy"
lr = 0.5
text_encoder_lr = 1e-5
betas = [0.8, 0]
eps = 1e-10
weight_decay = 0
options = { d_coef = 0.5, safeguard_warmup = true, growth = 2, "odd key" = "text", eps = [1e-30, 1e-3] }

[schedule]
name = "cosine-restarts"
warmup = 0.1
cycles = 3
power = 2
end_lr_ratio = 0.01

[loss]
kind = "huber"
huber_delta = 0.2
prediction = "v"
min_snr_gamma = 5
noise_offset = 0.05

[loss.timesteps]
law = "logit-normal"
mean = -0.5
std = 2
scale = 1.5
shift = 3
low = 0.1
high = 0.9

[save]
folder = "../runs/dog"
name = "dog-v1.5"
every_steps = 50
every_seconds = 600
keep = 5
keep_best = true
formats = ["kohya", "diffusers"]
dtype = "bf16"
trigger_words = ["sks"]

[validation]
prompts = ["a dog", "ein Hund in Köln"]
negative = "blurry"
every_steps = 25
seed = 7
steps = 2
guidance = 3
size = [512, 768]

[log]
every = 1
tensorboard = true
wandb = "dogs"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "train.toml"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def refused(folder: Path, text: str, *overrides: str, kind: type[LoraToolsError] = InputError) -> list[str]:
    """The problems a configuration is refused for."""
    with pytest.raises(LoraToolsError) as caught:
        load(written(folder, text), overrides)
    assert type(caught.value) is kind, caught.value.details
    assert caught.value.fix
    return caught.value.details
