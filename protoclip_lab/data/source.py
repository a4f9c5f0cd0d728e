"""From a table, or from nothing, to pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protoclip_lab.data import shapes
from protoclip_lab.data.pairs import Pairs, prepare


def open_pairs(
    output: str | Path,
    table: str = "shapes",
    *,
    size: int = 6000,
    image_size: int = 64,
    seed: int = 0,
    image_root: str | Path = "",
    where: Mapping[str, Any] | None = None,
    **columns: Any,
) -> Pairs:
    """The pairs of a table, prepared in ``output/pairs`` unless they are already.

    Args:
        output: folder for what has to be made.
        table: for :func:`protoclip_lab.data.pairs.prepare`; the word "shapes" draws the embedded world into
            ``output`` and takes its training split.
        size, image_size, seed: of that world.
        image_root, where, columns: the other arguments of ``prepare``.
    """
    output = Path(output)
    if table == "shapes":
        table = shapes.write(output, size, seed=seed, image_size=image_size)
        image_root, where = table.with_name("images.tar"), where or {"split": "train"}
    return prepare(table, output / "pairs", image_root=image_root, where=where, **columns)
