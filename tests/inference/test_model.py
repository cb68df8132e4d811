"""What a model is called with, and what it gives: pictures in every form, widths, precisions, classes, ranked lists."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import SIZE, WIDTH, make_experiment, write_checkpoint
from helpers.pictures import encoded, photo
from PIL import Image

import nev
from nev.config.model_spec import Calibration
from nev.data.decode import BadImage
from nev.inference.model import Model, Ranked
from nev.models.prompts import list_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return nev.load(write_checkpoint(make_experiment(tmp_path_factory.mktemp("small"))))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [photo(seed, width=40 + seed, height=33) for seed in range(5)]


def test_all_forms_of_a_picture_are_one_picture(model: Model, photos: list[Image.Image], tmp_path: Path) -> None:
    file = tmp_path / "a photo.png"
    file.write_bytes(encoded(photos[0], "PNG"))
    array = np.asarray(photos[0])
    forms = [
        file,
        str(file),
        file.read_bytes(),
        bytearray(file.read_bytes()),
        photos[0],
        array,
        torch.tensor(array),
    ]
    rows = model.encode_image(forms)
    assert rows.shape == (len(forms), WIDTH)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, np.broadcast_to(rows[:1], rows.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    for form in forms:
        single = model.encode_image(form)
        assert single.shape == (WIDTH,)
        np.testing.assert_allclose(single, rows[0], atol=1e-6)


def test_modes_of_pillow_and_orientation(model: Model) -> None:
    colour = photo(3, 50, 30)
    turned = Image.Exif()
    turned[0x0112] = 6
    sideways = io.BytesIO()
    colour.save(sideways, "PNG", exif=turned)
    upright = colour.transpose(Image.Transpose.ROTATE_270)
    pairs = [
        (colour.convert("L"), colour.convert("L").convert("RGB")),
        (colour.convert("RGBA"), colour),
        (np.asarray(colour.convert("L")), colour.convert("L").convert("RGB")),
        (np.asarray(colour.convert("RGBA")), colour),
        (Image.open(sideways), upright),
        (sideways.getvalue(), upright),
    ]
    given, expected = (model.encode_image(list(side)) for side in zip(*pairs, strict=True))
    np.testing.assert_allclose(given, expected, atol=1e-6)


def test_lists_arrays_and_generators(model: Model, photos: list[Image.Image]) -> None:
    expected = model.encode_image(photos)
    np.testing.assert_allclose(model.encode_image(iter(photos), batch_size=2), expected, atol=1e-6)
    stacked = np.stack([np.asarray(picture.resize((SIZE, SIZE))) for picture in photos])
    np.testing.assert_array_equal(model.encode_image(stacked), model.encode_image(list(stacked)))
    assert model.encode_image([]).shape == (0, WIDTH)
    assert model.encode_text([]).shape == (0, WIDTH)
    names = np.array(["x.jpg", "y.jpg"])
    with pytest.raises(BadImage, match=r"picture 0: no such file: x\.jpg"):
        model.encode_image(names)


def test_bad_pictures(model: Model, photos: list[Image.Image], tmp_path: Path) -> None:
    bomb = Image.new("1", (9_000, 9_000))
    bad = [b"", b"no picture", tmp_path / "absent.jpg", "https://example.com/a.jpg", encoded(bomb, "PNG")]
    with pytest.warns(UserWarning, match="5 of 7 pictures cannot be used: 1 x "):
        rows, valid = model.encode_image([photos[0], *bad, photos[1]], bad="mask", batch_size=3, width=16)
    assert valid.tolist() == [True, *[False] * 5, True]
    assert not rows[1:6].any()
    np.testing.assert_allclose(rows[[0, 6]], model.encode_image(photos[:2], width=16), atol=1e-6)
    for item, message in zip(
        bad, ("empty", "not an image", "no such file", "not fetched from URLs", "more than limits"), strict=True
    ):
        with pytest.raises(BadImage, match=f"picture 1: .*{message}"):
            model.encode_image([photos[0], item])
    with pytest.raises(ValueError, match="bad 'skip': it is raise or mask"):
        model.encode_image(photos, bad="skip")  # type: ignore[call-overload]
    with pytest.raises(BadImage, match=r"Sentences go to encode_text"):
        model.encode_image("a photo of a dog")


@pytest.mark.parametrize(
    "item", [3, None, 0.5, ["nested"], {"bytes": b""}, np.zeros((4, 4, 3)), np.zeros((3, 5, 7), np.uint8)]
)
def test_what_is_no_picture(model: Model, item: object) -> None:
    with pytest.raises(TypeError, match="picture 1 is"):
        model.encode_image([photo(0), item])


def test_a_text_is_never_a_path(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(photo(0), "PNG"))
    texts = [str(file), "https://example.com/picture.png"]
    whole = replace(model.text, max_tokens=model.text.longest)
    np.testing.assert_allclose(model.encode_text(texts), whole.encode(texts), atol=1e-6)
    ranked = model.rank(str(file), texts=texts)
    assert ranked[0] == Ranked("text", 0, ranked[0].score)
    assert ranked[0].score == pytest.approx(1, abs=1e-6)
    for other in (photo(0), b"bytes", 5):
        with pytest.raises(TypeError, match="pictures go to encode_image"):
            model.encode_text(other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not str"):
        model.encode_text(["a dog", photo(0)])  # type: ignore[list-item]


def test_kinds_of_text(model: Model) -> None:
    assert list_prompts("search_query: ") == {"query": "search_query: ", "document": "search_document: "}
    assert list_prompts("passage: ") == {"query": "query: ", "document": "passage: "}
    assert list_prompts("") == {"query": "", "document": ""}
    prompted = Model(model.location, model.spec.model_copy(update={"prompts": list_prompts("search_query: ")}), model.vision,
                  model.load_text, model.device)  # fmt: skip
    for kind, prefix in (("query", "search_query: "), ("document", "search_document: ")):
        np.testing.assert_allclose(
            prompted.encode_text("a dog", kind=kind),
            model.encode_text(f"{prefix}a dog"),
            atol=1e-6,  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match="kind 'passage': it is query or document"):
        model.encode_text("a dog", kind="passage")  # type: ignore[arg-type]


def test_long_texts_are_read_as_far_as_the_encoder_goes(model: Model) -> None:
    """Training cuts captions at text.max_tokens (24 here); vectors that a team has are cut where the encoder ends (96)."""
    start = "word " * 60
    assert np.abs(model.encode_text(start + "dog") - model.encode_text(start + "cat")).max() > 1e-4
    far = "word " * 200
    np.testing.assert_array_equal(model.encode_text(far + "dog"), model.encode_text(far + "cat"))


def test_width_precision_and_output(model: Model, photos: list[Image.Image]) -> None:
    full = model.encode_image(photos)
    narrow = model.encode_image(photos, width=12)
    np.testing.assert_allclose(narrow, full[:, :12] / np.linalg.norm(full[:, :12], axis=1, keepdims=True), atol=1e-6)
    assert model.encode_image(photos, precision="float16").dtype == np.float16
    small = model.encode_image(photos, precision="int8")
    assert small.dtype == np.int8
    assert (np.abs(small).max(axis=1) == 127).all()
    assert np.diag(model.similarity(small, full)).min() > 0.999
    bits = model.encode_image(photos, precision="binary")
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1)[:, :WIDTH], full > 0)
    assert bits.shape == (5, WIDTH // 8)
    tensor = model.encode_text("a dog", output="torch")
    assert isinstance(tensor, torch.Tensor)
    assert tensor.shape == (WIDTH,)
    for encode in (model.encode_image, model.encode_text):
        with pytest.raises(ValueError, match="batch_size 0"):
            encode([], batch_size=0)
    for wrong in ({"width": 0}, {"width": WIDTH + 1}, {"precision": "int4"}, {"output": "jax"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.encode_image(photos, **wrong)  # type: ignore[call-overload]


def test_similarity(model: Model, photos: list[Image.Image]) -> None:
    rows, words = model.encode_image(photos), model.encode_text(["a", "b"], output="torch")
    cosines = model.similarity(rows * 3, words)
    np.testing.assert_allclose(cosines, rows @ words.numpy().T, atol=1e-6)
    assert model.similarity(rows[0], rows).shape == (1, 5)
    with pytest.raises(ValueError, match="48 and of 12 numbers"):
        model.similarity(rows, model.encode_image(photos, width=12))
    with pytest.raises(ValueError, match="Hamming"):
        model.similarity(model.encode_image(photos, precision="binary"), rows)
    with pytest.raises(TypeError, match="encode it first"):
        model.similarity(["a dog"], rows)


def test_classes(model: Model, photos: list[Image.Image]) -> None:
    names, templates = ["dog", "cat", "{car}"], ["a {}", "one {} here"]
    best = model.classify(photos, names, templates=templates, top=2)
    assert [len(of_picture) for of_picture in best] == [2] * 5
    sentences = model.encode_text([template.replace("{}", name) for name in names for template in templates])
    means = sentences.reshape(3, 2, -1).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    logits = model.spec.logit_scale * model.encode_image(photos[0]) @ means.T
    expected = np.exp(logits) / np.exp(logits).sum()
    assert best[0][0].label == names[int(expected.argmax())]
    assert best[0][0].score == pytest.approx(expected.max(), abs=1e-5)
    single = model.classify(photos[0], names, templates=templates, top=2)
    assert [item.label for item in single] == [item.label for item in best[0]]
    assert [item.score for item in single] == pytest.approx([item.score for item in best[0]], abs=1e-5)
    for labels, wrong in (([], ("a {}",)), (["dog", "dog"], ("a {}",)), (["dog"], ("a dog",))):
        with pytest.raises(ValueError, match=r"label|template"):
            model.classify(photos, labels, templates=wrong)


def test_one_list_of_pictures_and_texts(model: Model, photos: list[Image.Image]) -> None:
    texts = ["a dog", "a cat"]
    plain = model.rank("a dog", images=photos, texts=texts, calibrated=False, top=7)
    cosines = [*model.similarity(model.encode_text("a dog"), model.encode_image(photos))[0]]
    cosines += [*model.similarity(model.encode_text("a dog"), model.encode_text(texts))[0]]
    assert [item.score for item in plain] == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)
    assert plain[0] == Ranked("text", 0, plain[0].score)
    assert {(item.kind, item.position) for item in plain} == {("image", n) for n in range(5)} | {
        ("text", 0),
        ("text", 1),
    }
    assert (
        model.rank("a dog", images=model.encode_image(photos), texts=model.encode_text(texts), calibrated=False, top=7)
        == plain
    )
    assert [item.kind for item in model.rank(photos[0], images=photos, top=1)] == ["image"]
    assert model.rank(model.encode_image(photos[2]), images=photos, calibrated=False)[0].position == 2
    assert model.rank("a dog") == []
    for wrong in (model.encode_image(photos), model.encode_image(photos[0], width=12)):
        with pytest.raises(
            ValueError, match=r"rank takes one query of 48 numbers|query: vectors of this model have 48"
        ):
            model.rank(wrong, texts=texts)


def test_calibration_closes_the_gap(model: Model) -> None:
    """Pictures that lie in a cone of their own come after all texts; moved by the means of both cones they do not."""
    random = np.random.default_rng(0)
    things, cone = random.normal(size=(40, WIDTH)), 4 * np.eye(WIDTH)[0]
    unit = lambda rows: np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True))  # noqa: E731
    images, texts = unit(things + 8 * cone), unit(random.normal(size=(40, WIDTH)) * 0.1 + things - 8 * cone)
    means = Calibration(image_mean=tuple(images.mean(0).tolist()), text_mean=tuple(texts.mean(0).tolist()))
    known = Model(model.location, model.spec.model_copy(update={"calibration": means}), model.vision, model.load_text,
                  model.device)  # fmt: skip
    query = unit(things[:1] - 8 * cone)[0]
    apart = known.rank(query, images=images, texts=texts[1:], calibrated=False, top=39)
    assert {item.kind for item in apart} == {"text"}
    together = known.rank(query, images=images, texts=texts[1:], top=1)
    assert (together[0].kind, together[0].position) == ("image", 0)


def test_progress_is_shown_when_asked(
    model: Model, photos: list[Image.Image], capfd: pytest.CaptureFixture[str]
) -> None:
    model.encode_image(photos)
    assert capfd.readouterr().err == ""
    model.encode_image(photos, progress=True)
    assert "pictures" in capfd.readouterr().err


def test_the_fingerprints_name_what_decides_a_vector(model: Model, tmp_path: Path) -> None:
    other = write_checkpoint(make_experiment(tmp_path), seed=1)
    again, changed = nev.load(model.location), nev.load(other)
    darker = replace(again, spec=again.spec.model_copy(update={"mean": (0.1, 0.1, 0.1)}))
    assert model.fingerprint == again.fingerprint
    assert len({model.fingerprint, changed.fingerprint, darker.fingerprint}) == 3
    assert model.text_fingerprint == changed.text_fingerprint
    prompts = {**again.spec.prompts, "document": "passage: "}
    assert (
        replace(again, spec=again.spec.model_copy(update={"prompts": prompts})).text_fingerprint
        != again.text_fingerprint
    )
