"""From checked inputs to what a run is made of: the workers' job, the reader of the training set, the length in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nev.common.words import counted
from nev.config.experiment import Experiment
from nev.data.ablation import change_texts, count_used_rows
from nev.data.block import BlockReader
from nev.data.block_plan import BlockPlan
from nev.data.image_sidecar import Features, TrunkFacts, image_recipe
from nev.data.index import Index
from nev.data.mixture import MixturePlan, make_mixture
from nev.data.mixture_reader import Reader, make_mixture_reader
from nev.data.plan import Plan, choose_window
from nev.data.text_sidecar import mean_vector
from nev.data.tokens import CaptionTokenizer
from nev.eval.validation.task import Validation, text_key
from nev.runs.folder import run_folder
from nev.runs.manifest import LatestValid
from nev.storage.reading import DataError
from nev.train.job import Job

if TYPE_CHECKING:
    from nev.models.text import TextTower
    from nev.train.start_weights import StartCheckpoint

TRUNK_LOCKED, HEAD_GIVEN = ", the trunk is locked", ", its head starts from vision.weights"
TRAINED = {"text": "", "image": ", the text tower alone is trained", "none": ", both towers are trained"}  # by `lock`


@dataclass(frozen=True)
class Inputs:
    """What `preflight.check_inputs` has read and checked.

    indexes: the row groups of each training set.
    plan: which blocks each step takes.
    fingerprints: as `Job` has them.
    trunk: a locked trunk; None where the trunk is trained.
    statistics: of the trunk's features, float32 [2, F]; None where they are not standardised.
    start: the checkpoint of `train.from`; None for a run without it, and for a run that continues.
    head_given: as `Job` has it.
    validation: None for a run without a validation set.
    checkpoint: the valid checkpoint from which the run continues, every byte verified, with its manifest; None for a new run.
    former_steps: as `same_run.Continued` has it.
    steps: the steps of all checkpoints, the damaged ones included, before they were verified.
    """

    indexes: list[Index]
    plan: BlockPlan
    fingerprints: dict[str, str]
    trunk: TrunkFacts | None
    statistics: NDArray[np.float32] | None
    start: StartCheckpoint | None
    head_given: bool
    validation: Validation | None
    checkpoint: LatestValid | None
    former_steps: int | None
    steps: list[int]


def make_plan(config: Experiment, indexes: Sequence[Index]) -> BlockPlan:
    """The plan of the training set, or of the mixture. Raises DataError for a set with too few rows."""
    data = config.data
    rows = [count_used_rows(index, data.used_rows) for index in indexes]
    if data.set_names:
        steps = config.train.global_batch, data.block_rows
        factors = data.factors, not data.by_weight
        return make_mixture(rows, *factors, config.seed, *steps, data.window, data.set_names)
    window = choose_window(rows[0], data.block_rows) if data.window is None else data.window
    return Plan(rows[0], config.seed, config.train.global_batch, data.block_rows, window)


def make_job(config: Experiment, text: TextTower, inputs: Inputs, stop_after: int | None = None) -> Job:
    """The job of a run. stop_after: a step before the run's end at which this start ends."""
    from nev.models.lock import embed_canaries
    from nev.train.flops import model_flops

    total = total_steps(config, inputs.plan)
    return Job(
        config=config,
        run=run_folder(config),
        plan=inputs.plan,
        shards=name_shards(config, inputs.indexes),
        set_names=config.data.set_names,
        text_width=text.width,
        total_steps=total,
        stop_step=min(total, stop_after or total),
        validation=inputs.validation,
        fingerprints=inputs.fingerprints,
        features=inputs.trunk.shape if inputs.trunk else None,
        statistics=inputs.statistics,
        start_from=inputs.start.location if inputs.start else None,
        head_given=inputs.head_given,
        canaries=None if config.lock == "text" else embed_canaries(text),
        flops=model_flops(config, text.width),
    )


def name_shards(config: Experiment, indexes: Sequence[Index]) -> tuple[str, ...]:
    """The paths of all shards, relative to their set; with the set's name before them in a mixture."""
    if not config.data.set_names:
        return indexes[0].paths
    named_indexes = zip(config.data.set_names, indexes, strict=True)
    return tuple(f"{name}/{path}" for name, index in named_indexes for path in index.paths)


def make_reader(
    config: Experiment, text: TextTower, indexes: Sequence[Index], trunk: TrunkFacts | None = None
) -> Reader:
    """The reader of training blocks. With `text.center` every sidecar is read once, for the mean vector.

    trunk: a locked trunk; None where the trunk is trained.
    """
    readers = [make_set_reader(config, text, index, trunk) for index in indexes]
    return make_mixture_reader(readers) if config.data.set_names else readers[0]


def make_set_reader(config: Experiment, text: TextTower, index: Index, trunk: TrunkFacts | None) -> BlockReader:
    """The reader of one training set."""
    reader = BlockReader(
        index=index,
        image_size=config.data.image_size,
        limits=config.data.limits,
        seed=config.seed,
        augment=config.data.augment,
        text_key=None if config.text_online else text_key(index, text),
        text_width=text.width,
        tokenizer=make_tokenizer(text) if config.text_online else None,
        features=training_features(config, index, trunk) if trunk and config.vision.from_sidecars else None,
    )
    permuted, noise, center = config.data.permuted_captions, config.text.noise, config.text.center
    if not (permuted or noise or center):
        return reader
    mean = mean_vector(index, text_key(index, text), text.width) if center else None
    return change_texts(reader, permuted, mean, noise)


def training_features(config: Experiment, index: Index, trunk: TrunkFacts) -> Features:
    """What the image sidecars of the training set hold."""
    recipe = image_recipe(trunk.fingerprint, index.columns.image, config.data, config.seed, training=True)
    return Features(recipe, trunk.shape, config.vision.views)


def make_tokenizer(tower: TextTower) -> CaptionTokenizer:
    """The tower's tokenizer in a form that travels to a task, where transformers is not imported."""
    tokenizer = Tokenizer.from_str(tower.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(tower.max_tokens, direction=tower.tokenizer.truncation_side)
    return CaptionTokenizer(tokenizer, tower.prefix, tower.max_tokens)


def total_steps(config: Experiment, plan: BlockPlan) -> int:
    """The run's length in steps, from whichever of epochs, steps and samples is given (samples round up)."""
    train = config.train
    if train.epochs is not None:
        if steps := plan.count_steps(train.epochs):
            return steps
        raise DataError(
            f"data.train has fewer rows in {counted(train.epochs, 'epoch')} than a step: raise train.epochs, or the epochs of a "
            "set, or lower train.global_batch."
        )
    if train.steps is not None:
        return train.steps
    assert train.samples is not None
    return -(-train.samples // train.global_batch)


def describe_run(job: Job, start_step: int, window_bytes: int) -> str:
    """A line on the console: the run's rows and steps, its windows, and which towers are trained.

    window_bytes: of the largest window, as `nev.train.driver.resources.window_bytes` has them.
    """
    plan = job.plan
    steps = f"steps {start_step:,} to {job.stop_step:,}" if start_step else f"{job.stop_step:,} steps"
    left = f", {plan.tail_rows:,} rows left over" if plan.tail_rows else ""
    rows = f"{plan.total_rows:,} rows"
    if isinstance(plan, Plan):
        rows += f", {plan.steps_per_epoch:,} steps an epoch"
    if isinstance(plan, MixturePlan):
        total = sum(plan.shares)
        shares = (f"{name} {share / total:.1%}" for name, share in zip(job.set_names, plan.shares, strict=True))
        rows += f" of {counted(len(plan.shares), 'set')} ({', '.join(shares)})"
    groups = f"{plan.window} row groups" if plan.window > 1 else "a row group"
    windows = f", shuffled in windows of {groups} (up to {window_bytes / 2**20:,.0f} MiB)" if plan.window else ""
    return (
        f"{job.config.name}: {rows}{left}{windows}; "
        f"{steps}{TRAINED[job.config.lock]}{TRUNK_LOCKED if job.features else ''}{HEAD_GIVEN if job.head_given else ''}"
        f"{f', from the weights of {job.start_from}' if job.start_from else ''}"
    )
