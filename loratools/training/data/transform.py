"""From a picture to the array a VAE encodes: resize to cover the bucket, crop, flip, scale to [-1, 1].

    scale   = max(bucket_w / w, bucket_h / h)                 one side fits exactly, the other is cropped
    left    = floor(u · (resized_w − bucket_w + 1))           u in [0, 1): every offset equally likely; the middle without u
    value   = byte / 127.5 − 1

What SDXL is conditioned on ("SDXL", Podell et al. 2023, section 2.2) is the picture's size and the corner of the crop in the resized
picture, as diffusers' training script has it; of a flipped picture the corner is that of the flipped one.
Invariant: `place` is arithmetic on sizes, so all of it is known without opening the picture. Resampling is Lanczos, which Pillow
widens when it makes a picture smaller, so there is no aliasing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import InputError
from loratools.tensors.header import printable
from loratools.training.data.pictures import Size, load_rgb

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Placement:
    """Where in a picture of size `original` the crop lies: `left` and `top` in the `resized` picture, before the flip."""

    original: Size
    resized: Size
    bucket: Size
    left: int
    top: int
    flip: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning: original height, width, crop top, left, target height, width."""
        left = self.resized[0] - self.bucket[0] - self.left if self.flip else self.left
        return (self.original[1], self.original[0], self.top, left, self.bucket[1], self.bucket[0])


def place(original: Size, bucket: Size, crop: tuple[float, float] | None = None, flip: bool = False) -> Placement:
    """The crop of a picture for its bucket, both (width, height).

    crop: two numbers in [0, 1) for the horizontal and the vertical offset, None for the middle. Raises ValueError for others.
    """
    (width, height), (across, down) = original, bucket
    if across * height >= down * width:  # the picture is the taller one of the two
        resized = (across, max(down, _divided(height * across, width)))
    else:
        resized = (max(across, _divided(width * down, height)), down)
    slack = (resized[0] - across, resized[1] - down)
    if crop is None:
        return Placement(original, resized, bucket, slack[0] // 2, slack[1] // 2, flip)
    if not all(0 <= number < 1 for number in crop):
        raise ValueError(f"a crop is given by two numbers in [0, 1), found {crop}")
    return Placement(original, resized, bucket, int(crop[0] * (slack[0] + 1)), int(crop[1] * (slack[1] + 1)), flip)


def _divided(dividend: int, divisor: int) -> int:
    """The nearest integer, halves up."""
    return (2 * dividend + divisor) // (2 * divisor)


def pixels(path: Path, placement: Placement) -> npt.NDArray[np.float32]:
    """The cropped picture as float32 (3, height, width) in [-1, 1], contiguous, red first.

    Raises InputError where the picture is broken or no longer has the size it was placed by, UnsupportedError without pillow.
    """
    import numpy as np

    image = load_rgb(path)
    if image.size != placement.original:
        found, expected = ("×".join(map(str, size)) for size in (image.size, placement.original))
        raise InputError(f"{printable(str(path))}: is {found} pixels, was {expected} when the folder was read", fix="start again")
    from PIL import Image

    if image.size != placement.resized:
        image = image.resize(placement.resized, Image.Resampling.LANCZOS)
    left, top = placement.left, placement.top
    values = np.asarray(image)[top : top + placement.bucket[1], left : left + placement.bucket[0]]
    if placement.flip:
        values = values[:, ::-1]
    return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - np.float32(1)
