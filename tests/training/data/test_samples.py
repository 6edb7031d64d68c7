"""Folders of pictures and captions: what is read, in which order, and everything that can be wrong with them, at once."""

from __future__ import annotations

import json
import os
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loratools.errors import InputError
from loratools.training.data.samples import Dataset, Folder, read_folders


def picture(path: Path, size: tuple[int, int] = (4, 3), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **options)
    return path


def rows(folder: Path, *items: object, name: str = "metadata.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def captions(dataset: Dataset) -> dict[str, str]:
    return {sample.id: sample.caption for sample in dataset.samples}


def refused(*folders: Folder) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_folders(folders)
    assert caught.value.exit_code == 3
    return caught.value.details


def test_a_sample(tmp_path: Path) -> None:
    path = picture(tmp_path / "cat.png", (7, 5))
    (tmp_path / "cat.txt").write_text("a cat\n")
    (sample,) = read_folders([Folder(tmp_path, repeats=3)]).samples
    assert (sample.id, sample.path, sample.caption, sample.width, sample.height) == ("cat.png", path, "a cat", 7, 5)
    assert (sample.repeats, sample.folder) == (3, tmp_path)


def test_a_turned_photo_has_the_size_it_is_seen_with(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + b"\0\0\0\0"
    picture(tmp_path / "a.jpg", (40, 20), exif=exif)
    (sample,) = read_folders([Folder(tmp_path, prompt="x")]).samples
    assert (sample.width, sample.height) == (20, 40)


def test_formats_and_order(tmp_path: Path) -> None:
    """Sorted by the relative path, suffixes in any case, subfolders included, hidden files and folders not."""
    names = ["b.JPG", "a.png", "sub/z.webp", "sub.bmp", "Z.jpeg", "é.png", ".hidden.png", ".cache/a.png", "._a.png"]
    for name in reversed(names):
        picture(tmp_path / name, format={".JPG": "JPEG"}.get(Path(name).suffix))
    found = read_folders([Folder(tmp_path, prompt="x")])
    assert [sample.id for sample in found.samples] == ["Z.jpeg", "a.png", "b.JPG", "sub.bmp", "sub/z.webp", "é.png"]
    assert found.unused == ()


def test_the_order_is_not_the_file_system_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "c.png"):
        picture(tmp_path / name)
    (tmp_path / "ab").symlink_to(tmp_path / "b")  # the first of two ways into a folder is the one that counts
    expected = read_folders([Folder(tmp_path, prompt="x")])
    real = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            self.entries = iter(sorted(real(path), key=lambda entry: entry.name, reverse=True))

        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Backwards:
            return self

        def __next__(self) -> os.DirEntry[str]:
            return next(self.entries)

        def close(self) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert next(iter(os.scandir(tmp_path))).name == "c.png"
    assert read_folders([Folder(tmp_path, prompt="x")]) == expected
    assert [sample.id for sample in expected.samples] == ["a/1.png", "a/2.png", "ab/1.png", "ab/2.png", "c.png"]


def test_where_a_caption_comes_from(tmp_path: Path) -> None:
    """Its row, else its text file, else the prompt; prefix and suffix around each."""
    for name in ("row.png", "caption-row.png", "empty-row.png", "file.png", "empty-file.png", "neither.png"):
        picture(tmp_path / name)
    (tmp_path / "file.txt").write_text("from the file")
    (tmp_path / "empty-file.txt").write_text("")
    rows(
        tmp_path,
        {"file_name": "row.png", "text": "from the row"},
        {"file_name": "./caption-row.png", "caption": "from the row too"},
        {"file_name": "empty-row.png"},
    )
    found = captions(read_folders([Folder(tmp_path, prompt="the prompt", prefix="<", suffix=">")]))
    assert found == {
        "caption-row.png": "<from the row too>",
        "empty-file.png": "<>",
        "empty-row.png": "<the prompt>",
        "file.png": "<from the file>",
        "neither.png": "<the prompt>",
        "row.png": "<from the row>",
    }


@pytest.mark.parametrize("extension", [".caption", "caption", ".cap.txt"])
def test_another_caption_extension(extension: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.b.png")
    (tmp_path / f"a.b.{extension.removeprefix('.')}").write_text("right")
    (tmp_path / "a.b.txt").write_text("wrong")
    found = read_folders([Folder(tmp_path, caption_extension=extension)])
    assert captions(found) == {"a.b.png": "right"}
    assert found.unused == (tmp_path / "a.b.txt",)


@pytest.mark.parametrize("extension", ["", ".", "/x", "a/b"])
def test_a_caption_extension_that_is_none(extension: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert "is no caption extension" in refused(Folder(tmp_path, caption_extension=extension))[0]


def test_captions_are_one_line_of_utf_8(tmp_path: Path) -> None:
    for name, content in (("a", b"\xef\xbb\xbfcaf\xc3\xa9\r\n"), ("b", b" one\n\n  two  spaces \r\nthree")):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert captions(read_folders([Folder(tmp_path)])) == {"a.png": "café", "b.png": "one two  spaces three"}


def test_metadata_below_and_with_windows_habits(tmp_path: Path) -> None:
    picture(tmp_path / "train/in/a.png")
    picture(tmp_path / "b.png")
    path = rows(tmp_path / "train", {"file_name": "in\\a.png", "text": "a"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    rows(tmp_path, {"file_name": "b.png", "text": "b", "more": [1, None]})
    assert captions(read_folders([Folder(tmp_path)])) == {"b.png": "b", "train/in/a.png": "a"}


def test_several_folders(tmp_path: Path) -> None:
    """The same names in two folders; an id does not depend on where the folders lie."""
    for name in ("one/1.png", "two/1.png", "two/2.png"):
        picture(tmp_path / name)
    folders = (Folder(tmp_path / "one", 2, prompt="a"), Folder(tmp_path / "two", 5, prompt="b"))
    found = read_folders(folders)
    assert [(sample.id, sample.caption, sample.repeats) for sample in found.samples] == [
        ("1.png", "a", 2),
        ("2:1.png", "b", 5),
        ("2:2.png", "b", 5),
    ]
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = read_folders((Folder(tmp_path / "moved", 2, prompt="a"), folders[1]))
    assert [sample.id for sample in moved.samples] == [sample.id for sample in found.samples]


def test_ids_are_the_same_in_both_unicode_forms(tmp_path: Path) -> None:
    """macOS may give back the decomposed form of a name that Linux has composed."""
    decomposed = unicodedata.normalize("NFD", "é")
    picture(tmp_path / f"{decomposed}.png")
    rows(tmp_path, {"file_name": "é.png", "text": "e"})
    (sample,) = read_folders([Folder(tmp_path)]).samples
    assert (sample.id, sample.caption) == ("é.png", "e")
    assert sample.path.name == f"{decomposed}.png"
    picture(tmp_path / "é.png")
    assert any("different Unicode form" in line for line in refused(Folder(tmp_path)))


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    for name in ("b.txt", "c.gif", "d.heic", "metadata.csv"):
        (tmp_path / name).write_text("x")
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    rows(tmp_path, {"file_name": "a.png"})
    assert [path.name for path in read_folders([Folder(tmp_path)]).unused] == ["b.txt", "c.gif", "d.heic", "metadata.csv"]


def test_everything_wrong_at_once(tmp_path: Path) -> None:
    bad, empty = tmp_path / "bad", tmp_path / "empty"
    empty.mkdir()
    picture(bad / "bare.png")
    picture(bad / "latin.png")
    (bad / "latin.txt").write_bytes(b"caf\xe9")
    (bad / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (bad / "broken.txt").write_text("x")
    picture(bad / "both.png")
    (bad / "both.txt").write_text("one thing")
    path = rows(bad, {"file_name": "both.png", "text": "another"}, {"file_name": "gone.png", "text": "x"}, {"text": "nameless"})
    lines = refused(Folder(bad, repeats=0), Folder(empty), Folder(tmp_path / "absent"), Folder(path))
    expected = [
        f"{bad}: repeats is 0",
        f"{path} line 2: gone.png is not there",
        f"{path} line 3: expected an object with a file_name",
        f"{bad / 'bare.png'}: no caption: no bare.txt",
        f"{bad / 'both.png'}: its row in metadata.jsonl and both.txt differ",
        f"{bad / 'broken.png'}: not a picture",
        f"{bad / 'latin.txt'}: not UTF-8 at byte 3",
        f"{empty}: no pictures",
        f"{tmp_path / 'absent'}: no such folder",
        f"{path}: not a folder",
    ]
    assert len(lines) == len(expected), lines
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"file_name": "../secret.png", "text": "x"}', "is not there"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "is not there"),
        ('{"file_name": "notes.gif", "text": "x"}', "is no picture that can be read"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "x"}', "line 2: ./a.png has a row already"),
        ('{"file_name": "a.png", "text": "x", "caption": "y"}', "expected one caption"),
        ('{"file_name": "a.png", "text": ["x"]}', "expected one caption"),
        ('{"file_name": 3}', "expected an object with a file_name"),
        ('["a.png"]', "expected an object with a file_name"),
        ('{"file_name": "a.png"', "line 1: not JSON"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_rows_that_are_wrong(row: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    picture(folder / "a.png")
    picture(tmp_path / "secret.png")
    (folder / "notes.gif").write_text("x")
    (folder / "metadata.jsonl").write_text(row)
    (line,) = refused(Folder(folder, prompt="x"))
    assert words in line


def test_row_and_file_may_say_the_same(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat\n")
    rows(tmp_path, {"file_name": "a.png", "text": "a cat"})
    assert captions(read_folders([Folder(tmp_path)])) == {"a.png": "a cat"}


def test_the_same_picture_twice(tmp_path: Path) -> None:
    path = picture(tmp_path / "one/a.png")
    (tmp_path / "one/link.png").symlink_to(path)
    lines = refused(Folder(tmp_path / "one", prompt="x"), Folder(tmp_path / "one", prompt="y"))
    assert len(lines) == 3
    assert all(f"the same file as {path}" in line for line in lines)


def test_an_id_that_two_files_would_share(tmp_path: Path) -> None:
    picture(tmp_path / "one/2:a.png")
    picture(tmp_path / "two/a.png", (5, 5))
    (line,) = refused(Folder(tmp_path / "one", prompt="x"), Folder(tmp_path / "two", prompt="x"))
    assert "has the id 2:a.png" in line


def test_links_to_folders(tmp_path: Path) -> None:
    """Followed, and neither a loop nor a second way in reads anything twice."""
    picture(tmp_path / "elsewhere/a.png")
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "deep/loop").symlink_to(data)
    (tmp_path / "elsewhere/back").symlink_to(data)
    assert list(captions(read_folders([Folder(data, prompt="x")]))) == ["link/a.png"]


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    assert any("name is not UTF-8" in line for line in refused(Folder(tmp_path, prompt="x")))


def test_a_name_cannot_forge_a_line(tmp_path: Path) -> None:
    picture(tmp_path / "a\nb.png")
    (line,) = refused(Folder(tmp_path))
    assert "a\\nb.png" in line
    assert "\n" not in line


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    assert any("expected a file, found a FIFO" in line for line in refused(Folder(tmp_path)))


def test_no_folders() -> None:
    assert refused() == ["no folder is given"]
