"""Pictures on disk: their size from the header, their pixels as 8-bit RGB.

The content decides, not the suffix; no decoder but those of FORMATS is ever asked. A picture is what a viewer shows: turned as
its EXIF (or XMP) orientation says, transparent parts on white. 16-bit channels keep their high byte.
Invariant: `picture_size` and `load_rgb` agree on width and height. Pillow is imported when a picture is opened.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import InputError, UnsupportedError
from loratools.tensors.header import check_regular, printable

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # (width, height) in pixels

# Pillow's decoder → the suffixes by which such files are found
FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 exchange width and height
_PNG_START = 8  # bytes of the signature before the first chunk
_PNG_METADATA = frozenset({b"eXIf", b"iTXt", b"tEXt", b"zTXt"})  # chunks an orientation can hide in


def picture_size(path: Path) -> Size:
    """(width, height) as shown, from the header alone. Raises InputError (unreadable, no picture), UnsupportedError (no pillow)."""
    with _opened(path) as image:
        from PIL.Image import Image as Base

        if image.format == "PNG" and _metadata_behind_pixels(path):
            image.load()  # exiftool writes there, and Pillow finds it no other way
        exif = Base.getexif(image)  # a PNG's own getexif decodes the whole picture when it sees none
        turned = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def load_rgb(path: Path) -> Image.Image:
    """The picture in mode RGB. Raises InputError (unreadable, broken, cut off), UnsupportedError (no pillow)."""
    with _opened(path) as image:
        from PIL import ImageOps

        shown = ImageOps.exif_transpose(image)
        return _on_white(_eight_bit(shown) if shown.mode.startswith("I") else shown)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16 and, of older Pillows, I) as L or LA; `convert` would clip everything above 255 to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    hidden = image.info.get("transparency")
    if hidden is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))))


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if "transparency" not in image.info and not {"A", "a"} & set(image.getbands()):
        return image.convert("RGB")
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")


def _metadata_behind_pixels(path: Path) -> bool:
    """True when a PNG has a chunk of _PNG_METADATA after its first IDAT; reads the chunks' headers only."""
    with path.open("rb", buffering=0) as file:
        pixels, position = False, _PNG_START
        while file.seek(position) and len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind in _PNG_METADATA:
                return True
            pixels = pixels or kind == b"IDAT"
            position += 12 + length  # length, kind, data, checksum
    return False


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open picture; whatever its decoder raises inside the block becomes an InputError that names the file."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UnsupportedError("pictures need pillow, which is not installed", fix="pip install 'loratools[train]'") from error
    check_regular(path)
    name = printable(str(path))
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a picture of a known format ({', '.join(FORMATS)}), or broken") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: broken picture: {error}", fix="export the picture again") from error
