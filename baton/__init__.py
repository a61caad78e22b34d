"""Serves large language models with prefill and decode on separate servers.

`from baton import LLM, SamplingParams` answers prompts in one's own process: docs/offline.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton_offline.async_llm import AsyncLLM
    from baton_offline.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from baton_offline.llm import LLM
    from baton_offline.outputs import CompletionOutput, RequestOutput
    from baton_offline.sampling_params import (
        RepetitionDetectionParams,
        SamplingParams,
        StructuredOutputsParams,
    )

    __version__: str

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "RepetitionDetectionParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

# Where each name comes from, when somebody asks for it: `import baton` itself is to cost nothing.
_MODULES = {
    "LLM": "baton_offline.llm",
    "AsyncLLM": "baton_offline.async_llm",
    "BeamSearchOutput": "baton_offline.beam_search",
    "BeamSearchParams": "baton_offline.beam_search",
    "BeamSearchSequence": "baton_offline.beam_search",
    "CompletionOutput": "baton_offline.outputs",
    "RequestOutput": "baton_offline.outputs",
    "RepetitionDetectionParams": "baton_offline.sampling_params",
    "SamplingParams": "baton_offline.sampling_params",
    "StructuredOutputsParams": "baton_offline.sampling_params",
}


def __getattr__(name: str) -> Any:
    """The names of _MODULES, and `__version__`, which takes a moment to find and is seldom asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("baton-serve")
    if name not in _MODULES:
        raise AttributeError(f"module 'baton' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
