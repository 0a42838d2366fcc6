"""The contract between a benchmark path (``tools/benchmarks/<path>.py``) and ``tools/benchmark.py``.

A path is a module whose docstring opens with the workload in one line (object count, candidates,
where the tensors live) and which defines ``CASES: list[Case]``. Modules whose name starts with an
underscore are not paths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sides:
    """Two implementations of one task, bound to the same inputs.

    Attributes:
        ours: Runs this project's implementation once and returns its result.
        peer: Runs the peer's implementation once and returns its result.
        parity: Takes ``(ours(), peer())``. Returns one sentence that says what was found equal and
            how closely; raises ``AssertionError`` where the two differ, in which case no time is
            taken.
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    parity: Callable[[Any, Any], str]


@dataclass(frozen=True)
class Case:
    """One named workload of a path.

    Attributes:
        name: Unique within its path; says what makes this workload different from its siblings.
        build: Takes a device (``'cpu'`` or ``'cuda'``), seeds its own generators, and returns the
            sides. Called afresh in every process, so two calls must give the same inputs.
    """

    name: str
    build: Callable[[str], Sides]
