"""The loss with a locked image side or no lock at all, and input that it refuses."""

import pytest
import torch
from helpers.losses import N, gradients, inputs, log_scale_of, naive

from nev.losses.contrastive import contrastive_loss


def test_a_locked_image_side_is_the_same_with_both_exchanged() -> None:
    text, image = inputs()  # the text wants a gradient, the image does not
    want = naive(image, text, log_scale_of())
    got = contrastive_loss(text, image, log_scale_of()).loss
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, text)[0], gradients(want, text)[0])


def test_half_texts_get_half_gradients() -> None:
    image, text = inputs(64, 16, dtype=torch.bfloat16)
    text.requires_grad_()
    exact = text.detach().double().requires_grad_()
    want = gradients(naive(image.detach().double(), exact, log_scale_of(100.0)), exact)[0]
    got = gradients(contrastive_loss(image, text, log_scale_of(100.0, torch.float32)).loss, text)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-6)


def test_bad_input_is_named() -> None:
    image, text = inputs()
    scale = log_scale_of()
    cases = [
        ((image, text[:4], scale), "must both be"),
        ((image[:0], text[:0], scale), "b >= 1"),
        ((image, text.int(), scale), "text must be floating point"),
        ((image, text, scale[None]), "0-d"),
        ((image, text, scale, torch.ones(N)), "valid must be bool"),
        ((image, text, scale, torch.ones(N - 1, dtype=torch.bool)), "valid must be bool"),
        ((image, text.to("meta"), scale), "one device"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            contrastive_loss(*arguments)


def test_an_invalid_image_may_not_reach_a_text_by_an_infinite_weight() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    image = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    valid = torch.tensor([True, False])
    loss = contrastive_loss(image, text, log_scale_of(100.0, torch.float32), valid).loss
    assert gradients(loss, text)[0].isfinite().all()
