"""The reference library, in a folder where nothing else can import it by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VERSION = "0.21.2"
ROOT = Path(__file__).resolve().parents[2]


def reference_dir() -> Path:
    """The folder that holds the reference: `$PEFT_REFERENCE`, by default `.reference` in the repository."""
    return Path(os.environ.get("PEFT_REFERENCE", ROOT / ".reference"))


def ensure_reference() -> Path:
    """Install the reference (without its dependencies, which are ours too) unless it is there; returns its folder.

    Raises:
        RuntimeError: pip could not install it, with what pip said.
    """
    folder = reference_dir()
    if (folder / f"peft-{VERSION}.dist-info").is_dir():
        return folder
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(folder)]
    done = subprocess.run([*command, f"peft=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"could not install the reference peft=={VERSION} into {folder}:\n{done.stderr}")
    return folder
