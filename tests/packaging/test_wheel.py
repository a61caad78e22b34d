"""The server's wheel: what is in it, and how it gets along with other people's packages."""

from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

from tests.packaging.environments import PIP, Environment, run
from tests.packaging.projects import ROOT, Build, project
from tests.packaging.readme_program import complaints, program_of

THEIRS = "kernels==0.17.2"  # Hugging Face's, which once would have been overwritten
PACKAGES = {
    "baton",
    *(
        f"baton_{folder}"
        for folder in (
            *("router", "prefill_service", "decode_service", "both_service"),
            *("kv_transfer", "kernels", "launch", "offline"),
        )
    ),
}


@pytest.fixture(scope="module")
def wheel(build: Build, checkout: Path) -> Path:
    return build(checkout)


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[PurePosixPath]:
    """Of all files in the wheel."""
    with ZipFile(wheel) as archive:
        return [PurePosixPath(name) for name in archive.namelist()]


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel, which finds what that needs."""
    environment = Environment.make(tmp_path_factory.mktemp("installed"))
    environment.pip("install", "--no-deps", wheel)
    environment.see_packages_of_tests()
    return environment


@pytest.fixture(scope="module")
def their_wheel(package_index: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("theirs")
    run(*PIP, "download", "--quiet", "--no-deps", f"--dest={directory}", THEIRS)
    [wheel] = directory.iterdir()
    return wheel


def test_its_names_are_its_own(names: list[PurePosixPath]) -> None:
    top_level = {name.parts[0] for name in names}
    [dist_info] = (name for name in top_level if name.endswith(".dist-info"))
    assert dist_info.startswith("baton_serve-")
    assert top_level - {dist_info} == PACKAGES


@pytest.mark.parametrize(
    ("source", "target", "pattern"),
    [
        ("baton/demo_model", "baton/demo_model", "*"),
        ("kernels/baton_kernels/cpu", "baton_kernels/cpu", "*.c"),
        ("kernels/baton_kernels/cpu", "baton_kernels/cpu", "*.h"),
        ("protos/baton/v1", "baton/v1", "*.proto"),
    ],
)
def test_it_has_more_than_python(names: list[PurePosixPath], source: str, target: str, pattern: str) -> None:
    there = {path.name for path in (ROOT / source).glob(pattern)}
    assert there
    assert there == {
        name.name for name in names if name.parent == PurePosixPath(target) and name.match(pattern)
    }


def test_its_packages_are_typed(names: list[PurePosixPath]) -> None:
    assert {name.parts[0] for name in names if name.name == "py.typed"} == PACKAGES
    for stub in ROOT.glob("protos/baton/v1/*.proto"):
        assert PurePosixPath(f"baton/v1/{stub.stem}_pb2.pyi") in names


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "baton-serve"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_all_say_the_same_version(installed: Environment, metadata: Message) -> None:
    version = metadata["Version"]
    assert version == project(ROOT)["project"]["version"]
    assert run(installed.scripts / "baton", "--version") == f"baton {version}\n"
    assert installed.run_python("-m", "baton", "--version") == f"baton {version}\n"
    assert installed.run_python("-c", "import baton; print(baton.__version__)") == f"{version}\n"


def test_types_reach_clients(installed: Environment, tmp_path: Path) -> None:
    program = program_of("baton")
    assert complaints(installed, program, tmp_path) == ""
    wrong = complaints(installed, program.replace("max_tokens", "max_words"), tmp_path)
    assert 'Unexpected keyword argument "max_words" for "Sampling"' in wrong


def files_of(environment: Environment, distribution: str) -> set[Path]:
    """What an installed distribution's RECORD lists."""
    [record] = environment.site_packages.glob(f"{distribution}-*.dist-info/RECORD")
    listed = (line.rsplit(",", 2)[0] for line in record.read_text().splitlines())
    return {(environment.site_packages / name).resolve() for name in listed}


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_it_lies_beside_other_peoples_kernels(
    wheel: Path, their_wheel: Path, tmp_path: Path, order: str
) -> None:
    environment = Environment.make(tmp_path / "environment")
    untouched = set(environment.directory.rglob("*"))
    for each in (wheel, their_wheel) if order == "ours first" else (their_wheel, wheel):
        environment.pip("install", "--no-deps", each)
    ours, theirs = files_of(environment, "baton_serve"), files_of(environment, "kernels")
    assert not ours & theirs

    environment.see_packages_of_tests()
    site_packages = environment.site_packages
    program = "import kernels, baton_kernels.reference as ours; print(kernels.__file__, ours.__file__)"
    assert environment.run_python("-c", program).split() == [
        str(site_packages / "kernels" / "__init__.py"),
        str(site_packages / "baton_kernels" / "reference.py"),
    ]
    environment.pip("uninstall", "--yes", "baton-serve")
    environment.run_python("-c", "import kernels; kernels.get_kernel")
    environment.pip("uninstall", "--yes", "kernels")
    left = set(environment.directory.rglob("*")) - untouched
    assert left == {site_packages / "of-tests.pth"}
