"""The program in the client's README.md, and what mypy says of it."""

import re
import subprocess
import sys
from pathlib import Path

from tests.packaging.environments import TIMEOUT_S, Environment
from tests.packaging.projects import CLIENT, ROOT


def program_of(package: str) -> str:
    """The program, with the stubs of that package."""
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / CLIENT / "README.md").read_text(), re.DOTALL)
    return program.replace("baton_client", package)


def complaints(environment: Environment, program: str, directory: Path, *options: str) -> str:
    """What mypy says of the program where it is to run; empty if it has nothing to say."""
    (directory / "program.py").write_text(program)
    python = f"--python-executable={environment.python}"
    command = (sys.executable, "-m", "mypy", python, "--no-error-summary", *options, "program.py")
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S)
    return done.stdout + done.stderr
