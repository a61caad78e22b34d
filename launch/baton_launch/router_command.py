"""`baton router`: one router process."""

import logging
from typing import Any

from baton.config import RouterConfig
from baton.option import make_config, settings_of
from baton_launch.foreign_options import answers_foreign_options
from baton_launch.listening import warning_of_strangers
from baton_launch.logging_setup import set_up_logging
from baton_launch.model_source import find_model
from baton_launch.options import ExitWithParent, cluster_token, takes_options
from baton_launch.parent_death import exit_with_parent as die_with_parent

_logger = logging.getLogger(__name__)


@answers_foreign_options("--model")
@takes_options(settings_of(RouterConfig))
def router(exit_with_parent: ExitWithParent = None, **values: Any) -> None:
    """Run one router: the HTTP and gRPC front of the workers that it is told of.

    It needs a prefill and a decode server, or a worker of both roles, and takes any mixture.
    """
    if exit_with_parent is not None:
        die_with_parent(exit_with_parent)
    source = find_model(values["model_dir"], with_weights=False)
    found = {
        "model_dir": source.directory,
        "served_model_names": values.get("served_model_names") or (source.name,),
        "cluster_token": cluster_token(),
    }
    config = make_config(RouterConfig, values | found)
    set_up_logging(config.log_level)
    if (warning := warning_of_strangers(config.host)) is not None:
        _logger.warning("%s", warning)
    from baton_router.main import run

    run(config)
