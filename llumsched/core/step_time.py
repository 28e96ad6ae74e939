"""The fitted step-time model, and what it predicts for a prompt or a decode.

    step = base + prefill_token * prompt tokens in the step + running * running requests

The form and the default coefficients are those of the evaluation in Llumnix (OSDI '24): LLaMA-7B on
an A10. Where an instance has reported the duration of a step, the report replaces the model's own
idea of it (the snapshot's column `decode_step_s`). Columns have one row per instance.

Invariant: pure; more load never predicts less time. This module does not know deadlines.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]
AnyColumn = npt.NDArray[np.float64] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeModel:
    """Coefficients, in seconds."""

    base_s: float = 0.0432
    prefill_token_s: float = 0.000203
    running_s: float = 0.00027

    def prefill_s(
        self, num_tokens: AnyColumn, step_s: Column, max_num_batched_tokens: AnyColumn
    ) -> Column:
        """Time until `num_tokens` prompt tokens are computed in chunks beside the decodes."""
        num_steps = np.ceil(num_tokens / max_num_batched_tokens)
        result: Column = self.prefill_token_s * num_tokens + num_steps * step_s
        return result


DEFAULT_STEP_TIME = StepTimeModel()
