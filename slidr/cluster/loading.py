"""Loading on Ray Data: samples are made by tasks all over the cluster and arrive in the planned order.

Every training worker streams a data set of its own, whose rows are exactly the frames its plan names. (Splitting
one shared stream would leave to timing which worker gets which frame; runs would neither repeat nor resume.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slidr.config import ClusterConfig
from slidr.data.loading import LocalLoader, Source, Subset
from slidr.data.plan import MicroBatch
from slidr.data.samples import row_to_sample, sample_to_row

# Samples of one execution of a data set, at least. An execution whose results all find room ends by itself; one that
# must wait for its reader spins in this process and takes the interpreter lock from training (measured: five times
# slower steps). So executions are short, and the next one starts while this one is read.
_CHUNK = 16
_SAMPLE_BYTES = 1 << 30  # heap a loading task may need: six full-size images, a sweep, and their crops


class RayLoader(LocalLoader):
    """One training worker's batches, made by Ray Data tasks on the cluster's loader CPUs."""

    def __init__(self, source: Source, cluster: ClusterConfig, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(source, rank, world_size)
        self.cluster = cluster

    def _load(self, subset: Subset, batches: Iterable[MicroBatch]) -> Iterator[Any]:
        chunks = self._chunks(iter(batches))
        with ThreadPoolExecutor(max_workers=1) as background:
            ahead = background.submit(self._start, subset, next(chunks, []))
            while True:
                chunk, rows = ahead.result()
                if not chunk:
                    return
                ahead = background.submit(self._start, subset, next(chunks, []))
                for batch in chunk:
                    mine = itertools.islice(rows, len(batch.frames))
                    yield self.source.collate([row_to_sample(row, self.source.sample_type) for row in mine])

    def _chunks(self, batches: Iterator[MicroBatch]) -> Iterator[list[MicroBatch]]:
        """Micro-batches by executions: enough samples to keep this worker's loader CPUs busy."""
        enough = max(_CHUNK, math.ceil(2 * self.cluster.loader_cpus / self._place[1]))
        chunk: list[MicroBatch] = []
        for batch in batches:
            chunk.append(batch)
            if sum(len(each.frames) for each in chunk) >= enough:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _start(self, subset: Subset, chunk: list[MicroBatch]) -> tuple[list[MicroBatch], Iterator[dict[str, Any]]]:
        """A chunk and its rows, already on their way: the first has arrived."""
        if not chunk:
            return [], iter(())
        rows = self._rows(subset, chunk)
        first = next(rows)
        return chunk, itertools.chain([first], rows)

    def _rows(self, subset: Subset, chunk: list[MicroBatch]) -> Iterator[dict[str, Any]]:
        """The samples of a chunk as rows, in order."""
        source = ray.put(self.source)
        todo = [{"index": i, "epoch": batch.epoch} for batch in chunk for i in batch.frames]

        def make(row: dict[str, Any]) -> dict[str, Any]:
            return sample_to_row(ray.get(source).sample(subset, int(row["index"]), int(row["epoch"])))

        share = self.cluster.loader_cpus / self._place[1]
        # Handed over as they are: Ray Data's range would be read by tasks of a whole CPU each.
        dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            make, memory=_heap(self.cluster), **self._room(share)
        )
        dataset.context.enable_progress_bars = False
        # A chunk is bound to fit; a budget that holds finished samples back only keeps the execution spinning.
        dataset.context.op_resource_reservation_enabled = False
        options = dataset.context.execution_options
        options.preserve_order = True
        if not self.cluster.elastic:
            options.resource_limits = ray.data.ExecutionResources(cpu=share)
        return iter(dataset.iter_rows())

    def _room(self, share: float) -> dict[str, Any]:
        """Where loading tasks run: on any node's free CPUs; of an elastic run, on those its worker keeps beside it.

        An elastic group takes every CPU that it can get, so tasks that asked for one would wait for ever.
        """
        if not self.cluster.elastic:
            return {"num_cpus": min(1.0, share)}
        here = ray.get_runtime_context().get_node_id()
        return {
            "num_cpus": 0,
            "concurrency": self.cluster.loader_cpus_per_worker,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True),
        }


def _heap(cluster: ClusterConfig) -> int:
    """Bytes that a loading task reserves: what it needs, or its share of a cluster that has less."""
    have = ray.cluster_resources().get("memory", 0) / (2 * cluster.loader_cpus)
    return int(min(_SAMPLE_BYTES, have))
