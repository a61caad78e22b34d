"""All tests here need Triton, and those without the mark `gpu` no GPU."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
