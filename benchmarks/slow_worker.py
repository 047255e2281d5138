"""The measuring worker with a step that was made worse on purpose, in place of ``validator.measure.worker``.

``SLOWER=0.05`` makes every step 5 % longer (it waits that part of what the step really took, inside the timed step);
``MORE_BYTES=n`` keeps one more tensor of n bytes alive during the step. Only benchmarks and tests use it.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from validator.measure import worker


def worse(train_step: Any) -> Any:
    """``train_step`` with the delay and the tensor that the environment asks for."""
    import torch

    slower, n_bytes = float(os.environ.get("SLOWER", "0")), int(os.environ.get("MORE_BYTES", "0"))

    def step(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        more = torch.empty(n_bytes, dtype=torch.uint8) if n_bytes else None
        result = train_step(*args, **kwargs)
        del more
        end = time.perf_counter() + slower * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return result

    return step


if __name__ == "__main__":
    from runtime import session

    session._train_step = worse(session._train_step)
    sys.exit(worker.main())
