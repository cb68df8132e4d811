"""From an encoded image to the square that a tower sees: resizing, cropping, flips, colours, random draws."""

import random

import numpy as np
import pytest
from helpers.pictures import encoded, photo, seen, trained_on
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nev.config.base import ConfigError
from nev.config.data import Augment, Jitter, Limits
from nev.data.augment import auto_augment, random_crop, seeded_random
from nev.data.decode import BadImage, Encoded, read_header

PHOTO = photo(0, 48, 40)


def far(pixels: np.ndarray, image: Image.Image | np.ndarray) -> int:
    """The largest difference to a picture, in levels."""
    return int(abs(pixels.astype(int) - np.asarray(image).astype(int)).max())


def plain(picture: np.ndarray | Image.Image) -> Encoded:
    """A picture that is decoded already."""
    pixels = np.asarray(picture).copy()
    return Encoded(pixels.shape[0], pixels.shape[1], "PNG", lambda shrink: pixels)


@pytest.mark.parametrize(("height", "width"), [(40, 48), (37, 91), (500, 333), (8, 8), (1, 7)])
def test_resizing_is_torchvisions_antialiased_bicubic(height: int, width: int) -> None:
    from torchvision.transforms.v2 import functional as vision

    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = Augment(scale=(1, 1), ratio=(width / height, width / height))
    ours = trained_on(plain(image), 32, whole, seeded_random(0, 0, "u", "augment"))
    theirs = vision.resize(Image.fromarray(image), [32, 32], vision.InterpolationMode.BICUBIC, antialias=True)
    assert ours.shape == (32, 32, 3)
    assert far(ours, theirs) <= 1


def test_the_evaluation_view_is_the_centre_square() -> None:
    from torchvision.transforms.v2 import functional as vision

    for width, height in ((60, 40), (40, 60), (41, 40), (32, 32)):
        image = photo(1, width, height)
        side = min(width, height)
        square = vision.center_crop(image, [side, side])
        expected = vision.resize(square, [32, 32], vision.InterpolationMode.BICUBIC, antialias=True)
        assert far(seen(plain(image), 32), expected) <= 1


def test_flips_are_half_of_the_views_and_mirror_the_same_crop() -> None:
    image = plain(PHOTO)
    still, flipped = Augment(scale=(0.5, 1)), Augment(scale=(0.5, 1), flip=True)
    mirrored = 0
    for trial in range(200):
        straight = trained_on(image, 8, still, seeded_random(0, trial, "u", "augment"))
        other = trained_on(image, 8, flipped, seeded_random(0, trial, "u", "augment"))
        turned = bool((other == straight[:, ::-1]).all())
        assert turned or (other == straight).all()
        mirrored += turned
    assert 70 < mirrored < 130


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    st.integers(),
)
def test_crops_stay_inside(height: int, width: int, scale: list[float], ratio: list[float], seed: int) -> None:
    augment = Augment(scale=(scale[0], scale[1]), ratio=(ratio[0], ratio[1]))
    top, left, rows, columns = random_crop(height, width, augment, random.Random(seed))
    assert 0 <= top < top + rows <= height
    assert 0 <= left < left + columns <= width


def test_crops_are_spread_as_torchvisions() -> None:
    import torch
    from torchvision.transforms.v2 import RandomResizedCrop

    augment = Augment(scale=(0.3, 0.9), ratio=(0.75, 4 / 3))
    torch.manual_seed(0)
    theirs = RandomResizedCrop(8, augment.scale, augment.ratio)
    rng = random.Random(0)
    picture = [torch.empty(3, 200, 300)]
    names = ("top", "left", "height", "width")
    expected = np.array([[theirs.make_params(picture)[name] for name in names] for _ in range(4000)])
    drawn = np.array([random_crop(200, 300, augment, rng) for _ in range(4000)])
    error = (expected.var(0) / 4000 + drawn.var(0) / 4000) ** 0.5
    assert (abs(drawn.mean(0) - expected.mean(0)) < 4.5 * error).all()
    assert (abs(drawn.std(0) / expected.std(0) - 1) < 0.08).all()
    area = drawn[:, 2] * drawn[:, 3] / (200 * 300)
    assert area.min() > 0.29
    assert area.max() < 0.91


@pytest.mark.parametrize(("height", "width", "crop"), [(1000, 20, (486, 0, 27, 20)), (20, 1000, (0, 486, 20, 27))])
def test_a_strip_falls_back_to_the_centre_with_the_nearest_aspect(
    height: int, width: int, crop: tuple[int, int, int, int]
) -> None:
    assert random_crop(height, width, Augment(scale=(0.9, 1.0)), random.Random(0)) == crop


def test_a_draw_depends_on_seed_epoch_uid_and_purpose_alone() -> None:
    streams = {
        key: seeded_random(*key).random()  # type: ignore[arg-type]
        for key in [
            (0, 0, "a", "x"),
            (1, 0, "a", "x"),
            (0, 1, "a", "x"),
            (0, 0, "b", "x"),
            (0, 0, "a", "y"),
            (11, 0, "a", "x"),
            (1, 10, "a", "x"),
        ]
    }
    assert len(set(streams.values())) == len(streams)
    random.seed(3)
    assert all(seeded_random(*key).random() == value for key, value in streams.items())  # type: ignore[arg-type]
    assert seeded_random(7, 3, "uid-1", "augment").random() == 0.2072710528393188
    values = [seeded_random(0, epoch, "a", "x").random() for epoch in range(2000)]
    assert abs(np.mean(values) - 0.5) < 0.03
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.1


def photograph(width: int, height: int) -> Image.Image:
    """A picture with detail at every scale, as photographs have."""
    rng = np.random.default_rng(7)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        ).astype(float)
        / side
        for side in (4, 16, 64)
    ]
    return Image.fromarray((sum(layers) / sum(1 / side for side in (4, 16, 64))).astype(np.uint8))


@pytest.mark.parametrize(
    ("side", "shrink"), [(60, 1), (63, 1), (64, 2), (127, 2), (128, 4), (200, 4), (256, 8), (900, 8)]
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(side: int, shrink: int, orientation: int) -> None:
    image = photograph(side + 31, side)
    exif = Image.Exif()
    exif[0x0112] = orientation
    header = read_header(encoded(image, quality=95, exif=exif), Limits())
    asked: list[int] = []

    def pixels(factor: int) -> np.ndarray:
        asked.append(factor)
        return header.pixels(factor)

    whole = Augment(scale=(1, 1), ratio=(header.width / header.height,) * 2)
    small = trained_on(header._replace(pixels=pixels), 32, whole, seeded_random(0, 0, "u", "augment"))
    large = trained_on(
        header._replace(pixels=lambda factor: header.pixels(1)), 32, whole, seeded_random(0, 0, "u", "augment")
    )
    assert asked == [shrink]
    assert header.pixels(shrink).shape == (-(-header.height // shrink), -(-header.width // shrink), 3)
    assert abs(small.astype(int) - large).mean() < 3
    seen(header._replace(pixels=pixels), 32)
    assert asked == [shrink, 1]  # evaluation decodes the whole


@given(st.integers(32, 700), st.integers(32, 700), st.integers(), st.floats(0.1, 1))
def test_a_crop_of_a_smaller_decoding_lies_where_the_whole_one_does(
    height: int, width: int, seed: int, low: float
) -> None:
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([rows * 255 / height, columns * 255 / width, rows * 0], -1).astype(np.uint8)
    augment = Augment(scale=(low, 1.0))

    def shrunk(factor: int) -> np.ndarray:
        """As libjpeg does it: the mean of factor x factor pixels, at the rim of those that are there."""
        tall, wide = -(-height // factor) * factor, -(-width // factor) * factor
        padded = np.pad(ramps, ((0, tall - height), (0, wide - width), (0, 0)), mode="edge")
        return padded.reshape(tall // factor, factor, wide // factor, factor, 3).mean((1, 3)).astype(np.uint8)

    small = trained_on(Encoded(height, width, "JPEG", shrunk), 16, augment, random.Random(seed))
    large = trained_on(plain(ramps), 16, augment, random.Random(seed))
    assert far(small, large) <= 2 + 8 * 255 / min(height, width)


def test_a_picture_that_is_not_what_its_header_says_is_bad() -> None:
    lies = plain(PHOTO)._replace(height=50)
    with pytest.raises(BadImage, match="the header says 48x50, the pixels are 48x40"):
        seen(lies, 16)


def test_jitter_is_drawn_by_the_row_and_leaves_the_crop_alone() -> None:
    jitter = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    views = [
        trained_on(plain(PHOTO), 16, Augment(jitter=jitter), seeded_random(0, epoch, "u", "augment"))
        for epoch in (0, 0, 1)
    ]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()
    unchanged = Augment(jitter=Jitter())
    still = [
        trained_on(plain(PHOTO), 16, augment, seeded_random(0, 0, "u", "augment")) for augment in (Augment(), unchanged)
    ]
    assert (still[0] == still[1]).all()
    assert (still[0] != views[0]).any()


@pytest.mark.parametrize(
    "jitter", [Jitter(brightness=0.5), Jitter(contrast=0.5), Jitter(saturation=0.5), Jitter(hue=0.5)]
)
def test_jitter_spreads_as_torchvisions(jitter: Jitter) -> None:
    import torch
    from torchvision.transforms.v2 import ColorJitter

    torch.manual_seed(0)
    picture = torch.from_numpy(np.asarray(PHOTO.resize((16, 16))).copy()).permute(2, 0, 1)
    theirs_of = ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = np.stack([theirs_of(picture).numpy() for _ in range(400)]).reshape(400, -1)
    image = plain(picture.permute(1, 2, 0).numpy())
    whole = Augment(scale=(1, 1), ratio=(1, 1), jitter=jitter)
    ours = np.stack([trained_on(image, 16, whole, random.Random(n)).transpose(2, 0, 1) for n in range(400)])
    ours = ours.reshape(400, -1)
    assert abs(ours.mean(0) - theirs.mean(0)).mean() < 5
    assert 0.8 < ours.std(0).mean() / theirs.std(0).mean() < 1.25


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "originalr", "3a"])
def test_timms_automatic_augmentations_are_drawn_by_the_row(name: str) -> None:
    def view(uid: str) -> np.ndarray:
        return trained_on(plain(PHOTO), 16, Augment(auto=name), seeded_random(0, 0, uid, "augment"))

    random.seed(1)
    np.random.seed(1)
    before = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    first = [view(f"u{n}") for n in range(8)]
    assert (random.random(), np.random.rand()) == before  # a row's draws are its own
    again = [view(f"u{n}") for n in range(8)]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    bare = [trained_on(plain(PHOTO), 16, Augment(), seeded_random(0, 0, f"u{n}", "augment")) for n in range(8)]
    assert any((one != other).any() for one, other in zip(first, bare, strict=True))


def test_a_strength_that_timm_itself_refuses_costs_the_row_alone() -> None:
    reasons = set()
    for n in range(60):
        try:
            trained_on(plain(PHOTO), 16, Augment(auto="v0-mstd0.5"), random.Random(n))
        except BadImage as bad:
            reasons.add(str(bad))
    assert reasons == {"augmentation v0-mstd0.5: bits must be between or equal to 1 and 8"}


@pytest.mark.parametrize("name", ["rnd-m9", "v7", "original-x3", ""])
def test_an_unknown_automatic_augmentation_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.auto: timm has no augmentation"):
        auto_augment(name, 224)
