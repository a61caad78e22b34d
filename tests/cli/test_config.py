"""Settings: what is accepted, and what is refused in one clear line."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from baton.config import (
    EngineConfig,
    Role,
    RouterConfig,
    WorkerConfig,
    host_of,
    is_local,
    worker_name,
)
from baton.core.errors import StartupError
from baton.core.reservation import TransferDeadlines
from baton.option import settings_of
from baton.option_values import parse_size, parse_tokens
from baton_launch.options import cluster_token


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("512MiB", 512 * 2**20),
        ("2G", 2 * 2**30),
        ("2Gi", 2 * 2**30),
        ("1.5g", 3 * 2**29),
        ("64kb", 2**16),
        ("1048576", 2**20),
        (" 1 GiB ", 2**30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 apple", "0", "0.1", "1GiB2", "nan", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(StartupError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("8192", 8192),
        ("4k", 4000),
        ("4K", 4096),
        ("1m", 10**6),
        ("2M", 2**21),
        ("25.6k", 25_600),
        ("1.5m", 1_500_000),
    ],
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "-1", "auto", "4kb", "1.5", "1.5K", "4 k", "1e3"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(StartupError, match="is no number of tokens: write it like 8192"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("option", "written", "value"),
    [
        ("--dtype", "half", "float16"),
        ("--dtype", "float", "float32"),
        ("--dtype", "bfloat16", "bfloat16"),
        ("--dtype", "auto", "auto"),
        ("--kv-cache-dtype", "fp8_e4m3", "float8_e4m3fn"),
        ("--log-level", "DEBUG", "debug"),
    ],
)
def test_spellings_that_people_bring_along(option: str, written: str, value: str) -> None:
    [setting] = [setting for setting in settings_of(WorkerConfig) if setting.option.flag == option]
    assert setting.read(written) == value


@pytest.mark.parametrize("names", [(), ("",), ("a", "")])
def test_a_model_has_names(names: tuple[str, ...]) -> None:
    with pytest.raises(StartupError, match="served-model-name is empty"):
        RouterConfig(Path("model"), names, ("unix:/p",), ("unix:/d",))


@pytest.mark.parametrize(
    ("address", "host", "local"),
    [
        ("unix:/tmp/a.sock", None, True),
        ("127.0.0.1:50051", "127.0.0.1", True),
        ("127.8.8.8:50051", "127.8.8.8", True),
        ("localhost:1", "localhost", True),
        ("[::1]:50051", "::1", True),
        ("[::]:50051", "::", False),
        ("0.0.0.0:50051", "0.0.0.0", False),
        ("decode-0.decode:50051", "decode-0.decode", False),
    ],
)
def test_addresses(address: str, host: str | None, local: bool) -> None:
    assert host_of(address) == host
    assert is_local(address) == local


@pytest.mark.parametrize(
    "address", ["", "host", ":50051", "host:", "host:x", "host:0", "host:65536", "::1:50051"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(StartupError, match="is not an address"):
        host_of(address)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.7:50051", "10.0.0.7:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("unix:/run/baton-x1/decode-1.sock", "decode-1"),
    ],
)
def test_a_worker_without_a_name_is_called_by_its_address(address: str, name: str) -> None:
    assert worker_name(address) == name


def worker(listen: str, advertise: str, token: str = "", role: Role = "decode") -> WorkerConfig:
    return WorkerConfig(role, Path("model"), listen, advertise, "decode-0", token)


def test_a_worker_that_others_reach_needs_a_token() -> None:
    with pytest.raises(StartupError, match="set BATON_CLUSTER_TOKEN"):
        worker("0.0.0.0:50051", "decode-0:50051")
    assert worker("0.0.0.0:50051", "decode-0:50051", "secret").cluster_token == "secret"
    assert worker("127.0.0.1:50051", "127.0.0.1:50051").cluster_token == ""


def test_a_worker_must_say_where_it_is_reached() -> None:
    with pytest.raises(StartupError, match="--advertise"):
        worker("0.0.0.0:50051", "0.0.0.0:50051", "secret")


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_times_of_transfers_are_checked(seconds: float) -> None:
    right = worker("127.0.0.1:50051", "127.0.0.1:50051")
    with pytest.raises(StartupError, match="transfer-stall-timeout must be a number of seconds above 0"):
        replace(right, transfer_stall_timeout_s=seconds)
    if seconds != math.inf:  # the usual deadlines are shorter than that
        with pytest.raises(StartupError, match="transfer-deadline must be a number of seconds above 0"):
            replace(right, transfer_deadlines=TransferDeadlines.at_most(seconds))


def test_white_space_around_the_token_is_not_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CLUSTER_TOKEN", " from a file\n")
    assert cluster_token() == "from a file"


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(worker("127.0.0.1:50051", "127.0.0.1:50051", "secret"))


def test_engine_settings_are_checked() -> None:
    with pytest.raises(StartupError, match="unknown dtype 'int3': use auto, fp32, bf16, fp16"):
        EngineConfig(dtype="int3")
    with pytest.raises(StartupError, match="unknown dtype 'bf16'"):  # a short form, for people
        EngineConfig(dtype="bf16")
    with pytest.raises(StartupError, match="max-num-seqs must be at least 1, but is 0"):
        EngineConfig(max_num_seqs=0)
    with pytest.raises(StartupError, match="max-model-len"):
        EngineConfig(max_model_len=0)


def test_a_router_of_workers_of_both_roles() -> None:
    addresses = ("unix:/w0", "unix:/w1")
    config = RouterConfig(Path("model"), ("m",), (), (), worker_addresses=addresses)
    assert config.worker_addresses == addresses
    assert RouterConfig(Path("model"), ("m",), (), ("unix:/d",), worker_addresses=addresses)
    with pytest.raises(StartupError, match="is not an address"):
        RouterConfig(Path("model"), ("m",), (), (), worker_addresses=("worker",))


def test_a_worker_is_named_once() -> None:
    with pytest.raises(StartupError, match=r"unix:/w is named 2 times: .* one of both roles with --worker"):
        RouterConfig(Path("model"), ("m",), ("unix:/w",), ("unix:/w",))


def test_a_role_is_one_of_three() -> None:
    assert worker("127.0.0.1:1", "127.0.0.1:1", role="both").role == "both"
    with pytest.raises(StartupError, match="unknown role 'cook': use prefill, decode, both"):
        worker("127.0.0.1:1", "127.0.0.1:1", role="cook")  # type: ignore[arg-type]


def test_a_router_needs_workers_of_both_kinds_and_two_ports() -> None:
    with pytest.raises(StartupError, match=r"--decode ADDRESS, or a worker .* --worker ADDRESS"):
        RouterConfig(Path("model"), ("m",), ("unix:/p",), ())
    with pytest.raises(StartupError, match="can't share port 8000"):
        RouterConfig(Path("model"), ("m",), ("unix:/p",), ("unix:/d",), grpc_port=8000)
    with pytest.raises(StartupError, match="is not an address"):
        RouterConfig(Path("model"), ("m",), ("prefill",), ("unix:/d",))
