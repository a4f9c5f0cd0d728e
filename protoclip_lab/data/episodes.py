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
        self.rows, self.size, self.seed = rows, size, seed

    def ids(self, episode: int) -> np.ndarray:
        """Row numbers of the episode's pairs, (size,) int64, in the order they are learnt."""
        first_pass, offset = divmod((episode - 1) * self.size, self.rows)
        # The beginning of a pass depends on the end of the one before, unless an episode begins with it.
        free_of_others = max(number for number in range(first_pass + 1) if number * self.rows % self.size == 0)
        order = np.arange(0)
        for number in range(free_of_others, first_pass + 2):
            shuffled = numpy_generator(self.seed, "pass", number).permutation(self.rows)
            taken = number * self.rows % self.size  # of this pass's first episode, by the pass before
            free = np.flatnonzero(~np.isin(shuffled, order[self.rows - taken :]))[: self.size - taken]
            # First what fills that episode without repeating itself, then the rest; both as shuffled.
            before, order = order, np.concatenate([shuffled[free], np.delete(shuffled, free)])
        return np.concatenate([before, order])[offset : offset + self.size]
