"""Which package may import which (docs/architecture.md): imports go one way, and the core stays pure."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The folder of each package; those of services hold nothing else (pyproject.toml: packages).
FOLDERS = {
    "baton": ROOT,
    **{
        f"baton_{folder}": ROOT / folder
        for folder in (
            *("router", "prefill_service", "decode_service", "both_service"),
            *("kv_transfer", "kernels", "launch", "offline"),
        )
    },
}
OURS = {*FOLDERS, "tests", "tools", "bench", "deploy"}
GENERATED = "baton.v1"

# What makes code wait, or depend on when and where it runs.
IMPURE = frozenset(
    {"asyncio", "concurrent", "datetime", "multiprocessing", "os", "pathlib", "queue", "random", "secrets"}
    | {"select", "selectors", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time"}
)
TENSORS = frozenset({"torch", "transformers"})
# Of pure modules that speak protobuf and numpy, which only compute.
STATEFUL = IMPURE | TENSORS | {"grpc"}


@dataclass(frozen=True, slots=True)
class Rule:
    """What the modules of `package` may import of ours, besides themselves, and never from elsewhere."""

    package: str
    ours: tuple[str, ...]
    ours_in_functions: tuple[str, ...] = ()
    never: frozenset[str] = frozenset()
    stdlib_only: bool = False


OPTIONS = ("baton.option", "baton.option_values")
SETTINGS = (
    "baton.core",
    "baton.config",
    "baton.worker_sources",
    "baton.front_config",
    "baton.generation_defaults",
    "baton.__version__",
)
MODELS = ("baton.architectures", "baton.model_files")
SHARED = (
    *(*SETTINGS, *MODELS, "baton.fingerprint", "baton.grammars", "baton.rpc", "baton.tokenizer"),
    GENERATED,
)
WORKER = ("baton.engine", "baton.worker_process")
ROLES = ("baton_prefill_service", "baton_decode_service")
SERVICES = ("baton_router", *ROLES, "baton_both_service")
# The floors of kv_transfer: the top floor knows of transports what the registry says, and no name.
PAGES, TRANSFERS, TRANSPORTS = (f"baton_kv_transfer.{room}" for room in ("pages", "transfers", "transports"))
PURE_PAGES = tuple(f"{PAGES}.{module}" for module in ("arrived", "convert", "frames", "wire"))
PURE = ("baton.core", GENERATED, *PURE_PAGES)
BELOW_TRANSPORTS = (*SHARED, PAGES, TRANSFERS)
TOP_FLOOR = tuple(f"baton_kv_transfer.{module}" for module in ("sender", "peer", "receiver"))
TRANSPORTS_OF_ALL = tuple(f"{TRANSPORTS}.{module}" for module in ("base", "choice", "registry"))
# Imported where a pair is made, and nowhere else.
PAIR = f"{TRANSPORTS}.pair"
TORCH_TRANSPORTS = (f"{PAIR}.process_group", f"{PAIR}.wires")
USERS_OF_TORCH = (*TORCH_TRANSPORTS, f"{PAIR}.link", f"{PAIR}.receiver")
# fmt: off
RULES = (
    Rule("baton.core",            ours=(), never=IMPURE, stdlib_only=True),
    Rule("baton.option_values",   ours=("baton.core",), stdlib_only=True),
    Rule("baton.option",          ours=("baton.option_values",), stdlib_only=True),
    Rule("baton.front_config",    ours=("baton.core", *OPTIONS), stdlib_only=True),
    Rule("baton.worker_sources",  ours=("baton.core",), never=IMPURE, stdlib_only=True),
    Rule("baton.config",          ours=("baton.core", "baton.front_config", "baton.worker_sources", *OPTIONS),
         stdlib_only=True),
    Rule("baton.architectures",   ours=("baton.core",), never=IMPURE, stdlib_only=True),
    Rule("baton.model_files",     ours=("baton.core",), stdlib_only=True),
    Rule("baton.generation_defaults", ours=("baton.core", "baton.model_files"), stdlib_only=True),
    Rule("baton.fingerprint",     ours=("baton.core", "baton.config", "baton.model_files"), stdlib_only=True),
    Rule("baton_kernels",         ours=()),
    Rule("baton.tokenizer",       ours=("baton.core",), never=TENSORS),
    Rule("baton.grammars.xgrammar", ours=("baton.core", "baton.grammars", "baton.tokenizer")),
    Rule("baton.grammars",        ours=("baton.core", "baton.tokenizer"), never=TENSORS),
    Rule("baton.rpc.codec",       ours=("baton.core", GENERATED), never=STATEFUL),
    Rule("baton.rpc",             ours=("baton.core", "baton.config", GENERATED), never=TENSORS),
    Rule("baton.engine",          ours=(*SHARED, "baton_kernels")),
    *(Rule(module,                ours=PURE, never=STATEFUL) for module in PURE_PAGES),
    Rule(PAGES,                   ours=SHARED, never=TENSORS),
    Rule(TRANSFERS,               ours=(*PURE, "baton.rpc.codec"), never=STATEFUL),
    *(Rule(module,                ours=(*BELOW_TRANSPORTS, TRANSPORTS)) for module in TORCH_TRANSPORTS),
    Rule(TRANSPORTS,              ours=BELOW_TRANSPORTS, never=TENSORS),
    *(Rule(module,                ours=(*BELOW_TRANSPORTS, *TRANSPORTS_OF_ALL, *TOP_FLOOR), never=TENSORS)
      for module in TOP_FLOOR),
    Rule("baton_kv_transfer",     ours=(), never=TENSORS),
    Rule("baton_prefill_service.handover", ours=("baton.core",), never=IMPURE, stdlib_only=True),
    Rule("baton_decode_service.handover",  ours=("baton.core", TRANSFERS, f"{PAGES}.arrived"),
         never=IMPURE, stdlib_only=True),
    Rule("baton.worker_process",  ours=(*SHARED, "baton.engine")),
    Rule("baton_prefill_service", ours=(*SHARED, "baton_kv_transfer", *WORKER)),
    Rule("baton_decode_service",  ours=(*SHARED, "baton_kv_transfer", *WORKER)),
    Rule("baton_both_service",    ours=(*SHARED, *WORKER, *ROLES)),
    Rule("baton_router.chat_output", ours=("baton.core", "baton.grammars.formats"),
         never=IMPURE, stdlib_only=True),
    Rule("baton_router",          ours=SHARED, never=TENSORS),
    Rule("baton_launch",          ours=(*SETTINGS, *OPTIONS, *MODELS), ours_in_functions=SERVICES,
         never=TENSORS),
    Rule("baton_offline",         ours=(*SHARED, *OPTIONS, "baton.engine", "baton_launch.model_source",
                                        "baton_router")),
    Rule("baton.__main__",        ours=("baton_launch.main",)),
    Rule("baton",                 ours=("baton_offline",)),  # whose names it has, when they are asked for
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name, in full."""

    target: str
    line: int
    in_function: bool


def modules() -> Iterator[tuple[str, Path]]:
    """Every module that is not generated, by its full name."""
    for package, folder in FOLDERS.items():
        for path in sorted((folder / package).rglob("*.py")):
            name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            if not within(name, GENERATED):
                yield name, path


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports_of(tree: ast.AST, in_function: bool = False) -> Iterator[Import]:
    """All imports below `tree`. Relative ones are left to the linter (TID252)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                Import(f"{node.module}.{alias.name}", node.lineno, in_function) for alias in node.names
            )
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, in_function or is_function)


def is_allowed(found: Import, rule: Rule) -> bool:
    top = found.target.partition(".")[0]
    if top in OURS:
        allowed = (rule.package, *rule.ours, *(rule.ours_in_functions if found.in_function else ()))
        return any(within(found.target, package) for package in allowed)
    if top in rule.never:
        return False
    return top in sys.stdlib_module_names or not rule.stdlib_only


def rule_for(module: str) -> Rule:
    return next(rule for rule in RULES if within(module, rule.package))


def violations(module: str, source: str) -> list[str]:
    rule = rule_for(module)
    return [
        f"{module}:{found.line} imports {found.target}, which {rule.package} may not"
        for found in imports_of(ast.parse(source))
        if not is_allowed(found, rule)
    ]


def test_imports_go_one_way() -> None:
    assert [text for name, path in modules() for text in violations(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("baton.core.scheduler", "import time"),
        ("baton.core.scheduler", "import numpy"),
        ("baton.core.scheduler", "from baton import rpc"),
        ("baton.rpc.codec", "from baton.engine.loop import Loop"),
        ("baton_router.requests.worker_backend", "import torch.nn"),
        ("baton_router.requests.worker_backend", "from baton.engine import loop"),
        ("baton_prefill_service.main", "import baton_decode_service.main"),
        ("baton_decode_service.main", "import baton_prefill_service.main"),
        ("baton_prefill_service.main", "from baton_both_service import service"),
        ("baton_both_service.main", "from baton_router import requests"),
        ("baton_router.requests.worker_backend", "import baton_both_service.service"),
        ("baton_router.chat_output.parser", "import time"),
        ("baton_router.chat_output.parser", "from baton_router.served_model import ServedModel"),
        ("baton_router.chat_output.constraints", "from baton.grammars.guidance import check"),
        ("baton_router.chat_output.constraints", "import llguidance"),
        ("baton_kernels.reference", "import baton"),
        ("baton.rpc.codec", "import grpc"),
        ("baton_kv_transfer.pages.frames", "import threading"),
        ("baton_kv_transfer.pages.arrived", "from baton_kv_transfer.pages import page_writing"),
        ("baton_kv_transfer.pages.page_reading", "from baton_kv_transfer.transfers import outbound"),
        ("baton_kv_transfer.pages.page_writing", "from baton_kv_transfer.transports import base"),
        ("baton_kv_transfer.pages.page_writing", "import baton_kv_transfer.receiver"),
        ("baton_kv_transfer.transfers.inbound", "import asyncio"),
        ("baton_kv_transfer.transfers.inbound", "from time import monotonic"),
        ("baton_kv_transfer.transfers.inbound_call", "import grpc"),
        ("baton_kv_transfer.transfers.outbound", "import torch"),
        ("baton_kv_transfer.transfers.outbound", "from baton_kv_transfer.pages import page_writing"),
        ("baton_kv_transfer.transfers.outbound", "from baton.rpc import sessions"),
        ("baton_kv_transfer.transfers.outbound", "from baton_kv_transfer.transports import base"),
        ("baton_kv_transfer.transports.registry", "from baton_kv_transfer import sender"),
        ("baton_kv_transfer.transports.grpc_push", "import baton_kv_transfer.peer"),
        ("baton_kv_transfer.transports.pair.receiver", "from baton_kv_transfer.receiver import SERVICE"),
        ("baton_kv_transfer.sender", "from baton_kv_transfer.transports import grpc_push"),
        ("baton_kv_transfer.peer", "from baton_kv_transfer.transports.pair.link import Pair"),
        ("baton_kv_transfer.receiver", "def read():\n    from baton_kv_transfer.transports import cuda_ipc"),
        ("baton_kv_transfer.transports.pair.pair_end", "import torch"),
        ("baton_kv_transfer.transports.pair.process_group", "import baton.engine.loop"),
        ("baton_prefill_service.handover", "import asyncio"),
        ("baton_prefill_service.handover", "from baton_kv_transfer import sender"),
        ("baton_decode_service.handover", "import time"),
        ("baton_decode_service.handover", "import grpc"),
        ("baton_decode_service.handover", "from baton.engine import async_engine"),
        ("baton_decode_service.handover", "from baton_kv_transfer.pages import page_writing"),
        ("baton_launch.main", "import baton_router.main"),
        ("baton.config", "import baton_launch.main"),
        ("baton.option", "import typer"),
        ("baton_launch.main", "def command():\n    import tools"),
    ],
)
def test_the_rules_see(module: str, source: str) -> None:
    assert violations(module, source)


def test_the_cli_may_import_services_in_functions() -> None:
    assert violations("baton_launch.main", "def command():\n    from baton_router.main import run") == []


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("baton_router", {"torch", "transformers", "baton.engine"}),
        ("baton_launch", {"torch", "transformers", "grpc", "baton.engine", *SERVICES}),
        ("baton_kv_transfer", {"torch", "transformers"}),
        ("baton_kv_transfer.transfers", {"torch", "grpc"}),
        ("baton_router.chat_output", {"torch", "grpc", "asyncio", "llguidance"}),
        ("baton_prefill_service.handover", {"torch", "grpc", "asyncio"}),
        ("baton_decode_service.handover", {"torch", "grpc"}),
    ],
)
def test_importing_loads_no_more_than_it_should(package: str, absent: set[str]) -> None:
    names = [name for name, _ in modules() if within(name, package) and name not in USERS_OF_TORCH]
    program = f"import sys, {', '.join(names)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert absent.intersection(loaded.stdout.split()) == set()
