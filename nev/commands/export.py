"""`nev export`: write a model in the form of another tool."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nev.common.cli import report_errors
from nev.config.model_spec import ModelError

EXAMPLE = "--checkpoint runs/quickstart --format sentence-transformers --output quickstart-st"


def main(
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            help="A run (its best checkpoint), a checkpoint, an exported folder or released weights: a folder, s3://..., or a "
            "name on the hub.",
        ),
    ],
    form: Annotated[
        str, typer.Option("--format", help="hf, sentence-transformers, onnx, mlflow, or nomic (the released layout).")
    ],
    output: Annotated[str, typer.Option("--output", help="A new folder, or s3://BUCKET/PREFIX.")],
    text: Annotated[bool, typer.Option("--text/--no-text", help="Write the text encoder, too.")] = True,
    license: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights for the model card, such as apache-2.0.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", help="Upload the folder to the Hugging Face hub, too: OWNER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")] = False,
    register: Annotated[
        str | None,
        typer.Option(
            "--register", help="With --format mlflow: name under which MLflow's registry takes the model, too."
        ),
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            envvar="MLFLOW_TRACKING_URI",
            help="With --register: MLflow's address, http://HOST:5000 or sqlite:///FILE.",
        ),
    ] = None,
) -> None:
    """Export a model. What was written is opened by its consumer, and its vectors are compared with the model's."""
    with report_errors("Nothing was written."):
        from nev.export.push import check_push
        from nev.export.push import push as push_folder
        from nev.export.registry import check_register
        from nev.export.registry import register as register_folder

        if push:
            check_push(push, private)
        elif private:
            raise ModelError("--private is for --push OWNER/NAME: give both, or neither")
        if register and form != "mlflow":
            raise ModelError(f"--register is for --format mlflow, not {form}")
        registry = check_register(register, tracking_uri) if register else ""
        from nev.export.export import export
        from nev.export.parts import Options
        from nev.inference.load import load

        done = export(load(checkpoint, device="cpu"), form, output, Options(text, license, push))
        console, table = Console(), Table()
        for column in ("opened by", "compared", "difference", "1 - cosine"):
            table.add_column(column)
        for check in done.checks:
            table.add_row(check.consumer, check.what, f"{check.difference:.1e}", f"{check.gap:.1e}")
        console.print(table)
        for check in done.checks:
            if check.left_out:
                console.print(f"left out    {check}", highlight=False, soft_wrap=True, markup=False)
        size = f"{done.bytes / 2**20:,.1f} MiB, {done.seconds:.0f} s"
        console.print(f"{form:<11} {done.location} ({size})", highlight=False, soft_wrap=True, markup=False)
    if push:
        with report_errors(f"{done.location} is written, and not pushed."):
            url = push_folder(done.location, push, private)
            console.print(f"{'pushed':<11} {url}", highlight=False, soft_wrap=True, markup=False)
    if register:
        with report_errors(f"{done.location} is written, and not registered."):
            model = register_folder(done.location, register, registry)
            console.print(f"{'registered':<11} {model}", highlight=False, soft_wrap=True, markup=False)
