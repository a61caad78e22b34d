"""Virtual environments, made fresh, for what is built to be installed in."""

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
TIMEOUT_S = 100


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """What the command says; fails the test with its complaints if it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment without pip: that of the tests serves it from outside, which is quicker."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "Environment":
        """A new one, with nothing in it."""
        venv.create(directory, with_pip=False)
        return cls(directory)

    @property
    def scripts(self) -> Path:
        """Where commands are installed."""
        return self.directory / "bin"

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.scripts / "python"

    @property
    def site_packages(self) -> Path:
        """Where packages are installed."""
        return self.directory / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"

    def pip(self, *arguments: str | Path) -> None:
        """Install and uninstall."""
        run(*PIP, f"--python={self.python}", *arguments)

    def see_packages_of_tests(self) -> None:
        """Have packages that lack here found where tests run; an editable Baton there stays unseen."""
        (self.site_packages / "of-tests.pth").write_text(sysconfig.get_path("purelib"))

    def run_python(self, *arguments: str | Path, **environment: str) -> str:
        """What the interpreter says, run where no checkout is."""
        return run(self.python, *arguments, cwd=self.directory, **environment)
