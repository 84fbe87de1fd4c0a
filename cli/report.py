"""`spectool report RUN...`: one page of what commands printed with `--json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectool.cli.common import Output
from spectool.errors import UsageError
from spectool.files import size
from spectool.options import Config, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions(Config):
    """The results to show, and the files to write."""

    runs: tuple[str, ...] = option(
        ...,
        "Results: files that commands printed with --json, certificates, or folders of them, such "
        "as that of a recipe's run",
        argument=True,
    )
    out: Path = option(Path("report.html"), "Page to write", short="-o", written=True)
    pictures: Path | None = option(
        None, "Directory to write each picture to, as .png and .svg, made if absent", written=True
    )

    def validate(self) -> None:
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--out {self.out}: expected a name that ends with .html")


def report(output: Output, options: ReportOptions) -> None:
    """Show results on one page, with pictures, tables, gates and the commands that made them."""
    from spectool.evaluate.report.page import write_report
    from spectool.evaluate.report.runs import read_runs

    if not options.out.parent.is_dir():
        raise UsageError(f"--out {options.out}: there is no folder {options.out.parent}")
    runs = read_runs([Path(run) for run in options.runs])
    written = write_report(runs, options.out, options.pictures)
    for path in written[:-1]:
        output.say(f"picture: {path}")
    output.show(f"{options.out}: {len(runs)} results, {size(options.out.stat().st_size)}")
    files = [str(path) for path in written]
    output.result({"out": str(options.out), "results": len(runs), "written": files})
