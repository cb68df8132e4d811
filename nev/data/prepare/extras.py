"""The files beside the folder of a split: classes.txt, which all splits share, and the contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nev.config.data import Limits
from nev.data import labels
from nev.data.prepare.contact_sheet import draw_contact_sheet
from nev.data.prepare.job_state import Record
from nev.data.rows import Row
from nev.data.sources.common import parent_folder
from nev.storage.files import join, write_atomic
from nev.storage.reading import write_errors_as_data_errors


def write_classes(output: str, plan: Record, note: Callable[[str], None], extend: bool = False) -> str | None:
    """Write classes.txt. Returns its location; None where there is none.

    plan: as `nev.data.prepare.order.merge_keys` makes it.
    extend: names of labels behind those of an existing classes.txt are added to it; else they are an error.
    """
    classes = join(parent_folder(output), "classes.txt")
    class_names = labels.read_class_names(classes)
    if class_names and extend and plan["names"][: len(class_names.names)] == class_names.names:
        class_names = None
    if class_names:  # another split may have written the file in the meantime
        for label, class_name, uid in plan["named"]:
            labels.add_name({}, label, class_name, uid, class_names)
    exists = class_names is not None
    if plan["names"] and not exists:
        with write_errors_as_data_errors(classes):
            write_atomic(classes, "".join(f"{name}\n" for name in plan["names"]).encode())
        exists = True
    if plan["labelled"] and not exists:
        note(
            f"{classes} is not written: the rows that were written do not name every label from 0 to the highest. "
            "Scoring by class needs that file: one name a line, in the order of the labels."
        )
    return classes if plan["labelled"] and exists else None


def write_contact_sheet(output: str, rows: Sequence[Row], limits: Limits) -> str:
    """Write the contact sheet of some rows. Returns its location."""
    samples = join(parent_folder(output), f"{output.rpartition('/')[2]}-samples.png")
    sheet = draw_contact_sheet(rows, limits)
    with write_errors_as_data_errors(samples):
        write_atomic(samples, sheet)
    return samples
