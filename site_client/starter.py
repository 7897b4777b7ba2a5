"""The first `site.yaml` of an agent: it runs as it is, and shows what a hospital can say."""

from __future__ import annotations

from pathlib import Path

from locum.common.durable import replace_file
from locum.site_client.configuration import FILE

_TEXT = """\
# This agent's configuration. The agent reads it when it starts. A key that it does not know is an error.

# Where the images are, once they are ingested: locum site ingest DATA.yaml --store STORE
stores: [store]

# What this hospital allows; it can only tighten a plan. Left out: no limit of its own, but
# that a secure sum has at least 3 sites.
#policy:
#  tasks: [classification, segmentation]
#  most_rounds: 100
#  min_sites: 5
#  require_secure_aggregation: true
#  hours: ["20:00-06:00"]
#  stewards: 2
#  release_training_loss: false

# What the training may take of this machine.
#resources: {threads: 4, memory_gib: 16, device: auto, nice: 10}

# The HTTP proxy on the way out.
"""


def write_starter(home: Path, proxy: str | None) -> bool:
    """Writes `site.yaml` and an empty store unless there is one; returns whether it did. Raises OSError."""
    path = home / FILE
    if path.exists():
        return False
    (home / "store").mkdir(exist_ok=True)
    line = f"proxy: {proxy}\n" if proxy is not None else "#proxy: http://proxy.hospital.example:3128\n"
    replace_file(path, (_TEXT + line).encode())
    return True
