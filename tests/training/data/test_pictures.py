"""Pictures as a viewer shows them: their size without decoding, their pixels as RGB on white."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loratools.errors import InputError
from loratools.training.data.pictures import load_rgb, picture_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Top left, top right, bottom left, bottom right."""
    right, bottom = image.width - 1, image.height - 1
    return [tuple(np.asarray(image)[y, x].tolist()) for x, y in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def marked(width: int = 6, height: int = 4) -> Image.Image:
    """Red, green, blue and white corners, in reading order."""
    image = Image.new("RGB", (width, height), "black")
    for place, colour in zip(((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)), (RED, GREEN, BLUE, WHITE), strict=True):
        image.putpixel(place, colour)
    return image


def exif(orientation: int) -> bytes:
    """A TIFF block with nothing but the orientation, by hand: little-endian, one entry (tag, SHORT, one value)."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG by hand. rows: unfiltered, big-endian samples of all rows together; before, behind: chunks around the pixels."""
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(raw)) + behind + chunk(b"IEND", b"")


# where the stored picture's corners (0 red, 1 green, 2 blue, 3 white) are once it is turned as the EXIF standard says
@pytest.mark.parametrize(
    ("orientation", "order", "swapped"),
    [
        (1, (0, 1, 2, 3), False),
        (2, (1, 0, 3, 2), False),  # mirrored left to right
        (3, (3, 2, 1, 0), False),  # by 180 degrees
        (4, (2, 3, 0, 1), False),  # mirrored top to bottom
        (5, (0, 2, 1, 3), True),  # along the main diagonal
        (6, (2, 0, 3, 1), True),  # by 90 degrees clockwise
        (7, (3, 1, 2, 0), True),  # along the other diagonal
        (8, (1, 3, 0, 2), True),  # by 90 degrees anticlockwise
        (9, (0, 1, 2, 3), False),  # no such value
    ],
)
def test_a_picture_is_turned_as_its_exif_says(orientation: int, order: tuple[int, ...], swapped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    marked().save(path, exif=exif(orientation))
    size = (4, 6) if swapped else (6, 4)
    image = load_rgb(path)
    assert picture_size(path) == size == image.size
    assert corners(image) == [(RED, GREEN, BLUE, WHITE)[corner] for corner in order]


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_orientation_in_other_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    marked(60, 40).save(path, exif=exif(6))
    assert picture_size(path) == (40, 60) == load_rgb(path).size


@pytest.mark.parametrize("kind", ["eXIf", "iTXt"])
def test_orientation_behind_the_pixels_of_a_png(kind: str, tmp_path: Path) -> None:
    """exiftool writes new metadata after the last IDAT."""
    packet = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'
    behind = {"eXIf": chunk(b"eXIf", exif(6)[6:]), "iTXt": chunk(b"iTXt", packet)}[kind]
    path = tmp_path / "a.png"
    path.write_bytes(png(3, 1, 8, 2, bytes([*RED, *GREEN, *BLUE]), behind=behind))
    assert picture_size(path) == (1, 3)
    assert np.asarray(load_rgb(path))[:, 0].tolist() == [list(RED), list(GREEN), list(BLUE)]


def test_a_size_is_known_without_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    whole = png(3, 1, 8, 2, bytes(9))
    path.write_bytes(whole[: whole.index(b"IDAT") + 4])  # cut off where the pixels would begin
    assert picture_size(path) == (3, 1)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),  # nothing there: white
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth black on white: 255 · 0.8
        ("LA", (0, 51), (204, 204, 204)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, WHITE),
    ],
)
def test_transparency_is_laid_on_white(mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new(mode, (2, 2), colour).save(path)
    image = load_rgb(path)
    assert image.mode == "RGB"
    assert corners(image) == [expected] * 4


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes(transparent: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    palette = chunk(b"PLTE", bytes([*RED, *GREEN])) + (chunk(b"tRNS", bytes([0, 255])) if transparent else b"")
    path.write_bytes(png(2, 1, 8, 3, bytes([0, 1]), before=palette))
    assert np.asarray(load_rgb(path))[0].tolist() == [list(WHITE if transparent else RED), list(GREEN)]


def test_sixteen_bit_grey_is_not_clipped_to_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(4, 1, 16, 0, struct.pack(">4H", 0, 256, 0x8000, 0xFFFF)))
    assert np.asarray(load_rgb(path))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_the_transparent_grey_of_a_sixteen_bit_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 1, 16, 0, struct.pack(">2H", 0x4001, 0x4002), before=chunk(b"tRNS", struct.pack(">H", 0x4001))))
    assert np.asarray(load_rgb(path))[0].tolist() == [[255] * 3, [0x40] * 3]


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 16, 2, struct.pack(">3H", 0x12FF, 0x8000, 0xFF00)))
    assert corners(load_rgb(path))[0] == (0x12, 0x80, 0xFF)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    marked().save(path, "PNG")
    assert corners(load_rgb(path)) == [RED, GREEN, BLUE, WHITE]


def test_a_cmyk_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=95)  # magenta and yellow in full: red
    assert np.abs(np.asarray(load_rgb(path)).astype(int) - np.array(RED)).max() <= 3


@pytest.mark.parametrize(("content", "words"), [(b"", "not a picture"), (b"GIF89a\1\0\1\0\0\0\0;", "not a picture")])
def test_what_is_no_picture(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        picture_size(path)
    assert str(path) in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_picture_that_is_cut_off(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError) as caught:
        load_rgb(path)
    assert str(path) in caught.value.message


def test_a_folder_under_a_picture_s_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="expected a file"):
        picture_size(tmp_path / "a.png")


def test_nothing_heavy_is_imported() -> None:
    names = ("pictures", "samples", "buckets", "transform", "captions", "fingerprint", "cache")
    imports = ", ".join(f"loratools.training.data.{name}" for name in names)
    code = f"import sys; import {imports}; print(sorted({{'torch', 'PIL', 'numpy', 'pydantic'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
