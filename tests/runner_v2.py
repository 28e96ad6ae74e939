"""Model runner V2, which vLLM uses on GPUs, on a CPU: its kernels run in Triton's interpreter.

vLLM supports V2 on a CPU where Triton has a backend for it. None is published, but the interpreter
needs none: that there is one is all that vLLM has to believe. Slow, and only for a whole process,
since vLLM looks once: ``LLUMSCHED_MODEL_RUNNER=2 pytest tests/migration/test_exact.py`` (``make
test-v2``). What runs is V2's own code, but for CUDA graphs, the attention of CPUs, and the kernel
of top-k and top-p, which the interpreter cannot run: vLLM's own in torch is in its place.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import SimpleNamespace
from typing import Any

IS_ON = os.environ.get("LLUMSCHED_MODEL_RUNNER") == "2"


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return False  # else Triton would compile for it


def switch_on() -> None:
    """Make V2 the runner of every engine of this process; before vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    backends: Any = import_module("triton.backends")
    backends.backends.setdefault("cpu", SimpleNamespace(driver=_Driver, compiler=None))
    interpreter: Any = import_module("triton.runtime.interpreter")
    _with_masks_of_truths(interpreter.InterpreterBuilder)
    import_module("vllm.v1.sample.ops.topk_topp_sampler").HAS_TRITON = False  # type: ignore[attr-defined]


def _with_masks_of_truths(builder: Any) -> None:
    """Let masks be integers, as kernels of vLLM have them; the interpreter knows truth values."""
    store = builder.create_masked_store

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_store = create_masked_store
