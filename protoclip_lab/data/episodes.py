"""Which pairs make up an episode: without replacement, over passes of the table."""

import numpy as np

from protoclip_lab.randomness import numpy_generator


class Episodes:
    """The sample ids of each episode, a function of (seed, episode) alone.

    Passes over the table are shuffled one by one and laid end to end; episode e (from 1) is the e-th
    stretch of ``size`` ids. Every sample is thus seen once before any is seen twice. Where an episode
    begins in one pass and ends in the next, ids that it already holds are moved behind its end, so no
    episode holds a sample twice.

    Args:
        rows: pairs in the table.
        size: pairs in an episode; None takes the whole table.
        seed: of the run.

    Raises:
        ValueError: the table is empty, or the episode is larger than the table.
    """

    def __init__(self, rows: int, size: int | None, seed: int) -> None:
        size = rows if size is None else size
        if not 1 <= size <= rows:
            raise ValueError(f"episode_size = {size} does not fit a table of {rows} usable pairs: take at most {rows}, or None for all")
        self.rows = rows
        self.size = size
        self.seed = seed
        self._last: tuple[int, np.ndarray] | None = None

    def ids(self, episode: int) -> np.ndarray:
        """Row numbers of the episode's pairs, (size,) int64, in the order they are learnt."""
        this_pass, offset = divmod((episode - 1) * self.size, self.rows)
        head = self._pass(this_pass)[offset : offset + self.size]
        if len(head) == self.size:
            return head
        return np.concatenate([head, self._pass(this_pass + 1)[: self.size - len(head)]])

    def _pass(self, number: int) -> np.ndarray:
        """The order of one pass, whose beginning depends on the end of the pass before it."""
        start, order = self._last if self._last is not None and self._last[0] <= number else (-1, None)
        for p in range(start + 1, number + 1):
            shuffled = numpy_generator(self.seed, "pass", p).permutation(self.rows)
            taken = p * self.rows % self.size  # of this pass's first episode, by the pass before
            order = _move_behind(shuffled, order[self.rows - taken :], self.size - taken) if taken else shuffled
        self._last = (number, order)
        return order


def _move_behind(order: np.ndarray, held: np.ndarray, wanted: int) -> np.ndarray:
    """Stable reorder in which the first ``wanted`` entries are none of ``held``."""
    free = np.flatnonzero(~np.isin(order, held))[:wanted]
    return np.concatenate([order[free], np.delete(order, free)])
