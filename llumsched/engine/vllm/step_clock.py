"""When an engine's step under way ends, guessed from how long steps of as many tokens have taken.

The engine's thread notes every step; any thread may ask. Invariant: what is answered is a guess,
and nothing here makes a step wait. Where steps overlap, a step's tokens are those of the batch that
is made in it, which is computed in the next: the two are alike while a prompt lasts.
"""

from __future__ import annotations

from llumsched.engine.base import StepAhead

# Weight of the newest step of its size.
WEIGHT = 0.5


class StepClock:
    """Times are ``time.perf_counter()``."""

    def __init__(self) -> None:
        # Seconds a token, by the binary length of the number of tokens.
        self._token_s: dict[int, float] = {}
        self._begun_s: float | None = None
        self._num_tokens = 0
        self._is_idle = True

    def begin(self, now_s: float) -> None:
        """A step begins; its batch is not known yet."""
        self._begun_s = now_s

    def note_batch(self, num_tokens: int) -> None:
        """The batch of the step that has begun."""
        if num_tokens:
            self._num_tokens = num_tokens

    def end(self, now_s: float, *, was_computed: bool, has_more: bool) -> None:
        """The step is over; ``was_computed``: the model ran, ``has_more``: another one follows."""
        begun_s, self._begun_s = self._begun_s, None
        self._is_idle = not has_more
        if not was_computed or begun_s is None or not self._num_tokens:
            return
        token_s = (now_s - begun_s) / self._num_tokens
        size = self._num_tokens.bit_length()
        before_s = self._token_s.get(size, token_s)
        self._token_s[size] = before_s + WEIGHT * (token_s - before_s)

    def ahead(self, now_s: float) -> StepAhead:
        """The next boundary between two steps."""
        begun_s = self._begun_s
        if (self._is_idle and begun_s is None) or not self._token_s:
            return StepAhead()
        size = self._num_tokens.bit_length()
        nearest = min(tuple(self._token_s), key=lambda known: abs(known - size))
        step_s = self._token_s[nearest] * self._num_tokens
        elapsed_s = now_s - begun_s if begun_s is not None else step_s
        return StepAhead(ends_in_s=max(0.0, step_s - elapsed_s), step_s=step_s)
