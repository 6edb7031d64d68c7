"""The configuration of a training: one frozen model a TOML table, one described field a key.

Every key has its type, its bounds and its default here and nowhere else; the descriptions are the documentation. What two keys
have to agree on is a row of `config_rules`; `config_load.load` reads a file, `config_dump.dump` writes one.

Invariant: a Config is complete and consistent. Defaults that hang on another key (alpha = rank) are filled in when it is made,
so that what is written is what ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from loratools.errors import UnsupportedError
from loratools.training.config_rules import broken, values_of

try:
    from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator
except ModuleNotFoundError as error:
    raise UnsupportedError("a training needs pydantic, which is not installed", fix="pip install 'loratools[train]'") from error

from loratools.training.config_types import Dialect, Extension, FileName, Init, Location, Texts, unique

Encoders = Annotated[tuple[Literal["text_encoder", "text_encoder_2", "text_encoder_3"], ...], Strict(False), unique]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Option = bool | int | float | str | Annotated[tuple[float, ...], Strict(False)]
Sides = tuple[Annotated[int, Field(ge=8, multiple_of=8)], Annotated[int, Field(ge=8, multiple_of=8)]]

_LARGEST_RANK = 1 << 16  # wider than any layer


class Settings(BaseModel):
    """What all tables share: unknown keys are refused, nothing is converted (no "5" for 5), no NaN, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class ModelSettings(Settings):
    """[model]: the frozen base."""

    path: Location = Field(description="The base: a diffusers folder or a checkpoint file.")
    family: Literal["auto", "sd1", "sd2", "sdxl", "sd3", "flux"] = Field(default="auto", description="Its architecture; auto: looked up.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="The dtype its weights are held in.")
    quantise: Literal["none", "nf4", "int8", "fp8"] = Field(default="none", description="How its weights are held smaller.")
    variant: str | None = Field(default=None, min_length=1, description="Which variant of a diffusers folder's files is read: fp16.")


class AdapterSettings(Settings):
    """[adapter]: what is trained."""

    rank: int = Field(default=16, ge=1, le=_LARGEST_RANK, description="Rank of the linear layers' adapter.")
    alpha: float = Field(default=16.0, gt=0, description="Alpha; the scale is alpha / rank. Absent: the rank, which is scale 1.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    dora: bool = Field(default=False, description="Train a magnitude beside the direction (DoRA).")
    dropout: Share = Field(default=0.0, description="Probability that an input of the adapter is dropped.")
    init: Init = Field(default="default", description="How the factors start, by PEFT's names; default: A random, B zero.")
    targets: Literal["attention", "attention+ff", "all-linear"] | Texts = Field(
        default="attention", description="The denoiser's layers that get an adapter: one of the sets, or a list of patterns of names."
    )
    conv_rank: int | None = Field(
        default=None, ge=1, le=_LARGEST_RANK, description="Rank of the convolutions' adapter; absent: convolutions have none."
    )
    conv_alpha: float | None = Field(default=None, gt=0, description="Alpha of the convolutions. Absent: conv_rank.")
    text_encoders: Encoders = Field(default=(), description="The text encoders that are trained too.")

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_the_rank(cls, given: Any) -> Any:
        return _filled(_filled(given, "alpha", "rank"), "conv_alpha", "conv_rank")


class BucketSettings(Settings):
    """[data.buckets]: sizes of pictures by aspect ratio."""

    enabled: bool = Field(default=True, description="Sort pictures into buckets by aspect ratio; otherwise all become squares.")
    step: int = Field(default=64, ge=8, multiple_of=8, description="Sides of a bucket are multiples of this many pixels.")
    min_side: int | None = Field(default=None, ge=8, description="The shortest side of a bucket, in pixels; absent: half the resolution.")
    max_side: int | None = Field(default=None, ge=8, description="The longest side of a bucket, in pixels; absent: twice the resolution.")


class FolderSettings(Settings):
    """[[data.folders]]: one folder of pictures."""

    path: Location = Field(description="The folder.")
    repeats: int = Field(default=1, ge=1, description="How many times an epoch shows each of its pictures.")
    caption_extension: Extension = Field(default=".txt", description="Extension of the caption files beside the pictures.")
    prompt: str | None = Field(default=None, min_length=1, description="The caption of pictures that have none of their own.")
    prefix: str = Field(default="", description="Text put before each caption.")
    suffix: str = Field(default="", description="Text put after each caption.")


class DataSettings(Settings):
    """[data]: pictures and captions."""

    folders: Annotated[tuple[FolderSettings, ...], Strict(False)] = Field(min_length=1, description="The folders of pictures.")
    resolution: int = Field(default=512, ge=8, multiple_of=8, description="Side of the square whose area the pictures get, in pixels.")
    crop: Literal["center", "random"] = Field(default="center", description="Where a picture is cut that does not fit its size.")
    flip: bool = Field(default=False, description="Mirror each picture left to right half of the time.")
    buckets: BucketSettings = Field(default_factory=BucketSettings, description="Sizes by aspect ratio.")
    caption_dropout: float = Field(default=0.0, ge=0, le=1, description="Probability that a caption is left out.")
    shuffle_tags: bool = Field(default=False, description="Shuffle the tags of each caption.")
    keep_tags: Count = Field(default=0, description="How many tags at the beginning keep their place.")
    tag_separator: str = Field(default=",", min_length=1, description="What stands between tags.")
    variants: int = Field(default=8, ge=1, description="How many shuffles and random crops of each sample are cached.")
    drop_last: bool = Field(default=False, description="Leave out the batch at an epoch's end that is not full.")
    cache: Literal["disk", "memory", "off"] = Field(default="disk", description="Where encoded pictures and captions are kept.")
    cache_folder: Location | None = Field(default=None, description="Folder of the cache on disk; absent: cache in the save folder.")
    held_out: Count | Share = Field(default=0, description="Pictures kept for the validation loss: a number of them, or a share below 1.")


class DreamBoothSettings(Settings):
    """[dreambooth]: prior preservation; the table is optional."""

    class_prompt: str = Field(min_length=1, description="The prompt of the class pictures.")
    class_folder: Location | None = Field(default=None, description="Folder of the class pictures; absent: class in the save folder.")
    class_images: int = Field(default=100, ge=1, description="How many class pictures there shall be; missing ones are generated.")
    prior_weight: float = Field(default=1.0, ge=0, description="Weight of the loss of the class pictures.")


class TrainSettings(Settings):
    """[train]: how long, and with what arithmetic."""

    steps: int | None = Field(default=None, ge=1, description="Updates of the weights; either this or epochs.")
    epochs: int | None = Field(default=None, ge=1, description="Passes over the data; either this or steps.")
    batch: int = Field(default=1, ge=1, description="Samples in a forward pass.")
    accumulate: int = Field(default=1, ge=1, description="Batches whose gradients make one update.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="What every random number is drawn from.")
    clip: float = Field(default=1.0, ge=0, description="Largest norm of the gradient; 0: no limit.")
    precision: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="The dtype of the forward pass.")
    checkpointing: Literal["off", "on"] | Annotated[int, Field(ge=2)] = Field(
        default="off", description="Recompute activations to save memory: on: of all blocks; N: of every N-th block."
    )
    compile: bool = Field(default=False, description="Compile the repeated blocks of the denoiser.")
    ema: float | None = Field(default=None, gt=0, lt=1, description="Decay of the moving average of the weights; absent: none is kept.")
    threads: int | None = Field(default=None, ge=1, description="Processor threads; absent: as many as torch takes.")
    deterministic: bool = Field(default=False, description="Use deterministic kernels only, so that a resumed run is exact.")
    nan_check_every: int = Field(default=50, ge=0, description="Steps between looks for a loss that is not finite; 0: never.")


class OptimizerSettings(Settings):
    """[optimizer]."""

    name: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "sgd"] = Field(default="adamw", description="The optimizer.")
    lr: float = Field(default=1e-4, gt=0, description="Learning rate. Absent: 0.0001, for prodigy 1.")
    text_encoder_lr: float | None = Field(default=None, gt=0, description="Learning rate of the text encoders; absent: lr.")
    betas: Annotated[tuple[Share, Share], Strict(False)] = Field(default=(0.9, 0.999), description="Decay of Adam's two moments.")
    eps: float = Field(default=1e-8, gt=0, description="What keeps Adam's denominator from zero.")
    weight_decay: float = Field(default=1e-2, ge=0, description="Decoupled weight decay.")
    options: dict[str, Option] = Field(default_factory=dict, description="Further arguments of the optimizer, handed on as they are.")

    @model_validator(mode="before")
    @classmethod
    def _its_own_lr(cls, given: Any) -> Any:
        return _suited(given, "lr", "name", {"prodigy": 1.0})  # which multiplies its own estimate of the rate


class ScheduleSettings(Settings):
    """[schedule]: the learning rate over the steps."""

    name: Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial"] = Field(default="constant", description="Its law.")
    warmup: Count | Share = Field(default=0, description="Steps over which the rate rises from 0: a number of them, or a share below 1.")
    cycles: int = Field(default=1, ge=1, description="Cycles of cosine-restarts.")
    power: float = Field(default=1.0, gt=0, description="Exponent of polynomial.")
    end_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="The rate at the end, as a share of lr.")


class TimestepSettings(Settings):
    """[loss.timesteps]: which noise levels are trained."""

    law: Literal["uniform", "logit-normal", "mode", "sigmoid", "cosmap", "shift"] = Field(
        default="uniform", description="The density noise levels are drawn from."
    )
    mean: float = Field(default=0.0, description="Mean of logit-normal.")
    std: float = Field(default=1.0, gt=0, description="Standard deviation of logit-normal.")
    scale: float = Field(default=1.0, description="Scale of mode, sigmoid and shift. Absent: 1, for mode 1.29.")
    shift: float = Field(default=1.0, gt=0, description="Shift of flow noise levels towards more noise; 1: none.")
    low: float = Field(default=0.0, ge=0, le=1, description="The lowest noise level, as a share of the schedule.")
    high: float = Field(default=1.0, ge=0, le=1, description="The highest noise level, as a share of the schedule.")

    @model_validator(mode="before")
    @classmethod
    def _its_own_scale(cls, given: Any) -> Any:
        return _suited(given, "scale", "law", {"mode": 1.29})


class LossSettings(Settings):
    """[loss]: the objective."""

    kind: Literal["mse", "huber", "pseudo-huber"] = Field(default="mse", description="Squared error, Huber's loss, or its smooth form.")
    huber_delta: float = Field(default=0.1, gt=0, description="Error from which Huber's loss grows linearly; c of pseudo-huber.")
    prediction: Literal["auto", "epsilon", "v", "flow"] = Field(
        default="auto", description="What the model predicts; auto: what its scheduler says."
    )
    min_snr_gamma: float | None = Field(default=None, gt=0, description="Gamma of min-SNR weights; absent: no such weights.")
    noise_offset: float = Field(default=0.0, ge=0, description="Noise added to the mean of each channel.")
    timesteps: TimestepSettings = Field(default_factory=TimestepSettings, description="Which noise levels are trained.")
    weighting: Literal["none", "sigma-sqrt", "cosmap", "logit-normal-density"] = Field(
        default="none", description="How a flow model's loss is weighted by noise level."
    )


class SaveSettings(Settings):
    """[save]: what is written, and when."""

    folder: Location = Field(default=Path("output"), description="Folder of the run.")
    name: FileName = Field(default="adapter", description="Name of the adapter's files, without extension.")
    every_steps: int | None = Field(default=None, ge=1, description="Steps between checkpoints; absent: one at the end.")
    every_seconds: float | None = Field(default=None, gt=0, description="Seconds between checkpoints; absent: by steps alone.")
    keep: int = Field(default=3, ge=1, description="How many checkpoints are kept.")
    keep_best: bool = Field(default=False, description="Keep the one of the lowest validation loss too.")
    formats: Annotated[tuple[Dialect, ...], Strict(False), unique] = Field(
        default=("diffusers",), min_length=1, description="Dialects the adapter is written in."
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="The dtype of these files; checkpoints are fp32.")
    trigger_words: Texts = Field(default=(), description="Trigger words, noted in the files.")


class ValidationSettings(Settings):
    """[validation]: pictures and loss during the run."""

    prompts: Texts = Field(default=(), description="Prompts of the pictures.")
    negative: str = Field(default="", description="Negative prompt.")
    every_steps: int | None = Field(default=None, ge=1, description="Steps between validations; absent: one at the end.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the pictures and of the validation loss.")
    steps: int = Field(default=25, ge=1, description="Steps of the sampler.")
    guidance: float = Field(default=7.0, ge=0, description="Guidance scale.")
    size: Annotated[Sides, Strict(False)] | None = Field(default=None, description="Width and height in pixels; absent: the resolution.")


class LogSettings(Settings):
    """[log]."""

    every: int = Field(default=10, ge=1, description="Steps between lines.")
    tensorboard: bool = Field(default=False, description="Write events for TensorBoard.")
    wandb: str | None = Field(default=None, min_length=1, description="The Weights & Biases project that is logged to; absent: none.")


class Config(Settings):
    """The whole file. Frozen; made by `config_load.load`, or by `Config.model_validate` from nested dicts.

    Raises pydantic.ValidationError: keys that are wrong for themselves, or the rules between them that do not hold.
    """

    model: ModelSettings = Field(description="The frozen base.")
    adapter: AdapterSettings = Field(default_factory=AdapterSettings, description="What is trained.")
    data: DataSettings = Field(description="Pictures and captions.")
    dreambooth: DreamBoothSettings | None = Field(default=None, description="Prior preservation.")
    train: TrainSettings = Field(default_factory=TrainSettings, description="How long, and with what arithmetic.")
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, description="The optimizer.")
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="The learning rate over the steps.")
    loss: LossSettings = Field(default_factory=LossSettings, description="The objective.")
    save: SaveSettings = Field(default_factory=SaveSettings, description="What is written, and when.")
    validation: ValidationSettings = Field(default_factory=ValidationSettings, description="Pictures and loss during the run.")
    log: LogSettings = Field(default_factory=LogSettings, description="What is told during the run.")

    @model_validator(mode="before")
    @classmethod
    def _save_is_read(cls, given: Any) -> Any:
        """[save] has a path by default, and only what is read is put under the file's folder."""
        return {"save": {}, **given} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _rules_hold(self) -> Config:
        found = broken(values_of(Config, self.model_dump()))
        if found:
            raise ValueError("; ".join(rule.message for rule in found))
        return self


def _filled(given: Any, key: str, source: str) -> Any:
    """A table as it was given, with `key` taken from a usable `source` where it is absent. Anything else is left to be refused."""
    value = given.get(source) if isinstance(given, Mapping) else None
    if type(value) is not int or not 1 <= value <= _LARGEST_RANK or key in given:
        return given
    return {**given, key: float(value)}


def _suited(given: Any, key: str, source: str, defaults: Mapping[str, float]) -> Any:
    """A table as it was given, with `key` as it suits the name in `source`, where it is absent and `defaults` has that name."""
    name = given.get(source) if isinstance(given, Mapping) else None
    if not isinstance(name, str) or name not in defaults or key in given:
        return given
    return {**given, key: defaults[name]}
