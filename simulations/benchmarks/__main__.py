"""`python -m locum.simulations.benchmarks [NAME …]`: runs the benchmarks and prints one table each.

Rows are told on standard error as they are measured: the whole of it takes a quarter of an hour.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from locum.simulations.benchmarks import (
    cohort,
    deid,
    engine_overhead,
    heart_disease,
    ingest,
    log,
    pacs,
    private_training,
    reading,
    secure_sum,
    training_throughput,
    wire,
)

_ALL = {
    "engine_overhead": engine_overhead.measure,
    "training_throughput": training_throughput.measure,
    "wire": wire.measure,
    "secure_sum": secure_sum.measure,
    "private_training": private_training.measure,
    "heart_disease": heart_disease.measure,
    "log": log.measure,
    "pacs": pacs.measure,
    "deid": deid.measure,
    "ingest": ingest.measure,
    "reading": reading.measure,
    "cohort": cohort.measure,
}


def main(names: list[str]) -> int:
    """Runs the benchmarks named, or all; returns the exit code."""
    console, progress = Console(), Console(stderr=True)
    unknown = sorted(set(names) - set(_ALL))
    if unknown:
        console.print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(_ALL)}")
        return 2
    for name in names or _ALL:
        table = Table("what", "measured", "unit", title=name)
        for row in _ALL[name]():
            progress.print(f"{row.what}: {row.value:.4g} {row.unit}", highlight=False)
            table.add_row(row.what, f"{row.value:.4g}", row.unit)
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
