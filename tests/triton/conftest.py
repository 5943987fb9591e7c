"""Tests of the kernels in the interpreter of Triton, on a CPU, with TRITON_INTERPRET=1.

Triton is installed apart from the other packages: where it can be imported, the CPU build of vLLM
takes other paths. The interpreter computes with numpy, which warns of every −inf and NaN.
"""

import os
from importlib.util import find_spec

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
