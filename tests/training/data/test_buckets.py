"""The table against kohya's, written out; the nearest bucket, small pictures and the numbers of a plan by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loratools.errors import InputError
from loratools.training.data.buckets import BucketRow, Buckets, assign, bucket_name, bucket_of, make_buckets, one_bucket, statistics
from loratools.training.data.samples import Sample

# what sd-scripts' make_bucket_resolutions((512, 512), 256, 1024, 64) returns: for each width the tallest that fits, and turned
TALL_512 = ((256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576))
TABLE_512 = tuple(sorted({*TALL_512, (512, 512), *((height, width) for width, height in TALL_512)}))


def sample(name: str, width: int, height: int, repeats: int = 1) -> Sample:
    return Sample(name, Path(name), "", width, height, repeats, Path())


def test_the_table_for_512() -> None:
    assert make_buckets(512).sizes == TABLE_512
    assert make_buckets(512, step=64, min_side=256, max_side=1024) == Buckets(TABLE_512, 64)


@pytest.mark.parametrize(
    ("resolution", "step", "low", "high"),
    [(1024, 64, None, None), (1024, 32, 512, 2048), (768, 64, 384, 1024), (500, 64, 200, 900), (32, 8, 16, 64)],
)
def test_what_every_table_keeps(resolution: int, step: int, low: int | None, high: int | None) -> None:
    sizes = make_buckets(resolution, step=step, min_side=low, max_side=high).sizes
    bounds = (resolution // 2 if low is None else low, resolution * 2 if high is None else high)
    assert list(sizes) == sorted(set(sizes))
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution * resolution
        assert (height, width) in sizes
        assert width == height or bounds[0] <= min(width, height) <= max(width, height) <= bounds[1]
        # the longer side could not be a step longer
        longer, shorter = max(width, height), min(width, height)
        assert longer + step > bounds[1] or (longer + step) * shorter > resolution**2 or (longer + step, shorter) in sizes
    assert (resolution // step * step,) * 2 in sizes


@pytest.mark.parametrize(
    ("picture", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((4000, 4000), (512, 512)),
        ((1920, 1080), (640, 384)),  # 1.78: between 1.67 and 2.2
        ((1080, 1920), (384, 640)),
        ((3000, 100), (1024, 256)),  # wider than any
        ((640, 384), (640, 384)),
        ((1000, 800), (576, 448)),  # 1.25: nearer to 1.29 than to 1
        ((1130, 1000), (512, 512)),  # 1.13 is below √1.2857 = 1.1339, the border of 1 and 1.2857
        ((1138, 1000), (576, 448)),
    ],
)
def test_the_nearest_bucket(picture: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert bucket_of(make_buckets(512), *picture) == bucket


def test_of_two_buckets_with_one_ratio_the_larger() -> None:
    assert bucket_of(Buckets(((256, 128), (512, 256)), 64), 1000, 500) == (512, 256)


def test_a_turned_picture_has_the_turned_bucket() -> None:
    buckets = make_buckets(512)
    for width in range(100, 2000, 37):
        across, down = bucket_of(buckets, width, 701)
        assert bucket_of(buckets, 701, width) == (down, across)
        error = abs(math.log(across / down) - math.log(width / 701))
        assert all(error <= abs(math.log(w / h) - math.log(width / 701)) + 1e-12 for w, h in TABLE_512)


@pytest.mark.parametrize(
    ("picture", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((511, 511), (448, 448)),  # its own size, cut to multiples of 64
        ((200, 130), (192, 128)),
        ((2000, 1999), (512, 512)),
        ((250, 10000), (192, 1024)),  # too narrow for 256 × 1024, and not longer than that
        ((10000, 250), (1024, 192)),
        ((63, 600), (0, 576)),
    ],
)
def test_without_upscaling(picture: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert bucket_of(make_buckets(512, upscale=False), *picture) == bucket


def test_without_upscaling_nothing_is_enlarged() -> None:
    buckets = make_buckets(512, upscale=False)
    pictures = [sample(f"{width}.{height}", width, height) for width in range(64, 900, 61) for height in range(64, 900, 53)]
    assert sum(row.upscaled for row in statistics(assign(pictures, buckets))) == 0
    assert sum(row.upscaled for row in statistics(assign(pictures, make_buckets(512)))) > 0


def test_pictures_that_are_too_small_are_all_named() -> None:
    pictures = [sample("a", 63, 600), sample("b", 64, 64), sample("c", 600, 10)]
    with pytest.raises(InputError) as caught:
        assign(pictures, make_buckets(512, upscale=False))
    assert caught.value.details == ["a: 63×600", "c: 600×10"]
    assert [row.pictures for row in statistics(assign(pictures, make_buckets(512)))] == [1, 1, 1]


def test_one_bucket() -> None:
    buckets = one_bucket(500, step=64)
    assert buckets == Buckets(((448, 448),), 64)
    assert assign([sample("a", 10, 4000)], buckets).keys() == {(448, 448)}


def test_assignment_keeps_the_order_of_the_samples() -> None:
    pictures = [sample("z", 10, 10), sample("b", 300, 100), sample("a", 20, 20)]
    found = assign(pictures, make_buckets(512))
    assert [(size, [item.id for item in items]) for size, items in found.items()] == [((512, 512), ["z", "a"]), ((832, 256), ["b"])]


def test_statistics() -> None:
    pictures = [sample("a", 512, 512, 3), sample("b", 1024, 1024), sample("c", 400, 500, 2), sample("d", 1024, 512)]
    found = statistics(assign(pictures, Buckets(((512, 512),), 64)))
    # c: 400 × 500 covers 512 × 512 as 512 × 640, of which a fifth is cut away; d: half of 1024 × 512
    assert found == (BucketRow((512, 512), 4, 7, pytest.approx((0 + 0 + 0.2 + 0.5) / 4), 1),)


@pytest.mark.parametrize(
    ("numbers", "count"),
    [
        ({"resolution": 512, "step": 0}, 1),
        ({"resolution": 32, "step": 64}, 1),
        ({"resolution": 512, "min_side": 600}, 1),
        ({"resolution": 512, "max_side": 500}, 1),
        ({"resolution": 512, "min_side": 0, "max_side": 100, "step": -1}, 3),
    ],
)
def test_numbers_that_do_not_fit(numbers: dict[str, int], count: int) -> None:
    with pytest.raises(InputError) as caught:
        make_buckets(**numbers)  # type: ignore[arg-type]
    assert len(caught.value.details) == count


def test_a_name() -> None:
    assert bucket_name((512, 768)) == "512x768"
