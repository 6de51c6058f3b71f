"""How long to wait before the next try, for loops that cannot be written as one retried call.

The policy is tenacity's.
"""

from __future__ import annotations

import tenacity


class Backoff:
    """Waits that grow from `initial_s` to `max_s`, with jitter so that a thousand ranks do not come
    back in step.
    """

    def __init__(self, initial_s: float = 0.1, max_s: float = 1.0) -> None:
        self._wait = tenacity.wait_exponential(
            multiplier=initial_s, max=max_s
        ) + tenacity.wait_random(0, initial_s)
        self.reset()

    def reset(self) -> None:
        self._state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})

    def next_s(self) -> float:
        wait_s = float(self._wait(self._state))
        self._state.attempt_number += 1
        return wait_s
