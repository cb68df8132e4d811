"""What the driver settles before any process starts: data, plan, locked text, validation. Every error here costs seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from tokenizers import Tokenizer

from nev.common.errors import ErrorCollector
from nev.config.experiment import Experiment, refuse_widths
from nev.config.file import parse
from nev.data.augment import auto_augment
from nev.data.block import BlockReader
from nev.data.index import Index, build_index
from nev.data.plan import Plan
from nev.data.sidecar import check_sidecars, mean_vector
from nev.data.text_view import TextView
from nev.data.tokens import Tokens
from nev.eval.validation.task import make_validation, refuse_unknown_metric, text_key
from nev.runs.folder import run_folder
from nev.runs.manifest import CheckpointError, latest_checkpoint, latest_valid, read_manifest, verify
from nev.train.job import Job

if TYPE_CHECKING:
    from nev.models.text import TextTower
    from nev.train.job import Job


# A run may go on with these changed: they do not touch what is computed.
FREE_TO_CHANGE = (
    *(
        "output",
        "workers",
        "tracking",
        "eval",
        "guards",
        "text.encoder",
        "data.train",
        "data.val",
        "data.max_bad_share",
    ),
    *(
        "train.micro_batch",
        "train.activation_checkpointing",
        "train.compile",
        "train.fsdp",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_last",
        "train.eval_every",
    ),
)


def prepare_job(
    config: Experiment, text: TextTower, stop_after: int | None = None, findings: ErrorCollector | None = None
) -> Job:
    """Index the data, plan it, check sidecars and embed class prompts (online text has neither), check the run to continue.

    `config` has absolute paths. Raises what it finds, with what `findings` holds already: DataError, ConfigError or
    CheckpointError, each saying what to do, or NotReady for several.
    """
    from nev.models.lock import embed_canaries
    from nev.models.vision import check_vision

    found = findings or ErrorCollector()
    with found:
        if config.data.augment.auto:  # an unknown name is an error now, not in a worker
            auto_augment(config.data.augment.auto, config.data.image_size)
    with found:
        refuse_widths(config.loss, text.width)
    with found:
        if found or latest_checkpoint(run_folder(config)) is None:  # a run that goes on needs neither hub nor file
            check_vision(config.vision, config.data.image_size, text.width, locked=config.lock == "image")
    with found:
        index = build_index(config.data.train, config.data.columns)
        plan = Plan(
            used_rows(index, config.data.used_rows), config.seed, config.train.global_batch, config.data.block_rows
        )
        if not config.text_online:
            check_sidecars(index, text_key(index, text), text.width)
    with found:
        if config.text_online:
            from nev.models.lock import refuse_other_vectors

            refuse_other_vectors(text, make_tokens(text))
    with found:
        validation = make_validation(config, text) if config.data.val else None
        if config.eval.best:
            refuse_unknown_metric(config.eval.best, "eval.best", validation)
    found.refuse()
    total = total_steps(config, plan)
    job = Job(
        config=config,
        run=run_folder(config),
        plan=plan,
        shards=index.paths,
        text_width=text.width,
        total_steps=total,
        stop_step=min(total, stop_after or total),
        validation=validation,
        fingerprints={"data": index.fingerprint, "plan": plan.fingerprint, "text": text.fingerprint},
        canaries=None if config.lock == "text" else embed_canaries(text),
    )
    refuse_other_run(job)
    return job


def train_reader(config: Experiment, text: TextTower) -> BlockReader:
    """The reader of training blocks (its index costs a listing: this machine may have the footers cached)."""
    index = build_index(config.data.train, config.data.columns)
    mean = mean_vector(index, text_key(index, text), text.width) if config.text.center else None
    return BlockReader(
        index=index,
        image_size=config.data.image_size,
        limits=config.data.limits,
        seed=config.seed,
        augment=config.data.augment,
        text_key=None if config.text_online else text_key(index, text),
        text_width=text.width,
        tokens=make_tokens(text) if config.text_online else None,
        text_view=TextView(config.data.permuted_captions, mean, config.text.noise),
    )


def used_rows(index: Index, share: float) -> NDArray[np.int64]:
    """The rows of each row group that a run uses: int64 [G]."""
    return index.rows if share == 1 else np.floor(index.rows * share).astype(np.int64)


def total_steps(config: Experiment, plan: Plan) -> int:
    """The run's length in steps, from whichever of epochs, steps and samples is given (samples round up)."""
    train = config.train
    if train.epochs is not None:
        return train.epochs * plan.steps_per_epoch
    if train.steps is not None:
        return train.steps
    assert train.samples is not None
    return -(-train.samples // train.global_batch)


def refuse_other_run(job: Job) -> None:
    """A run continues its own checkpoints alone. Raises CheckpointError listing every key that differs."""
    found = latest_valid(job.run, read_manifest)
    if found is None:
        return
    newest, manifest = found.location, found.read
    differing = [
        f"fingerprint of the {name}: {manifest['fingerprints'].get(name, 'none')[:12]} there, {value[:12]} here"
        for name, value in job.fingerprints.items()
        if manifest["fingerprints"].get(name) != value
    ]
    began = parse(
        Experiment, manifest["config"], [], where=newest
    )  # with the defaults of settings that it did not know
    here, there = _leaves(job.config.model_dump(mode="json")), _leaves(began.model_dump(mode="json"))
    differing += [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if differing:
        listed = "\n  ".join(differing)
        raise CheckpointError(
            f"{newest} belongs to another experiment:\n  {listed}\n"
            "Give this one another name (name=...), or remove that folder to start over."
        )


def _leaves(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: leaf for name, child in tree.items() for key, leaf in _leaves(child, f"{prefix}{name}.").items()}


def make_tokens(tower: TextTower) -> Tokens:
    """How a tower reads sentences, as something that travels to a task (transformers is not imported there)."""
    tokenizer = Tokenizer.from_str(tower.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(tower.max_tokens, direction=tower.tokenizer.truncation_side)
    return Tokens(tokenizer, tower.prefix, tower.max_tokens)


def report_resume(job: Job, console: Console) -> int:
    """Tell what lies before a run, and what of it is damaged. Returns the step that it goes on from, 0 for a new one."""
    found = latest_valid(job.run, verify)
    for damage in found.damaged if found else []:
        console.print(f"[yellow]{escape(damage)}; the one before it is used[/]", highlight=False, soft_wrap=True)
    begun: int = found.read["step"] if found else 0
    console.print(describe_run(job, begun))
    return begun


def describe_run(job: Job, begun: int) -> str:
    """What lies before a run, in a line."""
    plan = job.plan
    steps = f"steps {begun:,} to {job.stop_step:,}" if begun else f"{job.stop_step:,} steps"
    left = f", {plan.tail_rows:,} rows left over" if plan.tail_rows else ""
    trained = {"text": "", "image": ", the text tower alone is trained", "none": ", both towers are trained"}[
        job.config.lock
    ]
    return (
        f"{job.config.name}: {plan.total_rows:,} rows, {plan.steps_per_epoch:,} steps an epoch{left}; {steps}{trained}"
    )
