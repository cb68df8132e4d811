"""Is a trunk worth it? How well a linear head aligns locked trunks with a text encoder, on a sample of the user's own pairs.

Alignment probing is SAIL's (arXiv 2412.04616); the mutual k-nearest-neighbour alignment beside it is that of the Platonic
Representation Hypothesis (Huh et al. 2024, arXiv 2405.07987). Each trunk embeds the sample once, on Ray; the head is trained in
this process, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from nev.cluster.ray_internals import first_cause
from nev.cluster.session import connect
from nev.common.errors import NevError
from nev.common.progress import ProgressCallback, progress
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.paths import refuse_lost_output, with_absolute_paths
from nev.data.index import build_index
from nev.data.sample import SampleReader, draw_rows, make_sample_reader, read_caption_vectors, read_captions
from nev.data.text_sidecar import sidecar_key
from nev.eval.metrics.intervals import interval
from nev.eval.metrics.neighbours import mutual_knn, mutual_knn_chance
from nev.eval.metrics.ranks import Floats, Ints
from nev.eval.metrics.retrieval import recalls, retrieval_ranks
from nev.eval.report.alignment_probe import MUTUAL_KNN, ProbeResult, TrunkResult, draw_probe
from nev.eval.suite.vectors import Pairs, Texts
from nev.eval.trunk_features import SampledSet, Shown, embed_sets, load_trunk
from nev.models.trunk_spec import TrunkSpec, parse_trunks
from nev.storage.files import join, output_folder, storage_errors_as
from nev.storage.reading import DataError

if TYPE_CHECKING:
    from nev.models.text import TextTower

SAMPLE, SCORED_SHARE = 5000, 5  # pictures to fit on; one picture is scored for so many
KS, K = (1, 5, 10), 10  # of the recall; neighbours of the mutual kNN
LEAST_FITTED, LEAST_SCORED = 20, K + 1
NAME = "alignment-probe"


def probe_alignment(
    config: Experiment, trunks: Sequence[str], console: Console, sample: int = SAMPLE, output: str | None = None
) -> tuple[ProbeResult, list[str]]:
    """Probe trunks, one after another; write alignment-probe.json and .png.

    config: text encoder, data, and size, mean and deviation of the pictures of a trunk that does not say its own.
    trunks: as `nev.models.trunk_spec.parse_trunk` reads these.
    sample: pictures of `data.train` to fit on; a fifth as many are scored, of `data.val` if there is one.
    output: folder or S3 prefix; by default alignment-probe-NAME/ in `config.output`.
    A trunk that fails has its reason in the result. Where all trunks fail, nothing is written.
    Returns the result and the locations of the files. Raises ConfigError for trunks in another form and for too small a set;
    DataError for shards that cannot be used.
    """
    specs = parse_trunks(trunks)
    config = with_absolute_paths(config)
    output = output or join(config.output, f"{NAME}-{config.name}")
    refuse_lost_output(output)
    fit, score = draw_samples(config, sample)
    describe_sample(fit, score, sample, console)
    from nev.models.text import load_text

    text = load_text(config.text)
    with progress(console) as update:
        sets = [SampledSet(reader, embed_captions(reader, text, update)) for reader in (fit, score)]
        connect()
        results = [
            probe_trunk(spec, config, sets, Shown(update, place, len(specs))) for place, spec in enumerate(specs)
        ]
    result = ProbeResult(
        experiment=config.name,
        text=config.text.encoder,
        fitted_on=fit.index.root,
        scored_on=score.index.root,
        seed=config.seed,
        k=K,
        trunks=tuple(results),
    )
    if not result.ranked():
        return result, []
    with storage_errors_as(output, "written"), output_folder(output) as folder:
        (folder / f"{NAME}.json").write_text(result.model_dump_json(indent=1), encoding="utf-8")
        draw_probe(folder / f"{NAME}.png", result)
    return result, [join(output, f"{NAME}.{kind}") for kind in ("json", "png")]


def draw_samples(config: Experiment, sample: int) -> tuple[SampleReader, SampleReader]:
    """The rows to fit on and the rows to score, without a common row: readers of both.

    Scored rows are drawn of `data.val`; without one, or where both are the same set, of the rows of `data.train` that are left.
    Raises ConfigError where there are fewer than 20 rows to fit on, or 11 to score.
    """
    data, wanted = config.data, sample // SCORED_SHARE
    train = build_index(*data.only_set("an alignment probe"))
    val = build_index(data.val, data.columns) if data.val else train
    if val.fingerprint != train.fingerprint:
        fitted = draw_rows(train.rows, sample, config.seed)
        scored = draw_rows(val.rows, wanted, config.seed)
    else:
        rows = draw_rows(train.rows, sample + wanted, config.seed)
        wanted = min(wanted, len(rows) // (SCORED_SHARE + 1))
        scored, fitted = rows[:wanted], rows[wanted:]
    if len(fitted) < LEAST_FITTED or len(scored) < LEAST_SCORED:
        raise ConfigError(
            f"{len(fitted)} pictures to fit on and {len(scored)} to score: an alignment probe needs at least {LEAST_FITTED} and "
            f"{LEAST_SCORED}. Give more data, or a larger --sample."
        )
    return make_sample_reader(train, fitted, data), make_sample_reader(val, scored, data)


def describe_sample(fit: SampleReader, score: SampleReader, sample: int, console: Console) -> None:
    """Print how many pictures there are, and whether the sets have fewer than was asked for."""
    fewer = fit.total < sample or score.total < sample // SCORED_SHARE
    note = f" (the set has no more for {sample:,} + {sample // SCORED_SHARE:,})" if fewer else ""
    apart = "" if score.index.root != fit.index.root else ", which the fit does not see"
    text = f"{fit.total:,} pictures of {fit.index.root} to fit on, {score.total:,} of {score.index.root} to score{apart}{note}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def embed_captions(reader: SampleReader, text: TextTower, update: ProgressCallback) -> Texts:
    """The vectors of a sample's captions: from the text sidecars, or embedded now where these are absent or do not fit."""
    try:
        key = sidecar_key(text.fingerprint, str(reader.index.columns.caption))
        return Texts(None, *read_caption_vectors(reader, key, text.width))
    except DataError:
        captions = read_captions(reader)
    owner = np.repeat(np.arange(len(captions)), [len(of_row) for of_row in captions])
    sentences = [caption for of_row in captions for caption in of_row]

    def show(done: int) -> None:
        update("captions embedded", done, len(sentences), f"{reader.index.root}: no text sidecars that fit")

    return Texts(None, text.encode(sentences, on_progress=show), owner)


def probe_trunk(spec: TrunkSpec, config: Experiment, sets: Sequence[SampledSet], shown: Shown) -> TrunkResult:
    """Embed, fit and score with one trunk. sets: to fit on, and to score. A trunk that fails has a result with the reason."""
    from ray.exceptions import RayError

    begin = time.perf_counter()
    try:
        own, trunk = load_trunk(spec, config)
        fitted, scored, bad = embed_sets(spec, own, trunk, sets, shown)
        result = score_features(spec.label, fitted, scored, config.seed)
    except (
        RayError
    ) as error:  # a process of the cluster has died, or could not load the trunk; Ray adds lines of advice
        cause = getattr(error, "cause", None) or error
        return TrunkResult(trunk=spec.label, reason=first_cause(cause).splitlines()[0])
    except NevError as error:
        return TrunkResult(trunk=spec.label, reason=str(error))
    seconds = time.perf_counter() - begin
    about = {
        "pool": own.vision.pool,
        "image_size": trunk.image_size,
        "mean": own.data.mean,
        "std": own.data.std,
        "bad": dict(bad),
        "pictures_per_second": shown.pace() or (len(fitted.images) + len(scored.images)) / seconds,
        "seconds": seconds,
    }
    return result.model_copy(update=about)


def score_features(label: str, fitted: Pairs, scored: Pairs, seed: int) -> TrunkResult:
    """Fit a linear head on some pairs and score it on others. Pairs: images, float32 [n, F], are features of a trunk.

    Raises ConfigError where too few pairs are left, or a row of features is zero.
    """
    from nev.eval.linear_probe import fit_linear_probe, project

    try:
        probe = fit_linear_probe(fitted.images, fitted.texts, fitted.owner, seed)
        vectors = project(probe.head, scored.images)
        metrics = score_vectors(vectors, scored.texts, scored.owner)
        metrics[MUTUAL_KNN] = mutual_knn(scored.images, mean_by_owner(scored.texts, scored.owner), K)
    except ValueError as error:
        raise ConfigError(f"not scored: {error}") from error
    metrics[f"{MUTUAL_KNN}_chance"] = mutual_knn_chance(len(scored.images), K)
    return TrunkResult(
        trunk=label,
        width=scored.images.shape[1],
        fitted=len(fitted.images),
        scored=len(scored.images),
        learning_rate=probe.learning_rate,
        steps=probe.steps,
        metrics=metrics,
    )


def score_vectors(images: Floats, texts: Floats, owner: Ints) -> dict[str, float]:
    """Recall both ways with the ends of 95 % intervals and chance: `text_to_image_r10`, `..._low`, `..._high`, `..._chance`."""
    ranks = retrieval_ranks(images, texts, owner)
    metrics = {
        name.removeprefix("retrieval/").replace("/", "_"): value for name, value in recalls(ranks, owner, KS).items()
    }
    for k in KS:
        ends = {"text_to_image": interval(ranks.texts < k, owner), "image_to_text": interval(ranks.images < k)}
        for way, (low, high) in ends.items():
            metrics |= {f"{way}_r{k}_low": low, f"{way}_r{k}_high": high}
    return metrics


def mean_by_owner(texts: Floats, owner: Ints) -> Floats:
    """The mean vector of each picture's captions: float32 [n, D]. owner: int64 [m], ascending, without a gap."""
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    return np.asarray(np.add.reduceat(texts, first, axis=0) / np.bincount(owner)[:, None], np.float32)
