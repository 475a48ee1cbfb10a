"""Batches that a thread reads ahead of training, a block of them at a time."""

import math
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from classp_jax.continual.data.arrays import generator
from classp_jax.continual.data.batches import Batches
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.train.places import Place
from classp_jax.continual.train.plan import Examples, Plan

_PASS, _KEPT = 109, 110
"""Keys of :func:`generator`, one for each use."""

BLOCK_BYTES = 32 * 2**20
"""About as much goes to the device at once. Up to four blocks are in memory: the one in
training, one that waits, one that is being read, and one on its way to the device."""


def block_steps(example: Any, batch_size: int, longest: int) -> int:
    """How many steps a block lasts."""
    batch = batch_size * max(math.prod(example.shape) * example.dtype.itemsize, 1)
    return max(1, min(longest, BLOCK_BYTES // batch))


def block_shapes(example: Any, batch_size: int, steps: int) -> Examples:
    """What a block looks like: inputs stand where others have rows."""
    shape, numbers = (steps, batch_size), np.dtype(np.int32)
    return Examples(
        *(
            jax.ShapeDtypeStruct(s, dtype)  # pyright: ignore[reportArgumentType]
            for s, dtype in (
                ((*shape, *example.shape), example.dtype),
                (shape, numbers),
                (shape, numbers),
            )
        )
    )


def block_sample(example: Any, count: int) -> Examples:
    """What :meth:`Feed.sample` looks like."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
        block_shapes(example, count, 1),
    )


class Feed:
    """The blocks of one run's task, in their order.

    Args:
      plan: the run's plan.
      task: the number of the task.
      name: what messages call the task.
      example: shape and dtype of one input.
      steps: how many steps a block lasts.
      kept: how many random examples of the task to keep for its end.
      place: where blocks go.
    """

    def __init__(
        self,
        plan: Plan,
        task: int,
        name: str,
        example: Any,
        steps: int,
        kept: int,
        place: Place,
    ):
        self.steps = steps
        self._plan, self._task, self._example = plan, task, example
        self._name, self._place = name, place
        batches: Batches = plan.feeds[task]
        self._share = place.share if batches.in_shares else (0, 1)
        rank, shares = self._share
        self._batch, self._sample = plan.batch_size // shares, kept
        if shares > 1:
            # Every device gets as many.
            kept = -(-kept // len(place.devices)) * len(place.devices) // shares
        own = [rank] if rank else []
        self._kept = _Kept(kept, example, generator(plan.seed, _KEPT, task, *own))
        self._number, self._block = -1, None
        self._rest: Any = ((), ())
        self._waiting: queue.Queue[Any] = queue.Queue(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="feed", daemon=True)
        self._thread.start()

    def block(self, step: int) -> Any:
        """The block of a step; steps may not go back."""
        while self._number < step // self.steps:
            # Let go of the old one first: it is not needed beside the new one.
            self._block = None
            found = self._waiting.get()
            if isinstance(found, BaseException):
                raise found
            self._block = found
            self._number += 1
        return self._block

    def sample(self) -> Examples:
        """Random examples of those that have been read, as many as wanted."""
        found, count = self._kept.examples(self._task), self._sample
        if self._share[1] == 1:
            return found
        found = self._place.put_shares(found)
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), found
        )
        first = jax.jit(
            lambda examples: jax.tree.map(lambda leaf: leaf[:count], examples),
            out_shardings=self._place.shardings(shapes),
        )
        return first(found)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            put = self._place.put if self._share[1] == 1 else self._place.put_shares
            for block in self._blocks():
                if not self._give(put(block)):
                    return
        except ContinualError as error:
            self._give(error)
        except Exception as error:
            line = " ".join(str(error).split())
            wrapped = ContinualError(
                f"{self._name}: reading its batches fails with "
                f"{type(error).__name__}: {line}"
            )
            wrapped.__cause__ = error
            self._give(wrapped)
        except BaseException as error:
            # Such as SystemExit: training would wait for ever.
            self._give(error)

    def _give(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _blocks(self) -> Iterator[Examples]:
        batch, left = self._batch, self._plan.steps[self._task]
        examples = self._examples(left * batch)
        while left:
            x, y = self._take(examples, min(self.steps, left) * batch)
            rest = self.steps - len(y) // batch
            x = x.reshape(-1, batch, *x.shape[1:])
            y = np.pad(y.reshape(-1, batch), ((0, rest), (0, 0)))
            x = np.pad(x, ((0, rest), *((0, 0) for _ in x.shape[1:])))
            left -= self.steps - rest
            yield Examples(x, y, np.full_like(y, self._task))

    def _take(self, examples: Iterator[Any], count: int) -> tuple[Any, Any]:
        """The next so many examples, from one or several batches."""
        x = np.empty((count, *self._example.shape), self._example.dtype)
        y = np.empty(count, np.int32)
        filled = 0
        while filled < count:
            if not len(self._rest[1]):
                self._rest = next(examples)
            part_x, part_y = (part[: count - filled] for part in self._rest)
            x[filled : filled + len(part_y)] = part_x
            y[filled : filled + len(part_y)] = part_y
            filled += len(part_y)
            self._rest = tuple(part[len(part_y) :] for part in self._rest)
        return x, y

    def _examples(self, total: int) -> Iterator[Any]:
        """The examples of all passes, those left out that do not fill a last batch."""
        batches: Batches = self._plan.feeds[self._task]
        whole = self._plan.steps_per_pass[self._task] * self._batch
        share = self._share if batches.in_shares else ()
        for number in range(math.ceil(total / whole)):
            left = whole
            rng = generator(self._plan.seed, _PASS, self._task, number)
            for given in batches.read(rng, *share):
                x, y = self._checked(given)
                if number == 0:
                    self._kept.add(x[:left], y[:left])
                yield x[:left], y[:left]
                left -= min(left, len(y))
                if not left:
                    break
            if left:
                raise ContinualError(
                    f"{self._name}: a pass ends after {whole - left:,} of the "
                    f"{len(batches) // self._share[1]:,} examples that were announced"
                )

    def _checked(self, given: Any) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ContinualError(
                f"{self._name}: each batch must be a pair (x, y), got "
                f"{type(given).__name__}"
            )
        x, y = (np.asarray(part) for part in given)
        shape, dtype = self._example.shape, self._example.dtype
        if y.ndim == 0 or y.size != len(y):
            raise ContinualError(
                f"{self._name}: labels must be one number for each example, a batch "
                f"has {list(y.shape)}"
            )
        if x.dtype.kind != dtype.kind or x.size != len(y) * math.prod(shape):
            raise ContinualError(
                f"{self._name}: a batch has inputs {x.dtype} {list(x.shape)} and "
                f"{len(y)} labels; the test examples are {dtype} {list(shape)} each"
            )
        if y.dtype.kind not in "iub":
            raise ContinualError(
                f"{self._name}: labels must be integers, a batch has {y.dtype}"
            )
        outputs = self._plan.classes.shape[1]
        if len(y) and not (y.min() >= 0 and y.max() < outputs):
            raise ContinualError(
                f"{self._name}: a batch has labels from {y.min()} to {y.max()}; there "
                f"are {outputs} outputs"
            )
        return x.reshape(len(y), *shape).astype(dtype), y.reshape(-1).astype(np.int32)


class _Kept:
    """A uniform sample of the examples that went by (Vitter's algorithm R).

    Examples that are not finite are left out: a step on them can be undone, what they
    would make of the end of a task cannot.
    """

    def __init__(self, count: int, example: Any, rng: np.random.Generator):
        self.x = np.zeros((count, *example.shape), example.dtype)
        self.y = np.zeros(count, np.int32)
        self.seen, self.rng = 0, rng

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        if x.dtype.kind == "f":
            finite = np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
            x, y = x[finite], y[finite]
        position = self.seen + np.arange(len(y))
        place = np.where(
            position < len(self.y), position, self.rng.integers(0, position + 1)
        )
        stays = place < len(self.y)
        # Of several for one place the last one stays.
        self.x[place[stays]], self.y[place[stays]] = x[stays], y[stays]
        self.seen += len(y)

    def examples(self, task: int) -> Examples:
        count = min(self.seen, len(self.y))
        indices = np.resize(np.arange(count), len(self.y))
        y = self.y[indices]
        return Examples(self.x[indices], y, np.full_like(y, task))
