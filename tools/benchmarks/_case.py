"""The contract between ``tools/benchmark.py`` and a benchmark path, ``tools/benchmarks/<path>.py``.

A path is a module whose docstring opens with the workload in one line (object count, candidates,
where the tensors live) and which defines ``CASES: list[Case]``. It imports this module by
``from _case import Case, Floor, Sides``: the harness puts this folder on the import path. Modules
whose name starts with an underscore are not paths.

A peer that may be missing is imported inside ``build``; the harness then says which one is
missing and goes on with the next case.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
class Floor:
    """What a case has to reach on one device; ``None`` asks for nothing.

    Attributes:
        ratio: Least ratio of peer time to our time.
        memory: Largest share of the peer's peak bytes that ours may take.
        syncs: Largest number of host synchronisations on CUDA.
    """

    ratio: float | None = None
    memory: float | None = None
    syncs: int | None = None


@dataclass(frozen=True)
class Case:
    """One named workload of a path.

    Attributes:
        name: Unique within its path; says what makes this workload different from its siblings.
        build: Takes a device (``'cpu'`` or ``'cuda'``), seeds its own generators, and returns the
            sides. Called afresh in every process, so two calls must give the same inputs.
        floors: What has to be reached, by device; stated beside the figure in the tables.
    """

    name: str
    build: Callable[[str], Sides]
    floors: Mapping[str, Floor] = field(default_factory=dict)
