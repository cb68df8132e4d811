"""Every check before training starts, so that an error costs seconds. All problems are reported at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nev.cluster.session import may_grow
from nev.common.errors import ErrorCollector
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.model import refuse_widths
from nev.config.paths import with_absolute_paths
from nev.data.augment import auto_augment
from nev.data.block_plan import BlockPlan
from nev.data.image_sidecar import ONLINE, TrunkFacts, check_image_sidecars, read_statistics
from nev.data.index import Index, build_index
from nev.data.mixture_reader import Reader
from nev.data.tars import split_root
from nev.data.text_sidecar import check_sidecars
from nev.eval.validation.task import Validation, make_validation, refuse_unknown_metric, text_key
from nev.planner.hardware import Prices, load_prices
from nev.runs.folder import check_output, run_folder
from nev.runs.manifest import latest_valid, list_steps
from nev.runs.metrics_log import load_mlflow_run_id
from nev.runs.tracking import tracking_uri
from nev.runs.tracking_check import check_tracking
from nev.storage.files import filesystem, is_local
from nev.train.core.schedule import check_schedule
from nev.train.driver.resources import check_disk, check_window_memory, check_workers, machine_memory
from nev.train.driver.same_run import choose_checkpoint
from nev.train.driver.setup import (
    Inputs,
    make_job,
    make_plan,
    make_reader,
    make_tokenizer,
    total_steps,
    training_features,
)
from nev.train.job import Job, ResumePoint, make_resume_point

if TYPE_CHECKING:
    from nev.models.text import TextTower


class Prepared(NamedTuple):
    """A run that has passed every check that needs no Ray.

    job: what every worker receives.
    reader: reads the blocks of the training sets.
    indexes: the row groups of each training set.
    text: the text tower, on the driver's CPU.
    resume: the point from which training continues.
    former_steps: as `same_run.Continued` has it.
    damaged: the damage of each checkpoint newer than that point.
    steps: the steps of all checkpoints, the damaged ones included, before they were verified.
    prices: of nodes, for Ray's metrics; None without `tracking.prices`.
    """

    job: Job
    reader: Reader
    indexes: list[Index]
    text: TextTower
    resume: ResumePoint
    former_steps: int | None
    damaged: list[str]
    steps: list[int]
    prices: Prices | None


def sets_are_there(config: Experiment) -> bool:
    """Whether `data.train` and `data.val` are folders, as far as one sees without storage. `prepare` says what is wrong."""
    places = [filesystem(split_root(location)[0]) for location, _ in config.data.sets]
    return all(fs.isdir(path) for fs, path in places if is_local(fs))


def prepare(config: Experiment, stop_after: int | None = None) -> Prepared:
    """Check everything that a run needs, and read what the driver hands on.

    stop_after: a step before the run's end at which this start ends.
    Raises the problem itself where there is one alone (ConfigError, DataError, CheckpointError), NotReady for several.
    """
    if config.train.steps:  # the config alone says so: before anything is loaded
        check_schedule(config.train.steps, config.optim)
    from nev.models.text import load_text

    config = with_absolute_paths(config)
    errors, text, prices = ErrorCollector(), None, None
    with errors:
        check_output(config)
    with errors:
        uri = tracking_uri(config.tracking, config.output)
        check_tracking(uri, config.tracking.experiment, load_mlflow_run_id(run_folder(config)))
    reachable = not errors
    with errors:
        text = load_text(config.text)
    with errors:
        check_workers(config.workers)
    with errors:
        prices = load_prices(config.tracking.prices)[1] if config.tracking.prices else None
    if text is None:
        errors.refuse()
    assert text
    with errors:
        check_disk(config, text, reachable)
    inputs = check_inputs(config, text, errors)
    return Prepared(
        job=make_job(config, text, inputs, stop_after),
        reader=make_reader(config, text, inputs.indexes, inputs.trunk),
        indexes=inputs.indexes,
        text=text,
        resume=make_resume_point(inputs.checkpoint.manifest) if inputs.checkpoint else ResumePoint(),
        former_steps=inputs.former_steps,
        damaged=inputs.checkpoint.damaged if inputs.checkpoint else [],
        steps=inputs.steps,
        prices=prices,
    )


def check_inputs(config: Experiment, text: TextTower, errors: ErrorCollector | None = None) -> Inputs:
    """Check the data, the towers, the validation and the run's checkpoints, and return what was read.

    config: with absolute paths.
    errors: the problems so far; they are raised with the problems that are found here, as by `prepare`.
    """
    from nev.models.vision import check_vision

    errors = ErrorCollector() if errors is None else errors
    checkpoint = training = validation = trunk = statistics = start = None
    head_given = False
    steps: list[int] = []
    if not errors:  # an output that was refused would be reported again
        with errors:
            steps, checkpoint = list_steps(run_folder(config)), latest_valid(run_folder(config))
    with errors:
        if config.data.augment and config.data.augment.auto:
            auto_augment(config.data.augment.auto, config.data.image_size)
    with errors:
        refuse_widths(config.loss, text.width)
    with errors:
        if config.vision.lock:
            trunk = check_trunk(config, text.width)
            head_given = checkpoint is None and not config.train.from_ and brings_head(config, trunk, text.width)
        elif checkpoint is None:  # a run that continues needs no source of weights
            replaced = config.vision.model_copy(update={"pretrained": False, "weights": None})
            vision = replaced if config.train.from_ else config.vision
            locked = config.lock == "image" and not config.train.from_
            check_vision(vision, config.data.image_size, text.width, locked)
    with errors:
        if checkpoint is None and config.train.from_ and bool(config.vision.lock) == bool(trunk):
            from nev.train.start_weights import find_start

            start = find_start(config, text, trunk)
    with errors:
        training = check_training_sets(config, text)
    with errors:
        if trunk and training:
            statistics, *_ = [check_features(config, trunk, index) for index in training[0]]  # several sets have none
    with errors:
        check_tokens(config, text)
    with errors:
        validation = check_validation(config, text, trunk)
    errors.refuse()
    assert training
    indexes, plan = training
    if not config.vision.from_sidecars:  # features are much smaller than the pictures
        check_window_memory(indexes, plan)
    check_schedule(total_steps(config, plan), config.optim)
    check_profile(config, total_steps(config, plan))
    fingerprints = data_fingerprints(config, indexes) | {"plan": plan.fingerprint, "text": text.fingerprint}
    if trunk:
        fingerprints["trunk"] = trunk.fingerprint
    if start:
        fingerprints["start"] = start.digest
    former_steps = None
    if checkpoint:
        checkpoint, former_steps = choose_checkpoint(config, plan, fingerprints, checkpoint, run_folder(config))
        fingerprints = checkpoint.manifest["fingerprints"] | fingerprints
    return Inputs(
        indexes, plan, fingerprints, trunk, statistics, start, head_given, validation, checkpoint, former_steps, steps
    )


def check_profile(config: Experiment, total: int) -> None:
    """Raise ConfigError for a profiled step behind the run's last step."""
    profile = config.train.profile
    if profile and profile.steps[-1] > total:
        raise ConfigError(f"train.profile.steps has step {profile.steps[-1]}, and the run ends with step {total}")


def check_trunk(config: Experiment, text_width: int) -> TrunkFacts:
    """Load the locked trunk once. Raises ConfigError for a trunk, or for layers behind it, that cannot be built here."""
    from nev.models.frozen import check_head_memory, load_frozen_trunk

    trunk = load_frozen_trunk(config.vision, config.data.image_size)
    if not may_grow():
        check_head_memory(config.vision, config.data.image_size, trunk.shape, text_width, machine_memory())
    return TrunkFacts(trunk.fingerprint, trunk.shape)


def brings_head(config: Experiment, trunk: TrunkFacts, text_width: int) -> bool:
    """Whether `vision.weights` holds a whole tower whose head fits behind the locked trunk."""
    from nev.models.frozen import read_head_weights

    return read_head_weights(config.vision, config.data.image_size, trunk.shape, text_width) is not None


def check_features(config: Experiment, trunk: TrunkFacts, index: Index) -> NDArray[np.float32] | None:
    """Check the image sidecars of the training set. Returns the statistics of the features, where these are standardised.

    Raises DataError for sidecars that are absent or do not fit.
    """
    if not (config.vision.from_sidecars or config.vision.standardise):
        return None
    otherwise = (
        ONLINE if config.vision.from_sidecars else "set vision.standardise=false, which needs no statistics of them"
    )
    metadata = check_image_sidecars(index, training_features(config, index, trunk), otherwise=otherwise)
    return read_statistics(metadata) if config.vision.standardise else None


def check_training_sets(config: Experiment, text: TextTower) -> tuple[list[Index], BlockPlan]:
    """Index and plan the training sets. Raises DataError for a set, or sidecars of it, that cannot be used."""
    indexes = [build_index(*data_set) for data_set in config.data.train_sets]
    plan = make_plan(config, indexes)
    if not config.text_online:
        for index in indexes:
            check_sidecars(index, text_key(index, text), text.width)
    return indexes, plan


def data_fingerprints(config: Experiment, indexes: Sequence[Index]) -> dict[str, str]:
    """What names the training data: `data`, and for a mixture `data_1` and so on, with the columns that are read."""
    if not config.data.set_names:
        return {"data": indexes[0].fingerprint}
    sets = {f"data_{number}": hash_set(index) for number, index in enumerate(indexes, 1)}
    return sets | {"data": hashlib.sha256(" ".join(sets.values()).encode()).hexdigest()}


def hash_set(index: Index) -> str:
    """The fingerprint of a set of a mixture: its content, and which columns are read. sha256, hex."""
    return hashlib.sha256(f"{index.fingerprint} {index.columns.model_dump_json()}".encode()).hexdigest()


def check_tokens(config: Experiment, text: TextTower) -> None:
    """Raise ConfigError where the text tower in the loop gives other vectors than its library does."""
    if config.text_online:
        from nev.models.lock import refuse_other_vectors

        refuse_other_vectors(text, make_tokenizer(text))


def check_validation(config: Experiment, text: TextTower, trunk: TrunkFacts | None) -> Validation | None:
    """The run's validation. Raises DataError for a set that cannot be used, ConfigError for an unknown `eval.best`."""
    validation = make_validation(config, text, trunk) if config.data.val else None
    if config.eval.best:
        refuse_unknown_metric(config.eval.best, "eval.best", validation)
    return validation
