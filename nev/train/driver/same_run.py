"""Whether a checkpoint belongs to the run that is started, and from which checkpoint a prolonged run continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nev.config.experiment import Experiment
from nev.config.file import parse
from nev.data.block_plan import BlockPlan
from nev.runs.manifest import CheckpointError, LatestValid, Unreadable, latest_valid, list_steps
from nev.train.core.schedule import decay_start, first_changed_step
from nev.train.driver.setup import total_steps

# A run may continue with these changed: they do not touch what is computed.
FREE_TO_CHANGE = (
    "output",
    "workers",
    "tracking",
    "eval",
    "guards",
    "text.encoder",
    "data.train",
    "data.val",
    "data.window",  # the fingerprint of the plan says whether the rows are the same
    "data.streams",
    "loss.init_bias",  # a checkpoint has the bias
    "data.max_bad_share",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.compile",
    "train.save_trunk",
    "train.fsdp",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.eval_every",
    "train.profile",
)
# And these, as long as every step that is done had the learning rate that it has now.
SCHEDULE = (
    "train.epochs",
    "train.steps",
    "train.samples",
    "optim.lr",
    "optim.warmup_steps",
    "optim.schedule",
    "optim.decay_steps",
    "optim.final_lr",
)


class Continued(NamedTuple):
    """The checkpoint from which a run continues.

    former_steps: length of the run so far, where that run went on behind this checkpoint with other learning rates; else None.
    """

    checkpoint: LatestValid
    former_steps: int | None


def choose_checkpoint(
    config: Experiment, plan: BlockPlan, fingerprints: Mapping[str, str], newest: LatestValid, run: str
) -> Continued:
    """Choose the checkpoint from which the run of `config` continues: the newest, or for a prolonged run the newest that fits.

    A longer run continues exactly from a step before which both schedules agree, such as the beginning of the decay of `wsd`.
    newest: the newest valid checkpoint. run: the folder of the run.
    Raises CheckpointError, with every difference and the ways out, where none fits.
    """
    before = parse(Experiment, newest.manifest["config"], [], where=newest.location)
    # A locked trunk is known by its fingerprint, wherever its weights are.
    free = (*FREE_TO_CHANGE, "vision.weights", "vision.pretrained") if config.vision.lock else FREE_TO_CHANGE
    changed = list_changes(before, config, free)
    others = [line for key, line in changed.items() if key not in SCHEDULE]
    others += [
        f"fingerprint of the {name}: {newest.manifest['fingerprints'].get(name, 'none')[:12]} there, {value[:12]} here"
        + (_describe_window(newest.manifest["config"], config) if name == "plan" else "")
        for name, value in fingerprints.items()
        if newest.manifest["fingerprints"].get(name) != value
    ]
    if not changed and not others:
        return Continued(newest, None)
    missing = ""
    if not others:
        former, steps = total_steps(before, plan), total_steps(config, plan)
        apart = first_changed_step(newest.manifest["step"], (former, before.optim), (steps, config.optim))
        if apart is None:
            # Damaged checkpoints of later steps, and their metrics, belong to the former end.
            return Continued(newest, former if list_steps(run)[-1] > newest.manifest["step"] else None)
        if steps > former and before.optim.schedule != "cosine":
            if earlier := _latest_up_to(run, apart):
                return Continued(earlier, former)
            missing = f" Its checkpoint of step {decay_start(former, before.optim)}, where its decay begins, is absent."
    listed = "\n  ".join([*others, *(line for key, line in changed.items() if key in SCHEDULE)])
    raise CheckpointError(
        f"{newest.location} belongs to another experiment:\n  {listed}\n"
        "Give this one another name (name=...), or remove that folder to start over. A new run begins from the weights of that "
        f"checkpoint with train.from={newest.location}. A run can be made longer, not shorter, and only with "
        "optim.schedule: constant or wsd."
        f"{missing}"
    )


def _describe_window(before: dict[str, Any], now: Experiment) -> str:
    """What the windows of a run have to do with another plan. before: the config of the run, as its manifest has it."""
    if "window" not in before["data"]:
        return "" if now.data.window == 0 else " (that run has no windows: it continues with data.window=0)"
    there, here = ("null" if window is None else window for window in (before["data"]["window"], now.data.window))
    return f" (data.window: {there} there, {here} here)" if there != here else ""


def _latest_up_to(run: str, step: int) -> LatestValid | None:
    """The newest valid checkpoint up to a step; None where all are damaged, too."""
    try:
        return latest_valid(run, up_to=step)
    except Unreadable:
        raise
    except CheckpointError:
        return None


def list_changes(before: Experiment, now: Experiment, free: tuple[str, ...]) -> dict[str, str]:
    """The settings that differ, by dotted key, each with a line that says how. free: beginnings of keys that do not count."""
    here, there = _leaves(now.model_dump(mode="json")), _leaves(before.model_dump(mode="json"))
    return {
        key: f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and not key.startswith(free)
    }


def _leaves(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: leaf for name, child in tree.items() for key, leaf in _leaves(child, f"{prefix}{name}.").items()}
