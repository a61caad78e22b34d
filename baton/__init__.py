"""Serves large language models with prefill and decode on separate servers."""


def __getattr__(name: str) -> str:
    """`__version__`, which takes a moment to find and is seldom asked for."""
    if name != "__version__":
        raise AttributeError(f"module 'baton' has no attribute '{name}'")
    from importlib.metadata import version

    return version("baton-serve")
