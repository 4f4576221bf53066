"""What `slidr doctor` looks at; every check answers with findings and raises nothing.

The cheap checks look at this machine and at a handful of files, within about a second and without starting Ray. The
thorough ones list the data root, open many files and ask the cluster.
"""

from __future__ import annotations

import sys

from slidr.config import Config
from slidr.preflight import inputs, machine, outputs
from slidr.preflight.findings import Finding, Stage
from slidr.preflight.plan import has_search


def cheap(config: Config | None, stage: Stage | None = None) -> list[Finding]:
    """The checks that every job starts with; `stage` says what the job needs to find."""
    findings = [machine.python(sys.version_info[:2]), machine.torch_build(), *machine.packages(machine.installed)]
    if config is None:
        return findings
    if stage == "frames":  # nothing of ours is there yet
        return [*findings, *outputs.folders(config, stage)]
    runs_network = stage != "superpixels"  # any CPUs will do for those
    if runs_network:
        search = stage == "tune" or (stage is None and has_search(config))
        findings += [machine.engine(config), machine.gpu(config), machine.room(config, search)]
        findings += inputs.weights(config, search)
    frames = inputs.frame_table(config)
    findings.append(frames)
    if frames.status != "error":
        needs = inputs.needs_of(config, stage)
        if needs == "sweeps and labels":
            findings.append(inputs.labels(config))
        findings.append(inputs.data_root(config, inputs.FEW, needs))
        if needs == "sweeps and images":
            findings.append(inputs.superpixels(config, inputs.FEW, needed=stage is not None))
    findings += [*outputs.folders(config, stage), *outputs.disk(config, stage)]
    return [*findings, outputs.tracking_server(config, stage)] if runs_network else findings


def thorough(config: Config) -> list[Finding]:
    """The checks that take their time: every file by name, many opened, every map, the cluster."""
    findings = [machine.cluster(config, has_search(config))]
    if inputs.frame_table(config).status == "error":
        return findings
    needs = inputs.needs_of(config)
    findings += [inputs.data_root(config, inputs.MANY, needs, whole=True), inputs.listing(config, needs)]
    if needs == "sweeps and images":
        findings.append(inputs.all_superpixels(config))
    return findings
