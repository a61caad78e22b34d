"""All tests here need Triton, and none of them a GPU; on one they compile the kernels and run them there."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
