"""`baton prefill`, `baton decode` and `baton worker`: one worker process."""

from collections.abc import Mapping
from typing import Any

from baton.config import Role, WorkerConfig, available_cores, worker_name
from baton.option import make_config, settings_of
from baton_launch.foreign_options import answers_foreign_options
from baton_launch.listening import advertised_address
from baton_launch.logging_setup import set_up_logging
from baton_launch.model_source import find_model
from baton_launch.options import Command, ExitWithParent, cluster_token, takes_options
from baton_launch.parent_death import exit_with_parent as die_with_parent


def worker_command(fixed_role: Role | None = None) -> Command:
    """The command that runs one worker of this role; without one, `--role` names it."""
    fixed = {} if fixed_role is None else {"role": fixed_role}
    settings = [setting for setting in settings_of(WorkerConfig) if setting.field not in fixed]

    @answers_foreign_options("--model")
    @takes_options(settings)
    def command(exit_with_parent: ExitWithParent = None, **values: Any) -> None:
        if exit_with_parent is not None:
            die_with_parent(exit_with_parent)
        run_worker(worker_config({"role": "both", **values, **fixed}))

    return command


def worker_config(values: Mapping[str, Any]) -> WorkerConfig:
    """The settings that the options say; raises StartupError."""
    advertise = values.get("advertise_address") or advertised_address(values["listen_address"])
    found = {
        "model_dir": find_model(values["model_dir"]).directory,
        "advertise_address": advertise,
        "worker_id": values.get("worker_id") or worker_name(advertise),
        "cluster_token": cluster_token(),
    }
    return make_config(WorkerConfig, {"num_threads": available_cores(), **values, **found})


def run_worker(config: WorkerConfig) -> None:
    """Serve until the process is asked to stop."""
    set_up_logging(config.log_level)
    if config.role == "prefill":
        from baton_prefill_service.main import run
    elif config.role == "decode":
        from baton_decode_service.main import run
    else:
        from baton_both_service.main import run
    run(config)
