"""`baton router`: one router process."""

from typing import Annotated

import typer

from baton.config import RouterConfig
from baton_launch import options
from baton_launch.logging_setup import set_up_logging
from baton_launch.model_source import find_model
from baton_launch.parent_death import exit_with_parent as die_with_parent

Model = Annotated[
    str,
    typer.Option(
        help="Model directory or Hugging Face id, as the workers'; only headers of its weights are read."
    ),
]
PrefillAddresses = Annotated[
    list[str] | None, typer.Option("--prefill", metavar="ADDRESS", help="A prefill server; may be repeated.")
]
DecodeAddresses = Annotated[
    list[str] | None, typer.Option("--decode", metavar="ADDRESS", help="A decode server; may be repeated.")
]
WorkerAddresses = Annotated[
    list[str] | None,
    typer.Option("--worker", metavar="ADDRESS", help="A worker of both roles; may be repeated."),
]
MaxQueue = Annotated[int, typer.Option(help="Requests that may wait; more are refused.")]


def router(
    model: Model,
    prefill: PrefillAddresses = None,
    decode: DecodeAddresses = None,
    worker: WorkerAddresses = None,
    host: options.HttpHost = RouterConfig.host,
    port: options.HttpPort = RouterConfig.http_port,
    grpc_port: options.GrpcPort = RouterConfig.grpc_port,
    served_model_name: options.ServedModelName = None,
    max_queue: MaxQueue = RouterConfig.max_queue,
    max_model_len: options.MaxModelLen = None,
    exit_with_parent: options.ExitWithParent = None,
) -> None:
    """Run one router: the HTTP and gRPC front of the workers that it is told of.

    It needs a prefill and a decode server, or a worker of both roles, and takes any mixture.
    """
    if exit_with_parent is not None:
        die_with_parent(exit_with_parent)
    source = find_model(model)
    config = RouterConfig(
        model_dir=source.directory,
        served_model_name=served_model_name or source.name,
        prefill_addresses=tuple(prefill or ()),
        decode_addresses=tuple(decode or ()),
        worker_addresses=tuple(worker or ()),
        host=host,
        http_port=port,
        grpc_port=grpc_port,
        max_queue=max_queue,
        max_model_len=max_model_len,
        cluster_token=options.cluster_token(),
    )
    set_up_logging()
    from baton_router.main import run

    run(config)
