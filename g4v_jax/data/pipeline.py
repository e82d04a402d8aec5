"""The pipeline: records to a checkpointable stream of `Batch`es of numpy arrays, mixed from tasks by weight.

    records -> a shuffled, repeated stream of each task -> mixed by weight -> examples, decoded in threads
            -> packed into rows -> batches, made ahead of the step

The order is a function of the seed and the number of shards alone, and what is random in an example of (seed, task,
place in the task's stream); neither the number of threads nor a resume changes them. Each shard packs its own rows, so
that processes may share them out in any way and the batches stay the same. Decoding and packing share one process, because
PyAV lets other threads run, and because a stream through worker processes would depend on their number.
"""

import json
import logging
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import grain
import jax
import numpy as np

from g4v_jax.data import records
from g4v_jax.data.pack import Example, RowShape, pack
from g4v_jax.data.records import Record
from g4v_jax.data.tasks import TASKS, Footage, Setting
from g4v_jax.data.text import Clip, Tokenizer
from g4v_jax.errors import UserError, nearest
from g4v_jax.types import Batch

GIVE_UP_AFTER = 32  # records of a task that all failed, none succeeded: then the configuration is at fault

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """What to read and how to mix it. `open` starts it."""

    records: str  # folder of a data set made by `records.build`
    mixture: Mapping[str, float]  # task or task/kind -> weight; counts examples, not tokens; 0: off
    seed: int = 0
    split: str = "train"
    threads: int = 4  # that build examples; decoding is nearly all of it
    bins: int = 16  # rows packed at a time, see `pack.pack`
    cache_mib: int = 1024  # of decoded frames kept in memory
    prefetch: int = 2  # batches made ahead
    shift: int = 0  # pixels, see `tasks.Setting`
    shards: int = 0  # streams that fill a batch's rows; every process takes as many. 0: one a process

    def open(
        self, tokenizer: Tokenizer, shape: RowShape, process_index: int = 0, process_count: int = 1
    ) -> "Batches":
        """Start the stream of this process's rows: `shape.rows` rows of the whole batch over `process_count`.

        Raises UserError for an unknown task or split, for a task without records, and where rows or shards do not
        divide.
        """
        if self.split not in records.SPLITS:
            raise UserError(f"data: unknown split {self.split!r}{nearest(self.split, records.SPLITS)}")
        shards = self.shards or process_count
        if shards < 1 or shards % process_count:
            raise UserError(f"data.shards: {shards} shards do not divide over {process_count} process(es)")
        if shape.rows % shards:
            which = "shards (data.shards)" if self.shards else "processes"
            raise UserError(f"data: {shape.rows} rows do not divide over {shards} {which}")
        shape = replace(shape, rows=shape.rows // shards)
        own = shards // process_count
        cache = FrameCache(self.cache_mib * 2**20, records.footage)
        setting = Setting(tokenizer, shape, self.split, cache.footage, self.shift)
        weights, present = self._weights(), records.splits(self.records)
        tasks = [_TaskStream(name, self.seed, self._groups(name, present), setting) for name in weights]
        threads = max(1, self.threads // own)

        def stream(shard: int) -> grain.IterDataset:
            orders = [grain.MapDataset.range(len(task)).shuffle(seed=task.shuffle_seed).repeat() for task in tasks]
            parts = [order.map_with_index(task.build)[shard::shards] for task, order in zip(tasks, orders)]
            examples = grain.MapDataset.mix(parts, list(weights.values())).to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
            )
            return grain.experimental.ThreadPrefetchIterDataset(
                pack(examples, shape, self.bins), prefetch_buffer_size=self.prefetch
            )

        source = records.summary(self.records)["source"]
        about = [self.seed, self.split, self.bins, weights, asdict(shape), source, tokenizer.vocab_size]
        identity = zlib.crc32(json.dumps(about).encode())
        streams = {shard: stream(shard) for shard in range(process_index * own, (process_index + 1) * own)}
        return Batches(streams, setting.counts, cache, shards, identity)

    def _weights(self) -> dict[str, float]:
        for name, weight in self.mixture.items():
            task = name.partition("/")[0]
            if task not in TASKS:
                raise UserError(f"data: unknown task {task!r} in the mixture{nearest(task, TASKS)}")
            if weight < 0:
                raise UserError(f"data: the weight of {name!r} is {weight}; it must not be negative")
        weights = {name: float(self.mixture[name]) for name in sorted(self.mixture) if self.mixture[name]}
        if not weights:
            raise UserError(f"data: the mixture is empty; give a weight to one of {', '.join(TASKS)}")
        return weights

    def _groups(self, name: str, present: Mapping[str, int]) -> list[records.Split]:
        task, _, kind = name.partition("/")
        groups = [group for group in TASKS[task].groups if f"{self.split}_{group}" in present]
        if not groups:
            wanted = " or ".join(f"{self.split}_{group}" for group in TASKS[task].groups)
            raise UserError(
                f"data: task {task!r} needs {wanted}, and {self.records} has only {', '.join(present)}; "
                "build records that have them or set the task's weight to 0"
            )
        having = [group for group in groups if kind in records.kinds(self.records, self.split, group)]
        return [records.read(self.records, self.split, group, kind) for group in having or groups]  # no such kind: reading says so


class Batches(Iterator[Batch]):
    """Endless batches, each leaf a numpy array: the rows of this process's shards, one after another.

    `counts` grows with what was lost on the way ("skipped" examples, "cut_tokens"), `cache` knows what was decoded.
    """

    def __init__(
        self, streams: Mapping[int, grain.IterDataset], counts: Counter, cache: "FrameCache", shards: int, identity: int
    ):
        """`streams`: by the shard, of `shards` in all processes."""
        self._streams = {str(shard): iter(stream) for shard, stream in streams.items()}
        self._shards, self._identity = shards, identity
        self.counts, self.cache = counts, cache

    def __next__(self) -> Batch:
        parts = [next(stream) for stream in self._streams.values()]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def get_state(self) -> dict:
        """Where the shards of this process stand after the batches taken so far, as plain JSON values."""
        streams = {shard: stream.get_state() for shard, stream in self._streams.items()}
        return {"shards": self._shards, "identity": self._identity, "streams": streams}

    def set_state(self, state: dict) -> None:
        """Go to a state of all shards. With the same pipeline and shards the batches that follow are exactly the same.

        With another number of shards, mixture, row or data set the stream goes on at the same number of examples,
        but up to `bins` rows of them may come again; the log says so.
        """
        streams = state["streams"]
        if (state["shards"], state["identity"]) != (self._shards, self._identity):
            place = sum(stream["parent"]["next_index"] for stream in streams.values()) // self._shards
            streams = dict.fromkeys(self._streams, {"parent": {"next_index": place}, "next_row": 0, "counter": 0})
            log.warning(
                "the data, its mixture or the number of its shards differ from the saved ones: "
                "going on at example %d of each shard, a few may repeat",
                place,
            )
        for shard, stream in self._streams.items():
            stream.set_state(streams[shard])

    def close(self) -> None:
        """Stop the threads and let the buffers go; the stream cannot be used after it."""
        for stream in self._streams.values():
            stream.close()
        del self._streams


class _TaskStream:
    """The examples of one task by their place in its endless stream; safe to use from several threads."""

    def __init__(self, name: str, seed: int, groups: Sequence[records.Split], setting: Setting):
        self._name, self._groups, self._setting = name, groups, setting
        self._task = TASKS[name.partition("/")[0]]
        self._entropy = [seed, zlib.crc32(name.encode())]
        self._lock = threading.Lock()
        self._built = False
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups)

    @property
    def shuffle_seed(self) -> int:
        return int(np.random.SeedSequence(self._entropy).generate_state(1)[0])

    def build(self, place: int, index: int) -> Example | None:
        """The example at `place`, made from record `index`; None, which the stream skips, where that fails."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._entropy, place])))
        setting = replace(self._setting, counts=Counter())
        try:
            example = self._task.build(self._record(index), rng, setting)
        except UserError as error:
            self._fail(index, error)
            return None
        with self._lock:
            self._built = True
            self._setting.counts.update(setting.counts)
        return example

    def _fail(self, index: int, error: UserError) -> None:
        with self._lock:
            self._setting.counts["skipped"] += 1
            if index not in self._failed:
                self._failed.add(index)
                log.warning("%s: example skipped: %s", self._name, error)
            if not self._built and len(self._failed) >= min(len(self), GIVE_UP_AFTER):
                raise UserError(f"data: no example of task {self._name!r} could be made; the last: {error}") from error

    def _record(self, index: int) -> Record:
        for group in self._groups:
            if index < len(group):
                return group[index]
            index -= len(group)
        raise IndexError(index)


class FrameCache:
    """Decoded frames, least recently used first out, within `capacity` bytes; safe to use from several threads."""

    def __init__(self, capacity: int, source: Footage):
        self.capacity, self.source = capacity, source
        self.used = 0  # bytes
        self.decoded = 0  # clips that were not found here
        self._clips: OrderedDict[tuple, Clip] = OrderedDict()
        self._lock = threading.Lock()
        self._overflowed = False

    def footage(self, record: Record, index: int, frames: int, height: int, width: int) -> Clip:
        """What `source` gives, kept by the video's checksum. The arrays are shared, so they are read-only."""
        key = (record.sha256[index], frames, height, width)
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
                return self._clips[key]
        clip = self.source(record, index, frames, height, width)  # outside the lock: others go on
        for array in clip:
            array.setflags(write=False)
        with self._lock:
            self.decoded += 1
            if key not in self._clips:
                self._clips[key] = clip
                self.used += _size(clip)
            while self.used > self.capacity:
                self.used -= _size(self._clips.popitem(last=False)[1])
                if not self._overflowed:
                    self._overflowed = True
                    limit = self.capacity // 2**20
                    log.warning("decoded clips do not fit cache_mib=%d: some are decoded again each epoch", limit)
        return clip


def _size(clip: Clip) -> int:
    return sum(array.nbytes for array in clip)
