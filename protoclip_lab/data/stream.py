"""A data set read as a stream: each episode's pairs are the next of its shards, held while the episode lasts."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np

from protoclip_lab.config import TrainConfig, require
from protoclip_lab.data.pairs import BAD_ROWS, Pairs, hold
from protoclip_lab.data.shards import Shards, is_sharded
from protoclip_lab.randomness import numpy_generator


def folder_of(run: Path, number: int) -> Path:
    """Where the pairs of a streamed episode lie."""
    return run / "stream" / f"{number:06d}"


class Stream:
    """The pairs of each episode: the next ``episode_size`` usable ones of the source.

    Each pass takes the shards in another order, a function of the seed alone. The episode is the shuffle buffer: its pairs are
    learnt in an order of their own. Where a pass ends within an episode, a pair may come twice in it.

    Args:
        config: of the run.
        run: its folder; ``run/stream/NUMBER`` holds an episode, and ``run/stream/bad_rows_NUMBER.jsonl`` stays.

    Attributes:
        size: pairs of an episode.
        starts: where in the stream the present episode begins, and the next, by number: for checkpoints.

    Raises:
        ValueError: the table is no source in shards.
    """

    def __init__(self, config: TrainConfig, run: Path) -> None:
        table, columns = config.table, (config.image_column, config.caption_column)
        require(is_sharded(table, columns[0]), f"{table} is no folder of shards, nor a data set of the hub: stream = False reads it")
        self.config, self.run, self.size = config, run, config.episode_size
        self.shards = Shards(table, columns, config.where, config.seed)
        self.starts = {"1": [0, 0, 0]}

    def open(self, number: int) -> Pairs:
        """The pairs of an episode, fetched unless they are there; those of others go.

        Raises:
            ValueError: too many samples are bad, or a pass has fewer that are usable than an episode.
        """
        out, start, config = folder_of(self.run, number), self.starts[str(number)], self.config
        if not (out / "pairs.json").exists() or Pairs(out).about["start"] != start:
            for old in out.parent.glob("*/"):
                shutil.rmtree(old)
            about = {"source": config.table, "root": str(self.shards.root), "start": start}
            chosen = {"where": config.where, "max_bad_share": config.max_bad_share}
            hold(out, partial(self.shards.take, out), about, self.shards.columns, self.size, start=start, **chosen)
            shutil.copyfile(out / BAD_ROWS, out.with_name(f"bad_rows_{out.name}.jsonl"))
        pairs = Pairs(out)
        require(len(pairs) == self.size, f"a pass over {config.table} has {len(pairs)} usable pairs: lower episode_size to that")
        self.starts = {str(number): start, str(number + 1): pairs.about["next"]}
        return pairs

    def ids(self, number: int) -> np.ndarray:
        """Row numbers of the episode's pairs in the order they are learnt, (size,) int64."""
        return numpy_generator(self.config.seed, "stream", number).permutation(self.size)
