"""Where the crop lies and which numbers come out, against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loratools.errors import InputError
from loratools.training.data.transform import Placement, pixels, place


@pytest.mark.parametrize(
    ("original", "bucket", "resized", "corner"),
    [
        ((64, 64), (64, 64), (64, 64), (0, 0)),
        ((200, 100), (64, 64), (128, 64), (32, 0)),  # scale 0.64
        ((100, 200), (64, 64), (64, 128), (0, 32)),
        ((10, 20), (64, 64), (64, 128), (0, 32)),  # enlarged
        ((101, 100), (64, 64), (65, 64), (0, 0)),  # 64.64 is 65; half a pixel to the left
        ((1000, 1003), (64, 64), (64, 64), (0, 0)),  # 64.19 is 64
        ((3, 1), (2, 1), (3, 1), (0, 0)),
        ((1536, 1000), (768, 512), (786, 512), (9, 0)),  # 786.4
    ],
)
def test_the_middle(original: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]) -> None:
    placement = place(original, bucket)
    assert placement.resized == resized
    assert (placement.left, placement.top) == corner


def test_a_half_pixel_is_rounded_up() -> None:
    assert place((5, 4), (2, 2)).resized == (3, 2)  # 5 · 2 / 4 = 2.5, which Python's round would make 2


@pytest.mark.parametrize(("u", "left"), [(0.0, 0), (0.249, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1 - 2**-53, 3)])
def test_every_offset_has_an_equal_share(u: float, left: int) -> None:
    """7 pixels for 4: offsets 0 to 3, a quarter of [0, 1) each."""
    assert place((7, 4), (4, 4), (u, 0.9)).left == left
    assert place((4, 7), (4, 4), (0.9, u)).top == left
    assert place((7, 4), (4, 4), (u, 0.9)).top == 0


@pytest.mark.parametrize("crop", [(1.0, 0.0), (0.0, -0.1), (float("nan"), 0.0)])
def test_numbers_outside_the_unit_interval(crop: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        place((7, 4), (4, 4), crop)


def test_what_sdxl_is_told() -> None:
    """Original height and width, top and left, target height and width: diffusers' order."""
    wide = place((1600, 800), (512, 512), (0.25, 0.0))  # resized 1024 × 512, 513 offsets
    assert wide.time_ids == (800, 1600, 0, 128, 512, 512)
    flipped = place((1600, 800), (512, 512), (0.25, 0.0), flip=True)
    assert flipped.time_ids == (800, 1600, 0, 1024 - 512 - 128, 512, 512)
    assert place((800, 1600), (512, 768), None).time_ids == (1600, 800, 128, 0, 768, 512)


def picture(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def test_values_shape_and_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (5, 8, 3))
    found = pixels(picture(tmp_path / "a.png", values), place((8, 5), (8, 5)))
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((3, 5, 8), np.dtype("float32"), True)
    expected = values.transpose(2, 0, 1).astype(np.float64) / 127.5 - 1
    assert np.abs(found - expected).max() < 1e-6


def test_the_ends_of_the_scale_are_exact(tmp_path: Path) -> None:
    found = pixels(picture(tmp_path / "a.png", np.array([[[0, 255, 0]]])), place((1, 1), (1, 1)))
    assert found[:, 0, 0].tolist() == [-1.0, 1.0, -1.0]


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip(flip: bool, tmp_path: Path) -> None:
    values = np.arange(9 * 4 * 3).reshape(4, 9, 3)
    found = pixels(picture(tmp_path / "a.png", values), place((9, 4), (4, 4), (0.5, 0.0), flip))  # 6 offsets: 3
    expected = values[:, 3:7][:, :: -1 if flip else 1].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(found - expected).max() < 1e-6


def test_a_flip_is_the_mirrored_picture_cropped_at_the_corner_it_is_told_by(tmp_path: Path) -> None:
    values = np.arange(9 * 4 * 3).reshape(4, 9, 3)
    placement = place((9, 4), (4, 4), (0.2, 0.0), flip=True)
    left = placement.time_ids[3]
    expected = values[:, ::-1][:, left : left + 4].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(pixels(picture(tmp_path / "a.png", values), placement) - expected).max() < 1e-6


def test_making_smaller_averages_and_does_not_alias(tmp_path: Path) -> None:
    """A checkerboard of single pixels is grey once it is an eighth of the size; picking pixels would give black or white."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    found = pixels(picture(tmp_path / "a.png", np.repeat(board[:, :, None], 3, axis=2)), place((64, 64), (8, 8)))
    assert np.abs(found).max() < 0.05


def test_a_ramp_stays_a_ramp(tmp_path: Path) -> None:
    """The filter is symmetric and sums to one: away from the edges a linear ramp of n pixels is one of n / 2 pixels."""
    ramp = np.repeat(np.arange(0, 128, 2)[None, :, None], 64, axis=0).repeat(3, axis=2)
    found = pixels(picture(tmp_path / "a.png", ramp), place((64, 64), (32, 32)))
    expected = (np.arange(0, 128, 4) + 1.0) / 127.5 - 1  # the mean of each pair
    assert np.abs(found[:, 5:-5, 5:-5] - expected[5:-5]).max() < 1 / 127.5


def test_a_picture_that_has_changed_since(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", np.zeros((4, 4, 3)))
    with pytest.raises(InputError) as caught:
        pixels(path, place((8, 4), (4, 4)))
    assert "is 4×4 pixels, was 8×4" in caught.value.message


def test_a_placement_is_a_value() -> None:
    assert place((7, 4), (4, 4), (0.5, 0.5), True) == Placement((7, 4), (7, 4), (4, 4), 2, 0, True)
