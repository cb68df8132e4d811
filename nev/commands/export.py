"""`nev export`: write a model in the form of another tool."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from nev.common.cli import Revision, TextEncoder, TrustRemoteCode, report_errors
from nev.config.model_spec import ModelError

if TYPE_CHECKING:
    from nev.export.export import Exported

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the hub names licences
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
    text_encoder: TextEncoder = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
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
        registry = check_options(form, output, text, license, push, private, register, tracking_uri)
        from nev.export.export import export
        from nev.export.parts import Options
        from nev.inference.load import load

        model = load(
            checkpoint, device="cpu", text=text_encoder, revision=revision, trust_remote_code=trust_remote_code
        )
        exported = export(model, form, output, Options(text, license, push))
    show(form, exported)
    if push:
        with report_errors(f"{output} is written, and not pushed."):
            from nev.export.push import push as push_folder

            print_line("pushed", push_folder(output, push, private))
    if register:
        with report_errors(f"{output} is written, and not registered."):
            from nev.export.registry import register as register_folder

            print_line("registered", register_folder(output, register, registry))


def check_options(
    form: str,
    output: str,
    text: bool,
    license: str | None,
    push: str | None,
    private: bool,
    register: str | None,
    tracking_uri: str | None,
) -> str:
    """Check what can be checked before a model is opened. Returns the address of the registry, or "" for none."""
    from nev.export.formats import check_export

    check_export(form, output, text)
    if license and not LICENSE.fullmatch(license):
        raise ModelError(
            f"--license {license!r}: the hub takes an identifier such as apache-2.0, mit, cc-by-4.0 or other"
        )
    if push:
        from nev.export.push import check_push

        check_push(push, private)
    elif private:
        raise ModelError("--private is for --push OWNER/NAME: give both, or neither")
    if not register:
        return ""
    if form != "mlflow":
        raise ModelError(f"--register is for --format mlflow, not {form}")
    from nev.export.registry import check_register

    return check_register(register, tracking_uri)


def show(form: str, exported: Exported) -> None:
    """Print the comparisons, and where the folder lies."""
    table = Table()
    for column in ("opened by", "compared", "difference", "1 - cosine"):
        table.add_column(column)
    for check in exported.checks:
        table.add_row(check.consumer, check.what, f"{check.difference:.1e}", f"{check.gap:.1e}")
    Console().print(table)
    for check in exported.checks:
        if check.left_out:
            print_line("left out", str(check))
    print_line(form, f"{exported.location} ({exported.bytes / 2**20:,.1f} MiB, {exported.seconds:.0f} s)")


def print_line(what: str, value: str) -> None:
    """Print one line of the summary."""
    Console().print(f"{what:<11} {value}", highlight=False, soft_wrap=True, markup=False)
