"""What `slidr doctor` looks at; every check answers with findings and raises nothing.

The cheap checks look at this machine and at a handful of files, within about a second and without starting Ray. The
thorough ones list the data root, open many files and ask the cluster.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from slidr.config import Config
from slidr.preflight import inputs, machine, outputs
from slidr.preflight.findings import Finding, Stage
from slidr.preflight.plan import has_search


def cheap(config: Config | None, stage: Stage | None = None) -> list[Finding]:
    """The checks that every job starts with; `stage` says what the job needs to find."""
    findings = [machine.python(sys.version_info[:2])]
    if stage == "frames" and config is not None:  # nothing of ours is there yet, and little is needed
        return [*findings, *outputs.folders(config, stage), *outputs.table_file(config)]
    findings += [machine.torch_build(), *machine.packages(machine.installed)]
    if config is None:
        return findings
    runs_network = stage != "superpixels"  # any CPUs will do for those
    if runs_network:
        search = stage == "tune" or (stage is None and has_search(config))
        findings += [machine.engine(config), machine.gpu(config), machine.room(config, search)]
        findings += inputs.weights(config, search)
    frames = inputs.frame_table(config)
    findings.append(frames)
    if frames.status == "error":
        root = inputs.root_folder(config)
        findings += [root] if root is not None else []
    else:
        needs = inputs.needs_of(config, stage)
        if needs.labels:
            findings.append(inputs.labels(config))
        if needs.images:
            findings.append(inputs.cameras(config))
        if stage is None:
            findings += inputs.scans(config)
        if stage in (None, "evaluate"):
            findings += inputs.submission(config)
        findings.append(inputs.data_root(config, inputs.FEW, needs))
        if needs == inputs.PRETRAINING:
            findings.append(inputs.pairs(config, inputs.FEW))
            findings.append(inputs.superpixels(config, inputs.FEW, needed=stage is not None))
    findings += [*outputs.disk(config, stage), *outputs.folders(config, stage)]
    return [*findings, outputs.tracking_server(config, stage)] if runs_network else findings


def thorough(config: Config) -> list[Finding]:
    """The checks that take their time: every file by name, many opened, every map, the cluster."""
    findings = [machine.cluster(config, has_search(config))]
    if inputs.frame_table(config).status == "error":
        return findings
    needs = inputs.needs_of(config)
    findings += [inputs.data_root(config, inputs.MANY, needs), inputs.listing(config, needs)]
    if needs == inputs.PRETRAINING:
        findings.append(inputs.pairs(config, inputs.MANY))
        maps = inputs.all_superpixels(config)
        if maps.status == "warning" and any(f.status == "error" for f in outputs.folders(config, "superpixels")):
            maps = replace(
                maps, status="error", next="choose another superpixels.folder, then slidr superpixels CONFIG"
            )
        findings.append(maps)
    return findings
