"""Lists of URLs and captions, as CC3M and CC12M come, to WebDataset shards on img2dataset."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd

from protoclip_lab.config import require


def collect(urls: str | Path, output: str | Path = "", **options: Any) -> pd.Series:
    """Download the images of a list into WebDataset shards, ``output/shards``, which 01_prepare_data and 03_train take as a table.

    Called again it goes on with the shards that are not finished. What could not be had is listed in ``output/failed.tsv``.

    Args:
        urls: TSV with the columns "caption" and "url", or of two columns without a header, in any order.
        output: folder; empty takes the list's name without its suffix.
        options: of ``img2dataset.download``, such as image_size, processes_count, timeout, retries or distributor.

    Returns:
        Number of rows by outcome: "success", or why not.

    Raises:
        ValueError: the list has no such columns.
        ImportError: img2dataset is not installed.
    """
    from img2dataset import download

    out = Path(output or Path(urls).with_suffix(""))
    table = pd.read_csv(urls, sep="\t", quoting=csv.QUOTE_NONE, header=None, dtype=str, keep_default_na=False, on_bad_lines="warn")
    columns = table.iloc[0].tolist()
    if "url" in columns:
        table = table.drop(0)
    elif len(columns) == 2:
        columns = ["url" if table[column].str.match("https?://").mean() > 0.5 else "caption" for column in table]
    require({"url", "caption"} <= {*columns}, f"{urls} has no columns 'url' and 'caption'; its first row is {columns}")
    (out / "shards").mkdir(parents=True, exist_ok=True)
    table.set_axis(columns, axis=1).to_parquet(out / "urls.parquet")
    common = {"input_format": "parquet", "url_col": "url", "caption_col": "caption", "output_format": "webdataset", "retries": 2}
    download(str(out / "urls.parquet"), output_folder=str(out / "shards"), **common | options)
    rows = pd.concat([pd.read_parquet(part) for part in sorted((out / "shards").glob("*.parquet"))])
    rows.loc[rows["status"] != "success", ["url", "caption", "error_message"]].to_csv(out / "failed.tsv", sep="\t", index=False)
    return rows["error_message"].fillna("success").value_counts()
