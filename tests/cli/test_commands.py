"""What the options of each command become."""

import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from urllib.parse import urlsplit

import pytest

from baton.config import EngineConfig, Role, RouterConfig, WorkerConfig, available_cores
from baton.core.reservation import TransferDeadlines
from baton_launch import serve, worker_command
from baton_launch.main import main
from baton_launch.serve import ServePlan, banner, child_specs

ENGINE_OPTIONS = [
    "--dtype=float32",
    "--block-size=32",
    "--kv-cache-memory=64MiB",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=256",
    "--max-model-len=1024",
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["baton", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[WorkerConfig]:
    """The workers that would have been run."""
    configs: list[WorkerConfig] = []
    monkeypatch.setattr(worker_command, "run_worker", configs.append)
    return configs


@pytest.fixture
def routers(monkeypatch: pytest.MonkeyPatch) -> list[RouterConfig]:
    """The routers that would have been run."""
    configs: list[RouterConfig] = []
    monkeypatch.setitem(sys.modules, "baton_router.main", SimpleNamespace(run=configs.append))
    monkeypatch.setattr("baton_launch.router_command.set_up_logging", lambda level: None)
    return configs


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[ServePlan]:
    """What `baton serve` would have started."""
    plans: list[ServePlan] = []
    monkeypatch.setattr(serve, "run_plan", plans.append)
    return plans


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_worker_options(
    role: str, monkeypatch: pytest.MonkeyPatch, workers: list[WorkerConfig], model_dir: Path
) -> None:
    monkeypatch.setenv("BATON_CLUSTER_TOKEN", "secret")
    options = ["--model", str(model_dir), "--listen=0.0.0.0:50051", "--advertise=w0:50051", "--worker-id=w0"]
    transfers = ["--transfer-stall-timeout=2.5", "--transfer-deadline=60"]
    run(monkeypatch, role, *options, *ENGINE_OPTIONS, "--threads=3", *transfers)
    engine = EngineConfig("float32", 32, 64 * 2**20, 8, 256, 1024, num_threads=3)
    deadlines = TransferDeadlines(reserved_s=60.0, receiving_s=60.0, committing_s=30.0, aborting_s=5.0)
    config = WorkerConfig(
        cast(Role, role),
        model_dir,
        "0.0.0.0:50051",
        "w0:50051",
        "w0",
        "secret",
        engine,
        "auto",
        2.5,
        deadlines,
    )
    assert workers == [config]


@pytest.mark.parametrize(
    ("option", "role"), [([], "both"), (["--role=both"], "both"), (["--role=decode"], "decode")]
)
def test_a_worker_of_the_role_that_is_named(
    option: list[str],
    role: str,
    monkeypatch: pytest.MonkeyPatch,
    workers: list[WorkerConfig],
    model_dir: Path,
) -> None:
    run(monkeypatch, "worker", f"--model={model_dir}", "--listen=unix:/tmp/w.sock", *option)
    assert [(config.role, config.worker_id) for config in workers] == [(role, "w")]


def test_worker_defaults(
    monkeypatch: pytest.MonkeyPatch, workers: list[WorkerConfig], model_dir: Path
) -> None:
    monkeypatch.delenv("BATON_CLUSTER_TOKEN", raising=False)
    run(monkeypatch, "decode", f"--model={model_dir}", "--listen=unix:/tmp/d.sock")
    engine = EngineConfig(num_threads=available_cores())
    address = "unix:/tmp/d.sock"
    assert workers == [WorkerConfig("decode", model_dir, address, address, "d", "", engine)]


def test_router_options(
    monkeypatch: pytest.MonkeyPatch, routers: list[RouterConfig], model_dir: Path
) -> None:
    monkeypatch.delenv("BATON_CLUSTER_TOKEN", raising=False)
    workers = ["--prefill=p0:1", "--prefill=p1:1", "--decode=d0:1"]
    run(monkeypatch, "router", f"--model={model_dir}", *workers, "--port=9000", "--max-queue=7")
    assert routers == [
        RouterConfig(model_dir, ("a-model",), ("p0:1", "p1:1"), ("d0:1",), http_port=9000, max_queue=7)
    ]


def test_a_router_of_workers_of_both_roles(
    monkeypatch: pytest.MonkeyPatch, routers: list[RouterConfig], model_dir: Path
) -> None:
    run(monkeypatch, "router", f"--model={model_dir}", "--worker=w0:1", "--worker=w1:1", "--prefill=p0:1")
    assert routers[0].worker_addresses == ("w0:1", "w1:1")
    assert (routers[0].prefill_addresses, routers[0].decode_addresses) == (("p0:1",), ())


def test_serve_shares_the_machine(
    monkeypatch: pytest.MonkeyPatch, plans: list[ServePlan], model_dir: Path, free_ports: tuple[int, int]
) -> None:
    monkeypatch.setattr("baton_launch.serve.available_cores", lambda: 10)
    ports = [f"--port={free_ports[0]}", f"--grpc-port={free_ports[1]}"]
    run(monkeypatch, "serve", str(model_dir), "--prefill=2", "--decode=1", *ports, *ENGINE_OPTIONS)
    router, workers = plans[0].router, plans[0].workers
    assert {name: worker.role for name, worker in workers.items()} == {
        "prefill-0": "prefill",
        "prefill-1": "prefill",
        "decode-0": "decode",
    }
    assert (router.http_port, router.grpc_port) == free_ports
    assert (router.model_dir, router.served_model_names) == (model_dir, ("a-model",))
    cores = Path(workers["decode-0"].listen_address.removeprefix("unix:")).with_name("cores")
    engine = EngineConfig("float32", 32, 64 * 2**20, 8, 256, 1024, 10, cores, gpu_memory_utilization=0.9 / 3)
    assert all(worker.engine == engine for worker in workers.values())
    run(monkeypatch, "serve", str(model_dir), "--role=both", *ports)
    [worker] = plans[1].workers.values()
    assert worker.engine == EngineConfig(num_threads=10)


@pytest.mark.parametrize(
    ("options", "names"),
    [([], ["prefill-0", "decode-0"]), (["--role=both", "--workers=2"], ["worker-0", "worker-1"])],
    ids=["apart", "both"],
)
def test_the_children_of_serve_are_those_of_its_plan(
    options: list[str],
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    plans: list[ServePlan],
    workers: list[WorkerConfig],
    routers: list[RouterConfig],
    model_dir: Path,
    free_ports: tuple[int, int],
) -> None:
    ports = [f"--port={free_ports[0]}", f"--grpc-port={free_ports[1]}"]
    common = ["--served-model-name=it's", "--max-queue=7", "--transfer-deadline=50", "--threads=2"]
    run(monkeypatch, "serve", str(model_dir), *options, *ports, *common, *ENGINE_OPTIONS)
    [plan] = plans
    monkeypatch.setattr("baton_launch.router_command.die_with_parent", lambda pid: None)
    monkeypatch.setattr("baton_launch.worker_command.die_with_parent", lambda pid: None)
    children = child_specs(plan)
    for child in children:
        monkeypatch.setenv("BATON_CLUSTER_TOKEN", child.environment["BATON_CLUSTER_TOKEN"])
        run(monkeypatch, *child.arguments[4:])

    assert [child.name for child in children] == ["router", *names]
    assert routers == [plan.router]
    assert workers == list(plan.workers.values())
    assert [worker.worker_id for worker in workers] == names
    router = plan.router
    of_router = (*router.prefill_addresses, *router.decode_addresses, *router.worker_addresses)
    assert of_router == tuple(worker.listen_address for worker in workers)
    assert (router.served_model_names, router.max_queue) == (("it's",), 7)
    assert {worker.transfer_deadlines.receiving_s for worker in workers} == {50.0}
    assert {worker.cluster_token for worker in workers} == {router.cluster_token} != {""}
    assert router.cluster_token not in " ".join(part for child in children for part in child.arguments)


def test_the_banner_quotes_for_the_shell(
    monkeypatch: pytest.MonkeyPatch, plans: list[ServePlan], model_dir: Path, free_ports: tuple[int, int]
) -> None:
    ports = [f"--port={free_ports[0]}", f"--grpc-port={free_ports[1]}", "--host=0.0.0.0"]
    run(monkeypatch, "serve", str(model_dir), "--served-model-name=it's", *ports)
    text = banner(plans[0].router)
    assert f":{free_ports[0]}/v1/completions " in text
    assert """'{"model": "it'"'"'s", """ in text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::"])
def test_the_banner_names_an_address_that_can_be_opened(
    monkeypatch: pytest.MonkeyPatch,
    plans: list[ServePlan],
    model_dir: Path,
    free_ports: tuple[int, int],
    host: str,
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = [f"--port={free_ports[0]}", f"--grpc-port={free_ports[1]}"]
    try:
        run(monkeypatch, "serve", str(model_dir), f"--host={host}", *ports)
        listener = socket.create_server((host, free_ports[0]), family=family)
    except (OSError, AssertionError):
        if family == socket.AF_INET6:
            pytest.skip("this machine has no IPv6")
        raise
    with listener:
        [url] = re.findall(r"HTTP +(\S+)", banner(plans[0].router))
        address = urlsplit(url)
        assert address.hostname not in ("0.0.0.0", "::")
        assert address.port == free_ports[0]
        socket.create_connection((address.hostname, address.port), timeout=10).close()


@pytest.mark.parametrize(
    ("host", "is_open"),
    [
        *(("127.0.0.1", False), ("localhost", False), ("::1", False)),
        *(("0.0.0.0", True), ("::", True), ("192.0.2.7", True), ("gpu-box", True)),
    ],
)
def test_who_lets_others_in_is_warned(
    monkeypatch: pytest.MonkeyPatch,
    routers: list[RouterConfig],
    model_dir: Path,
    caplog: pytest.LogCaptureFixture,
    host: str,
    is_open: bool,
) -> None:
    run(monkeypatch, "router", f"--model={model_dir}", "--worker=w0:1", f"--host={host}")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == is_open
    assert all("checks no keys" in warning for warning in warnings)


def test_several_names(
    monkeypatch: pytest.MonkeyPatch, plans: list[ServePlan], routers: list[RouterConfig], model_dir: Path
) -> None:
    """One after the other, as vLLM has them, or each with its option; MODEL may come last."""
    names = ["--served-model-name", "a", "b", "--port", "9", "--served_model_name=c"]
    monkeypatch.setattr("baton_launch.listening.require_free_port", lambda *_: None)
    run(monkeypatch, "serve", str(model_dir), *names)
    run(monkeypatch, "serve", "--served-model-name", "a", str(model_dir))
    assert [plan.router.served_model_names for plan in plans] == [("a", "b", "c"), ("a",)]
    assert "Baton serves a, b, c." in banner(plans[0].router)
    run(monkeypatch, "router", *names, f"--model={model_dir}", "--worker=w0:1")
    assert routers[0].served_model_names == ("a", "b", "c")
