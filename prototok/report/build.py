"""From a run folder to the page and the files beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from prototok.common.files import try_file, whole, write_text
from prototok.common.version import VERSION
from prototok.report import raster
from prototok.report.chart import svg
from prototok.report.experiments import sections
from prototok.report.findings import findings
from prototok.report.gallery import gallery
from prototok.report.page import page
from prototok.report.results import Results
from prototok.report.section import Section
from prototok.report.tables import to_csv, to_latex

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PRINTED, _LIST = "report.pdf", "files.json"  # the page as PDF; what the folder may hold of ours


@dataclass
class Written:
    """The files that were written, and what was left out and why."""

    page: Path
    folder: Path | None
    files: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def build(
    results: Results,
    out: Path,
    files: bool = True,
    exhibits: int = 48,
    browser: str | None = None,
    title: str | None = None,
) -> Written:
    """Write the page to `out` and, with `files`, its tables and charts to a folder beside it.

    The folder is named after the page. It gets CSV and LaTeX of every table, SVG of every chart,
    PNG and PDF of every chart where matplotlib is installed, and the page as a PDF where a Chromium
    is; `Written.skipped` says what was not.

    Args:
        results: of a run.
        out: path of the page, such as report.html.
        files: write the folder, too.
        exhibits: most texts in the gallery.
        browser: a Chromium; None looks for one.
        title: of the page; None names it after the run.
    """
    parts = sections(results)
    folder = out.with_suffix("") if files else None
    if folder == out:
        raise ValueError(f"out: {out} has no suffix; name the page, such as report.html")
    name = title or results.run.path.resolve().name
    html = page(
        f"prototok · {name}", _origin(results), findings(results), parts,
        gallery(results, exhibits), folder.name if folder else None,
    )  # fmt: skip
    require_place(out, folder)
    if folder is not None:
        _require_names(folder, _names(parts))
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, html)
    written = Written(out, folder)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        _write(folder / _LIST, json.dumps(_names(parts), indent=1) + "\n")
        _write_files(folder, parts, written)
        _print_page(out, folder, browser, written)
    return written


def require_place(out: Path, folder: Path | None) -> None:
    """Raise ValueError unless a page may be written to `out` and its files to `folder`.

    A page of ours is replaced; another file, and a folder that is a run, stay as they are.
    """
    try_file(out, "out", lambda head: b"<title>prototok" in head)
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"out: the files of {out} would go to {folder}, which is a file")
    if (folder / "run.json").exists():
        raise ValueError(
            f"out: the files of {out} would go to {folder}, which is a sweep; choose another name"
        )


def _names(parts: list[Section]) -> list[str]:
    """Name every file that may be written beside the page."""
    tables = [
        t.name + suffix
        for part in parts
        for t in part.content.tables
        for suffix in (".csv", ".tex")
    ]
    charts = [
        f"{c.name}.{suffix}" for part in parts for c in part.content.charts
        for suffix in ("svg", "png", "pdf")
    ]  # fmt: skip
    return [*tables, *charts, _PRINTED]


def _require_names(folder: Path, names: list[str]) -> None:
    """Raise ValueError where a file to write is there and not on the list of what we wrote."""
    try:
        listed = json.loads((folder / _LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        listed = []
    for name in names:
        if (folder / name).exists() and name not in listed:
            raise ValueError(
                f"out: {folder / name} was not written by prototok and is left as it is; choose "
                "another name"
            )


def _write_files(folder: Path, parts: list[Section], written: Written) -> None:
    for table in (t for part in parts for t in part.content.tables):
        for suffix, text in ((".csv", to_csv(table)), (".tex", to_latex(table))):
            written.files.append(_write(folder / (table.name + suffix), text))
    drawing = raster.available()
    if not drawing:
        written.skipped.append(
            "PNG and PDF of charts: matplotlib is not installed (pip install prototok[analysis])"
        )
    for chart in (c for part in parts for c in part.content.charts):
        written.files.append(_write(folder / f"{chart.name}.svg", svg(chart, alone=True)))
        if drawing:
            paths = [folder / f"{chart.name}.{suffix}" for suffix in ("png", "pdf")]
            raster.draw(chart, paths)
            written.files += paths


def _print_page(out: Path, folder: Path, browser: str | None, written: Written) -> None:
    found = browser or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        written.skipped.append("the page as PDF: there is no Chromium on the path")
        return
    target = folder / _PRINTED
    with tempfile.TemporaryDirectory() as profile:
        printed = Path(profile) / _PRINTED
        command = [
            found, "--headless", "--disable-gpu", "--no-sandbox", f"--user-data-dir={profile}",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-pdf-header-footer", f"--print-to-pdf={printed}",
            out.resolve().as_uri(),
        ]  # fmt: skip
        try:
            run = subprocess.run(command, capture_output=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            written.skipped.append(f"the page as PDF: {found} failed ({type(error).__name__})")
            return
        if run.returncode or not printed.exists():
            written.skipped.append(f"the page as PDF: {found} ended with {run.returncode}")
            return
        with whole(target) as temporary:
            shutil.copyfile(printed, temporary)
    written.files.append(target)


def _origin(results: Results) -> str:
    """Name the versions that made the fits, and that made the report."""
    fits = [fit for one in results.experiments.values() for fit in one.fits()]
    made = sorted({_versions(fit["versions"]) for fit in fits if fit["versions"]})
    devices = sorted({f"{fit['device']}, {fit['dtype']}" for fit in fits})
    last = max((fit["finished"] for fit in fits), default=None)
    date = f", last fit {last:%Y-%m-%d}" if last else ""
    what = f"{len({(f['key'], f['row']) for f in fits})} fits"
    how = " · ".join((*made, *devices))
    return f"{what}{date}{' · ' if how else ''}{how} · report by prototok {VERSION}"


def _versions(text: str) -> str:
    return ", ".join(f"{name} {version}" for name, version in json.loads(text).items())


def _write(path: Path, text: str) -> Path:
    """Write a file that is there whole or not at all."""
    write_text(path, text)
    return path
