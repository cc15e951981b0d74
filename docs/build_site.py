"""Build the documents as a site that opens from the disk, warnings as errors.

pip install '.[docs]' && python docs/build_site.py           # then open site/index.html
python docs/build_site.py --out FOLDER
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

DOCS = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS.parent / "site", help="folder of the site")
    out = parser.parse_args().out
    # Never from what an earlier build left behind: a page that is gone must not be found there.
    options = ["-W", "--keep-going", "-q", "-E", "-b", "html", "-c", str(DOCS)]
    code = build_main([*options, "-d", str(out / ".cache"), str(DOCS.parent), str(out)])
    shutil.rmtree(out / ".cache", ignore_errors=True)
    if not code:
        print(out / "index.html")
    sys.exit(code)


if __name__ == "__main__":
    main()
