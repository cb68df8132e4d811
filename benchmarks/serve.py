"""`nev serve` beside a plain FastAPI endpoint on the same model: requests a second, latencies, CPU, and what overload does.

make bench NAME=serve
python benchmarks/serve.py --seconds 3 --image-seconds 8 --callers 1 --callers 16 --repetitions 1 --overload-seconds 0

Run it on a quiet machine with two cores or more: the server has one, and the callers another.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.contestants.processes import BenchmarkFailed
from nev.common.cli import make_command, report_errors

if TYPE_CHECKING:
    from benchmarks.contestants import load

GOALS = {
    "text_vs_fastapi_c16": 1.3,
    "image_vs_fastapi_c16": 1.2,
    "image_int8_or_bf16_vs_fastapi_c16": 2.0,
    "serve_text_vs_fastapi_c64": 1.0,
}
LIMITS = {
    "serve_overhead_cpu_ms": report.Goal(10, at_most=True),
    "errors": report.Goal(0, at_most=True),
    "nev_ready_s": report.Goal(5, at_most=True),
    "overload_memory_growth_mib": report.Goal(64, at_most=True),
}
NOTES = (
    "The model: ViT-S/16 at 224 px with random weights, and all-MiniLM-L6-v2. A request has one text of 4 to 18 words, or one "
    "JPEG of 500 x 375 pixels as a data URL, and asks for base64. Callers ask again as soon as they have an answer (closed "
    "loop), over connections that stay open, from one process on a core of their own. The server has one core, all of its "
    "processes together.",
    "plain: an endpoint of FastAPI (`def`) that calls `nev.load`'s model for each request, with the same decoding and uvicorn. "
    "nev: `nev serve`, one process, float32. nev_bf16: torch's autocast for pictures. nev_int8: the ONNX export, for pictures. "
    "ray: nev's application in one replica of Ray Serve. infinity: `infinity_emb v2 --engine torch --no-bettertransformer`, for "
    "texts alone: it opens no vision encoder of nev's.",
    "cN: N callers at once. cpu_ms: CPU of the server's processes a request. serve_overhead_cpu_ms: CPU a request of /v1/models, "
    "which embeds nothing, with 16 callers, through Ray Serve less in one process.",
    "ready_s: from a server's imports to its first answer, both towers loaded and run once.",
    "overload: texts at four times the rate of nev with 64 callers. Growth of memory from a tenth of that time to its end.",
    "errors: answers of nev and ray that are neither 200 nor 429, and connections that broke, in all of it.",
)


def main(
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of a measurement of texts.")] = 8.0,
    image_seconds: Annotated[float, typer.Option(min=0.5, help="Length of a measurement of pictures.")] = 20.0,
    callers: Annotated[list[int] | None, typer.Option(min=1, help="Callers at once. Default: 1, 4, 16 and 64.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; every server runs once in each.")] = 3,
    overload_seconds: Annotated[float, typer.Option(min=0, help="Length of the overload; 0 leaves it out.")] = 60.0,
    server: Annotated[list[str] | None, typer.Option(help="One of the servers. May be repeated. Default: all.")] = None,
    results: Annotated[
        Path, typer.Option(help="Folder of serve.json.", show_default="benchmarks/results")
    ] = report.RESULTS,
) -> None:
    """Measure `nev serve`; writes benchmarks/results/serve.json."""
    from benchmarks.contestants import servers
    from benchmarks.contestants.processes import in_own_process

    console, figures, errors = Console(), dict[str, list[float]](), [0]
    at_once = callers or [1, 4, 16, 64]
    cores = sorted(os.sched_getaffinity(0))
    server_core, client_core = cores[0], cores[-1]
    with report_errors(), tempfile.TemporaryDirectory(prefix="nev-bench-") as name:
        if len(cores) / 2 < report.LOAD_AT_START:
            console.print(
                f"[yellow]the machine is busy (load {report.LOAD_AT_START:.1f}): do not keep these figures[/]"
            )
        folder = Path(name)
        with console.status("a model"):
            in_own_process(servers.write_model, folder)
        kinds = [kind for kind in servers.KINDS if not server or kind in server]
        if "infinity" in kinds and not shutil.which(servers.INFINITY):
            console.print(f"infinity is left out: {servers.INFINITY} is not on PATH")
            kinds.remove("infinity")
        for number in range(repetitions):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                run = Run(kind, folder, (server_core, client_core), figures, errors, console)
                run.measure(at_once, seconds, image_seconds, overload_seconds if number == 0 else 0)
        figures["errors"] = [float(errors[0])]
        if {"ray_none_c16_cpu_ms", "nev_none_c16_cpu_ms"} <= figures.keys():
            pairs = zip(figures["ray_none_c16_cpu_ms"], figures["nev_none_c16_cpu_ms"], strict=True)
            figures["serve_overhead_cpu_ms"] = [through - direct for through, direct in pairs]
        best = [f"{kind}_image_c16_per_s" for kind in ("nev_bf16", "nev_int8")]
        if all(key in figures for key in best):
            figures["nev_int8_or_bf16_image_c16_per_s"] = list(map(max, *(figures[key] for key in best)))
        goals = {key: goal for key, goal in LIMITS.items() if key in figures}
        ratios = make_ratios(figures)
        report.write("serve", report.this_command(), figures, ratios, NOTES, results, console, goals)


class Run:
    """One start of one server. cores: of the server, and of the callers. errors: counted here, of nev's servers."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        cores: tuple[int, int],
        figures: dict[str, list[float]],
        errors: list[int],
        console: Console,
    ) -> None:
        self.kind, self.folder, self.cores = kind, folder, cores
        self.figures, self.errors, self.console = figures, errors, console

    def measure(self, callers: list[int], seconds: float, image_seconds: float, overload_seconds: float) -> None:
        """Start the server, and measure it with each number of callers."""
        from benchmarks.contestants import load, servers
        from benchmarks.contestants.processes import in_own_process

        lengths = {"text": seconds, "image": image_seconds}
        if self.kind in ("nev_bf16", "nev_int8"):
            lengths.pop("text")  # as nev's
        if self.kind in ("ray", "infinity"):
            lengths.pop("image")
        with servers.running(self.kind, self.folder, self.cores[0], self.folder / f"{self.kind}.log") as server:
            self.add("ready_s", server.ready)
            for what, length in lengths.items():
                for count in callers:
                    done = in_own_process(load.measure, server.url, server.pid, what, count, length, self.cores[1])
                    self.note(f"{what}_c{count}", done)
            if self.kind in ("nev", "ray"):
                none = in_own_process(load.measure, server.url, server.pid, "none", 16, seconds, self.cores[1])
                self.add("none_c16_cpu_ms", none.cpu_ms)
            if self.kind == "nev" and overload_seconds:
                rate = 4 * self.figures[f"nev_text_c{max(callers)}_per_s"][-1]
                over = in_own_process(load.overload, server.url, server.pid, rate, overload_seconds, self.cores[1])
                self.note_overload(over, overload_seconds)

    def add(self, key: str, value: float) -> None:
        """Note a figure of this server."""
        self.figures.setdefault(f"{self.kind}_{key}", []).append(value)

    def note(self, key: str, done: load.Load) -> None:
        """Note rate, latencies and CPU."""
        self.add(f"{key}_per_s", done.per_s)
        for share, word in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
            self.add(f"{key}_{word}_ms", done.percentile(share))
        self.add(f"{key}_cpu_ms", done.cpu_ms)
        if self.kind not in ("plain", "infinity"):
            self.errors[0] += done.errors
        elif done.errors:
            raise BenchmarkFailed(f"{self.kind} failed: {done.statuses}")
        shown = f"{done.per_s:8.1f}/s  p50 {done.percentile(0.5):7.1f} ms  cpu {done.cpu_ms:6.2f} ms  {done.statuses}"
        self.console.print(f"{self.kind:9} {key:10} {shown}", highlight=False)

    def note_overload(self, over: load.Overload, seconds: float) -> None:
        """Note what overload did."""
        before, after = over.memory_mib
        answered, refused = over.statuses.get("200", 0), over.statuses.get("429", 0)
        self.figures["overload_answered_per_s"] = [answered / seconds]
        self.figures["overload_refused_share"] = [refused / max(1, sum(over.statuses.values()))]
        self.figures["overload_memory_growth_mib"] = [after - before]
        self.errors[0] += sum(over.statuses.values()) - answered - refused
        self.console.print(f"overload  {over.statuses}  {before:,.0f} to {after:,.0f} MiB", highlight=False)


def make_ratios(figures: dict[str, list[float]]) -> dict[str, report.Ratio]:
    """Rates of nev's servers over those of the plain endpoint and of infinity, for each number of callers."""
    names = {"nev": "", "nev_bf16": "bf16_", "nev_int8": "int8_", "nev_int8_or_bf16": "int8_or_bf16_"}
    ratios = {}
    for key in figures:
        for kind, name in {**names, "ray": "serve_"}.items():
            for what in ("text", "image"):
                point = key.removeprefix(f"{kind}_{what}_").removesuffix("_per_s")
                under = f"plain_{what}_{point}_per_s"
                if key == f"{kind}_{what}_{point}_per_s" and under in figures:
                    label = f"serve_{what}" if kind == "ray" else f"{what}_{name}".rstrip("_")
                    ratio = f"{label}_vs_fastapi_{point}"
                    ratios[ratio] = report.Ratio(key, under, GOALS.get(ratio))
        under = key.replace("nev_text", "infinity_text")
        if key.startswith("nev_text_") and key.endswith("_per_s") and under in figures:
            point = key.removeprefix("nev_text_").removesuffix("_per_s")
            ratios[f"text_vs_infinity_{point}"] = report.Ratio(key, under)
    return ratios


app = make_command(main, "make bench NAME=serve")

if __name__ == "__main__":
    app()
