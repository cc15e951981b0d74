"""Build the documents as a site that opens from the disk, warnings as errors.

pip install '.[docs]' && python docs/build_site.py           # then open site/index.html
python docs/build_site.py --out FOLDER
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

DOCS = Path(__file__).resolve().parent
OURS = ".buildinfo"  # is in every site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS.parent / "site", help="folder of the site")
    out = parser.parse_args().out
    if out.exists() and not (out / OURS).is_file() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"out: {out} exists and is no site")
    # Beside it first: no page of an earlier site stays, and one that does not build replaces none.
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / "site"
        options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(DOCS)]
        code = build_main([*options, "-d", f"{work}/read", str(DOCS.parent), str(made)])
        if code:
            sys.exit(code)
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(made, out)
    print(out / "index.html")


if __name__ == "__main__":
    main()
