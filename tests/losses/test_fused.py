"""Triton kernels against `nev.losses.tiles`: in Triton's interpreter, which needs no GPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import gradients, inputs, log_scale_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from nev.losses import contrastive, fused, kernel_check, tiles
from nev.losses.contrastive import contrastive_loss

BLOCKS = (
    fused.BlockSizes(4, 8, 4, 8, 4, 2),
    fused.BlockSizes(16, 4, 16, 4, 4, 2),
    fused.BlockSizes(8, 16, 2, 16, 4, 2),
)
# Bytes that a program may have: 80 stands for the smallest of the GPUs (8.6, 8.9, 12.0).
GPU_SHARED = {80: 99 * 1024, 90: 227 * 1024}

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Calls a function of this file in a process whose Triton interprets: the variable counts when triton is imported."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # the process begins
        yield lambda function, *args: pool.submit(call, function.__name__, *args).result()


def call(name: str, *args: Any) -> Any:
    return globals()[name](*args)


def sides(b: int, n: int, first: int, dim: int, scale: float, dtype: torch.dtype, seed: int, layout: str) -> Any:
    """Images times the scale and texts, of which some, or all, do not count and hold NaN or infinity."""
    generator = torch.Generator().manual_seed(seed)
    valid_texts = torch.rand(n, generator=generator) < (0.0, 0.3, 0.8, 1.0)[seed % 4]
    valid = valid_texts[first : first + b]
    texts = normalize(torch.randn(n, dim, generator=generator)).to(dtype)
    texts[~valid_texts] = (torch.nan, torch.inf)[seed % 2]
    near = texts[first : first + b].float() + torch.rand(1, generator=generator) * torch.randn(
        b, dim, generator=generator
    )
    x = (scale * normalize(near)).masked_fill(~valid[:, None], 0)
    if layout == "packed":  # as they come from other ranks
        texts = torch.cat([texts, valid_texts[:, None].to(dtype)], 1)[:, :-1]
    if layout == "transposed":
        x, texts = x.T.contiguous().T, texts.T.contiguous().T
    return x, texts, valid, valid_texts, first


def compare(given: Any, scale: float, blocks: fused.BlockSizes | None = None, rounding: float = 4e-7) -> None:
    """The kernels in float32 beside the tiles in float64.

    Scores up to `scale` have errors in proportion; so have log-sum-exps, the logarithms of weights, which are at most 2.
    """
    x, texts, valid, valid_texts, first = given
    close = {"rtol": 0, "atol": rounding * (scale + 4)}
    exact = x.double(), texts.double(), valid, valid_texts, first
    found, want = fused.statistics(*given, blocks), tiles.statistics(*exact)
    torch.testing.assert_close(found.row[valid].double(), (want.row + want.shift)[valid], **close)
    torch.testing.assert_close(found.pair[valid].double(), (want.pair + want.shift)[valid], **close)
    torch.testing.assert_close(
        found.column.double(), want.column + want.shift, **close
    )  # both -inf where nothing counts
    assert found.shift == 0
    if valid.any():
        scores = (exact[0][valid] @ exact[1].T).masked_fill(~valid_texts, -torch.inf)
        chosen = scores.gather(1, found.best.text[valid, None])[:, 0]
        torch.testing.assert_close(chosen, scores.amax(1), **close)

    found, want = (one._replace(column=torch.where(valid_texts, one.column, 0)) for one in (found, want))
    got, got_texts = fused.gradient(*given, found, True, blocks)
    theirs, theirs_texts = tiles.gradient(*exact, want, True)
    assert got_texts is not None
    assert theirs_texts is not None
    assert got.dtype == got_texts.dtype == torch.float32
    # Weights of N texts that add up to 2 at most, times unit rows; for texts, times images that are `scale` long.
    torch.testing.assert_close(got.double(), theirs, rtol=0, atol=2e-6 * (scale + 4))
    torch.testing.assert_close(got_texts.double(), theirs_texts, rtol=0, atol=2e-6 * (scale + 4) * scale)
    assert (got[~valid] == 0).all()
    assert (got_texts[~valid_texts] == 0).all()


@settings(max_examples=12, deadline=None)
@given(
    b=st.integers(1, 20),
    before=st.integers(0, 20),
    after=st.integers(0, 20),
    dim=st.integers(1, 19),
    scale=st.floats(0.1, 100),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
    blocks=st.sampled_from(BLOCKS),
    programs=st.sampled_from([1, 9, 256]),
    partial=st.sampled_from([64, 1024, 2**27]),
    layout=st.sampled_from(["plain", "packed", "transposed"]),
)
def any_shape(
    b: int,
    before: int,
    after: int,
    dim: int,
    scale: float,
    dtype: torch.dtype,
    seed: int,
    blocks: fused.BlockSizes,
    programs: int,
    partial: int,
    layout: str,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PROGRAMS", programs)
        patch.setattr(fused, "PARTIAL_BYTES", partial)
        compare(sides(b, before + b + after, before, dim, scale, dtype, seed, layout), scale, blocks)


@pytest.mark.slow
def test_any_shape_gives_what_the_tiles_give(interpreted: Run) -> None:
    interpreted(any_shape)


def shipped_blocks(dtype: torch.dtype) -> None:
    compare(sides(150, 300, 100, 70, 14.3, dtype, 2, "packed"), 14.3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_blocks_of_a_gpu(interpreted: Run, dtype: torch.dtype) -> None:
    interpreted(shipped_blocks, dtype)


def ties(programs: int) -> list[int]:
    x = torch.eye(3).repeat(2, 1)
    texts = torch.zeros(40, 3, dtype=torch.float16)
    texts[[2, 5, 9, 33], 0] = texts[[20, 21], 1] = texts[[7, 39], 2] = 1
    valid_texts = torch.arange(40) != 2
    valid = torch.ones(6, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PROGRAMS", programs)
        return fused.statistics(x, texts, valid, valid_texts, 4, BLOCKS[1]).best.text.tolist()


@pytest.mark.parametrize("programs", [1, 4, 64])
def test_of_equal_scores_the_first_valid_text_is_best(interpreted: Run, programs: int) -> None:
    assert interpreted(ties, programs) == [5, 20, 7, 5, 20, 7]


def losses(dtype: torch.dtype, unlocked: bool, spoilt: bool) -> list[list[Tensor]]:
    """What the loss is worth, and its gradients, by the kernels and by the tiles."""
    found = []
    valid = torch.arange(37) % 5 != 2
    for by_kernels in (True, False):
        noise, text = inputs(37, 11, dtype=torch.float32)
        image = normalize(text + 0.7 * noise.detach()).requires_grad_()
        text = text.masked_fill(~valid[:, None], torch.nan).to(dtype).requires_grad_(unlocked)
        log_scale = log_scale_of(20.0, torch.float32)
        if spoilt:
            image = image.detach().index_fill(0, torch.tensor([3]), torch.nan).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "HALF", BLOCKS[1])
            patch.setattr(fused, "SINGLE", BLOCKS[2])
            if by_kernels:
                patch.setattr(tiles, "statistics", None)
                patch.setattr(kernel_check, "_verified", {image.device})
            got = contrastive_loss(image, text, log_scale, valid, kernel="fused" if by_kernels else "tiles")
        leaves = (image, log_scale, text) if unlocked else (image, log_scale)
        found.append([got.loss.detach(), got.correct, got.pairs, *gradients(got.loss, *leaves)])
    return found


@pytest.mark.parametrize("unlocked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_loss_is_the_same_by_either_way(interpreted: Run, dtype: torch.dtype, unlocked: bool) -> None:
    ours, theirs = interpreted(losses, dtype, unlocked, False)
    for one, other in zip(ours, theirs, strict=True):
        rtol = 1e-3 if one.dtype == torch.float16 else 1e-5  # a gradient that is rounded to fp16 at last
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5)
    assert 5 < ours[1] < ours[2]


def test_nan_in_a_valid_row_is_not_hidden(interpreted: Run) -> None:
    ours, _ = interpreted(losses, torch.float16, False, True)
    assert ours[0].isnan()
    assert ours[3].isnan().any()


def first_use(spoil: float, unlocked: bool) -> list[object]:
    """Losses of two calls by the kernels, whose gradients are wrong by a factor; what the check says, and what it remembers."""
    noise, text = inputs(37, 11, dtype=torch.float32)
    image = normalize(text + 0.7 * noise.detach()).requires_grad_()
    text = text.half().requires_grad_(unlocked)
    true_gradient, checks = fused.gradient, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "HALF", BLOCKS[1])
        patch.setattr(kernel_check, "_verified", set())
        true_errors = kernel_check._relative_errors
        patch.setattr(kernel_check, "_relative_errors", lambda *given: (checks.append(1), true_errors(*given))[1])

        def gradient(*given: Any) -> Any:
            grad, grad_texts = true_gradient(*given)
            return (grad, grad_texts * spoil) if unlocked else (grad * spoil, grad_texts)

        patch.setattr(fused, "gradient", gradient)
        try:
            for _ in range(2):
                contrastive_loss(image, text, log_scale_of(20.0, torch.float32), kernel="fused")
        except kernel_check.KernelMismatch as error:
            return [str(error), len(checks), kernel_check._verified]
        return ["", len(checks), kernel_check._verified]


@pytest.mark.slow
@pytest.mark.parametrize("unlocked", [False, True])
def test_the_first_gradients_are_compared_with_the_tiles(interpreted: Run, unlocked: bool) -> None:
    assert interpreted(first_use, 1.0, unlocked) == ["", 1, {torch.device("cpu")}]
    message, checks, verified = interpreted(first_use, 1.001, unlocked)
    assert "fused gives other numbers than the tiles on cpu" in message
    assert "gradients by 0.001 " in message
    assert (checks, verified) == (1, set())


# Without the interpreter


def test_two_halves_hold_22_bits_and_one_the_11_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, texts = (
        100 * normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0))),
        torch.zeros(1, 768).half(),
    )
    for allowed, parts, bits in (("highest", 2, 22), ("high", 1, 11)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda allowed=allowed: allowed)
        found = fused.split_half(x, texts)
        assert found.dtype == torch.float16
        assert len(found) == parts
        off = (found.double().sum(0) - x).abs()
        assert (off <= 2.0**-bits * x.abs() + 2.0**-25).all()
        assert (off > 2.0 ** (-bits - 2) * x.abs()).any()
    assert fused.split_half(x, texts.float()).data_ptr() == x.data_ptr()
    assert fused.precision() == "tf32"


def test_rows_are_copied_where_threads_could_not_load_16_bytes() -> None:
    rows = torch.zeros(4, 24, dtype=torch.float16)
    assert fused.align(rows[:, :16]).data_ptr() == rows.data_ptr()
    for other in (rows[:, :16].T, torch.zeros(4, 17, dtype=torch.float16)[:, :16]):
        assert fused.align(other).is_contiguous()


@pytest.mark.parametrize(
    ("rows", "columns", "want"),
    [(65536, 65536, (512, 1, 65536)), (1024, 65536, (8, 32, 2048)), (1, 300, (1, 3, 128)), (300, 1, (3, 1, 128))],
)
def test_few_rows_split_the_columns(rows: int, columns: int, want: tuple[int, int, int]) -> None:
    assert fused.split_work(rows, columns, fused.HALF) == want


def test_parts_that_are_summed_are_bounded() -> None:
    for n, row_bytes in ((1_048_576, 4 * 1_048_576 / 128), (65_536, 4 * 768), (1, 1), (4097, 0.1)):
        made = fused.row_chunks(n, fused.HALF, row_bytes)
        assert [one.start for one in made[1:]] == [one.stop for one in made[:-1]]
        assert (made[0].start, made[-1].stop) == (0, n)
        assert max(one.stop - one.start for one in made) * row_bytes <= fused.PARTIAL_BYTES
    assert len(fused.row_chunks(256, fused.HALF, 1e9)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["statistics", "gradient"])
def test_the_kernels_compile_for_gpus_and_fit_them(
    name: str, dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from nev.losses import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    with FakeTensorMode():
        rows = torch.empty(1, device="cuda")
        blocks = fused.choose_blocks(rows, rows.half() if dtype == "fp16" else rows)
    assert blocks == {("fp16", 80): fused.HALF, ("fp16", 90): fused.WIDE}.get((dtype, capability), fused.SINGLE)
    parts = 2 if dtype == "fp16" else 1
    fixed = {"PARTS": parts, "PRECISION": "tf32x3", "BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns}
    fixed |= {"BLOCK_K": blocks.depth, "BLOCK_D": blocks.dims}
    types = {"rows": f"*{dtype}", "columns": f"*{dtype}", "valid_rows": "*u8", "valid_columns": "*u8", "best": "*i32"}
    types |= dict.fromkeys(("row_lse", "pair_score", "best_score", "column_lse", "out"), "*fp32") | dict.fromkeys(
        fixed, "constexpr"
    )
    kernel = getattr(kernels, name)
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    # As Triton finds them at D = 768: addresses and sizes are multiples of 16, so that loads are many bytes and under way early.
    even = {(at,): [["tt.divisibility", 16]] for at, key in enumerate(signature) if key not in fixed and key != "first"}
    source = triton.compiler.ASTSource(kernel, signature, {key: fixed[key] for key in signature if key in fixed}, even)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=blocks.options())
    assert ("mma.sync" if capability == 80 else "wgmma.mma_async") in made.asm["ptx"], "tensor cores"
    assert "cp.async" in made.asm["ptx"]
    assert made.metadata.shared <= GPU_SHARED[capability]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="compares the kernels with the tiles on an NVIDIA GPU; there is none"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 0, 768), (1000, 5000, 1234, 768), (3000, 3000, 0, 385)])
def test_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for seed in (2, 3):
        *tensors, first = sides(*shape, 30.0, dtype, seed, "packed" if seed == 2 else "plain")
        given = (*(tensor.cuda() for tensor in tensors), first)
        assert fused.unsupported_reason(given[0].device) is None
        compare(given, 30.0, rounding=1e-6)  # tensor cores cut sums off, where others round: 4.1e-7 on an H200
        once, again = (fused.statistics(*given) for _ in range(2))
        assert torch.equal(once.row, again.row)
        assert torch.equal(once.column, again.column)
        weights = [fused.gradient(*given, once, False)[0] for _ in range(2)]
        assert torch.equal(*weights)
    assert contrastive.fused is fused
