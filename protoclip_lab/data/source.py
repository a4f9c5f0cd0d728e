"""From a table, or from nothing, to pairs."""

from pathlib import Path

from protoclip_lab.data import shapes
from protoclip_lab.data.pairs import Pairs, prepare


def open_pairs(output: str | Path, table: str = "shapes", *, size: int = 6000, image_size: int = 64, seed: int = 0, **options) -> Pairs:
    """The pairs of a table, prepared in ``output/pairs`` unless they are already.

    Args:
        output: folder for what has to be made.
        table: for :func:`protoclip_lab.data.pairs.prepare`; the word "shapes" draws the embedded world into
            ``output`` and takes its training split.
        size, image_size, seed: of that world.
        options: the other arguments of ``prepare``.
    """
    if table == "shapes":
        table = shapes.write(Path(output), size, seed=seed, image_size=image_size)
        options |= {"image_root": table.with_name("images.tar"), "where": options.get("where") or {"split": "train"}}
    return prepare(table, Path(output) / "pairs", **options)
