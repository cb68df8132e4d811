"""Pictures that belong to somebody else, vectors without a direction, and what is no picture: through a model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import SIZE, WIDTH, make_experiment, write_checkpoint
from helpers.pictures import encoded, photo
from PIL import Image, ImageSequence

import nev
from nev.data.decode import BadImage
from nev.inference.model import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return nev.load(write_checkpoint(make_experiment(tmp_path_factory.mktemp("small"))))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{seed}.png" for seed in range(8)]
    for seed, path in enumerate(paths):
        path.write_bytes(encoded(photo(seed, 400, 300), "PNG"))
    return paths


def same(rows: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_a_picture_that_is_given_eight_times(model: Model, files: list[Path]) -> None:
    rows, valid = model.encode_image([Image.open(files[0])] * 8, bad="mask")
    assert valid.all()
    same(rows, np.broadcast_to(model.encode_image(files[0]), (8, WIDTH)))


def test_the_frames_of_a_gif(model: Model) -> None:
    frames, file = [photo(seed) for seed in range(3)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    gif = Image.open(file)
    expected = [model.encode_image(frame.copy()) for frame in ImageSequence.Iterator(gif)]
    same(model.encode_image(ImageSequence.Iterator(gif)), np.stack(expected))
    assert np.abs(expected[0] - expected[2]).max() > 1e-3


def test_a_generator_that_closes_or_reuses_its_pictures(model: Model, files: list[Path]) -> None:
    expected = model.encode_image(files)

    def closing() -> Iterator[Image.Image]:
        for file in files:
            with Image.open(file) as image:
                yield image

    def streams() -> Iterator[Any]:
        for file in files:
            with file.open("rb") as stream:
                yield stream

    def reusing(buffer: Any) -> Iterator[Any]:
        for file in files:
            buffer[:] = (
                np.asarray(Image.open(file))
                if buffer.ndim == 3
                else np.frombuffer(file.read_bytes().ljust(2**18), np.uint8)
            )
            yield buffer if buffer.ndim == 3 else buffer.data

    same(model.encode_image(closing()), expected)
    same(model.encode_image(streams()), expected)
    same(model.encode_image(reusing(np.zeros((300, 400, 3), np.uint8))), expected)
    same(model.encode_image(reusing(np.zeros(2**18, np.uint8))), expected)


def test_an_image_beyond_the_limit_is_not_decoded(model: Model, files: list[Path]) -> None:
    limits = model.spec.limits.model_copy(update={"max_pixels": 1000})
    small = Model(model.location, model.spec.model_copy(update={"limits": limits}), model.vision, model.load_text,
                  model.device)  # fmt: skip
    image = Image.open(files[0])
    for picture in (image, np.zeros((300, 400), np.uint8)):
        with pytest.raises(BadImage, match="400x300, more than limits"):
            small.encode_image(picture)
    assert image.fp is not None  # Pillow closes the file of a picture that is decoded


def test_one_picture_or_several(model: Model, files: list[Path]) -> None:
    expected = model.encode_image(files[0])
    data = files[0].read_bytes()
    for single in (np.str_(files[0]), memoryview(data), io.BytesIO(data)):
        same(model.encode_image(single), expected)
    with files[0].open("rb") as stream:
        same(model.encode_image(stream), expected)
    with files[0].open(encoding="latin-1") as stream, pytest.raises(TypeError, match="open it in mode 'rb'"):
        model.encode_image(stream)
    with files[0].open("rb") as stream:
        pass
    with pytest.raises(BadImage, match="cannot be read"):
        model.encode_image(stream)
    for nothing in (None, 3, np.float32(1), np.array(5)):
        with pytest.raises(TypeError, match="is no picture and no list of pictures"):
            model.encode_image(nothing)


def test_files_that_are_no_pictures_do_not_end_a_batch(model: Model, files: list[Path]) -> None:
    large = files[0].parent / "large.bin"
    with large.open("wb") as stream:
        stream.truncate(model.spec.limits.max_bytes + 1)
    bad = ["~nobody-has-this-name/a.jpg", Image.new("RGB", (0, 5)), np.zeros((4, 0, 3), np.uint8), "/dev/zero", files[0].parent,
           "a\0b", large, b"\xff" * (model.spec.limits.max_bytes + 1)]  # fmt: skip
    messages = ["cannot be read", "no pixels", "no pixels", "not a regular file", "not a regular file", "cannot be read",
                "more than limits", "more than limits"]  # fmt: skip
    with pytest.warns(UserWarning, match="8 of 9 pictures"):
        rows, valid = model.encode_image([*bad, files[0]], bad="mask")
    assert valid.tolist() == [False] * 8 + [True]
    same(rows[8], model.encode_image(files[0]))
    for picture, message in zip(bad, messages, strict=True):
        with pytest.raises(BadImage, match=message):
            model.encode_image(picture)


class Broken(torch.nn.Module):
    """A tower that gives NaN for dark pictures."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dark = images.mean(dim=(1, 2, 3)) < images.new_zeros(())
        return torch.where(dark[:, None], torch.nan, self.tower(images))


def test_a_vector_that_is_not_finite_is_a_bad_picture(model: Model) -> None:
    light, dark = (np.full((SIZE, SIZE, 3), value, np.uint8) for value in (255, 0))
    broken = replace(model, vision=Broken(model.vision))  # type: ignore[arg-type]
    with pytest.raises(BadImage, match="picture 1: the model gives no finite vector"):
        broken.encode_image([light, dark])
    with pytest.warns(UserWarning, match="1 of 3 pictures cannot be used: 1 x the model gives no finite vector"):
        rows, valid = broken.encode_image([light, dark, light], bad="mask", batch_size=2)
    assert valid.tolist() == [True, False, True]
    assert not rows[1].any()
    same(rows[[0, 2]], model.encode_image([light, light]))


def test_vectors_without_a_direction(model: Model) -> None:
    rows = model.encode_image([photo(seed) for seed in range(3)])
    rows[1] = 0
    cosines = model.similarity(rows, rows)
    assert not cosines[1].any()
    assert not cosines[:, 1].any()
    missing = rows.copy()
    missing[2, 3] = np.nan
    cosines = model.similarity(missing, rows[:1])
    assert np.isnan(cosines[:, 0]).tolist() == [False, False, True]
    assert model.spec.calibration
    for calibrated in (True, False):
        ranked = model.rank("a dog", images=missing, texts=rows[:2], calibrated=calibrated)
        assert {(item.kind, item.position) for item in ranked} == {("image", 0), ("text", 0)}
    for query in (missing[2], rows[1]):
        with pytest.raises(ValueError, match="finite and not all 0"):
            model.rank(query, images=rows)


def test_vectors_of_another_width_are_refused(model: Model) -> None:
    photos = [photo(seed) for seed in range(4)]
    narrow = model.encode_image(photos, width=WIDTH // 2)
    for rows in (narrow, narrow[:3], narrow[0], np.zeros((2, 2, WIDTH), np.float32)):
        for side in ("images", "texts"):
            with pytest.raises(ValueError, match=f"{side}: vectors of this model have 48 numbers"):
                model.rank("a dog", **{side: rows})
    for precision in ("int8", "binary"):
        small: Any = model.encode_image(photos, precision=precision)
        for given in (small, torch.from_numpy(small), small[0]):
            for side in ("images", "texts"):
                with pytest.raises(TypeError, match=f"{side}: an array .* of .*int8 is no list of vectors"):
                    model.rank("a dog", **{side: given})
    assert model.rank("a dog", images=np.zeros(0), texts=np.zeros((0, WIDTH))) == []


def test_similarity_takes_every_tensor_of_torch(model: Model) -> None:
    rows = model.encode_image([photo(seed) for seed in range(3)])
    expected = model.similarity(rows, rows)
    graph = torch.from_numpy(rows).requires_grad_()
    same(model.similarity(graph, rows), expected)
    np.testing.assert_allclose(model.similarity(graph.bfloat16(), rows), expected, atol=1e-2)
    with pytest.raises(ValueError, match=r"similarity compares vectors, \[n, D\]"):
        model.similarity(rows[None], rows)


def test_a_callers_autocast_does_not_reach_the_towers(model: Model) -> None:
    photos = [photo(seed) for seed in range(3)]
    pictures, sentences = model.encode_image(photos), model.encode_text(["a dog"])
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(model.encode_image(photos), pictures)
        np.testing.assert_array_equal(model.encode_text(["a dog"]), sentences)


def test_arguments_that_make_no_list(model: Model) -> None:
    for call in (
        lambda: model.classify(photo(0), ["dog", "cat"], top=-1),
        lambda: model.rank("a dog", texts=["a cat"], top=0),
    ):
        with pytest.raises(ValueError, match=r"top (-1|0): at least 1"):
            call()
    with pytest.raises(ValueError, match="templates: at least one"):
        model.classify(photo(0), ["dog", "cat"], templates=())
    (best,) = model.classify(photo(0), ["dog", "cat"], templates="a {}", top=1)
    assert best == model.classify(photo(0), ["dog", "cat"], templates=["a {}"], top=1)[0]
    with pytest.raises(ValueError, match=r"text 1 has half a character at position 2 .*cut JSON"):
        model.encode_text(["a dog", "a \ud83d dog"])
