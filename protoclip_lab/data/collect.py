"""To WebDataset shards: lists of URLs and captions, as CC3M and CC12M come, on img2dataset; data sets of the Hugging Face hub."""

import csv
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from tqdm.auto import tqdm

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


def export(
    source: str, output: str | Path, *, split: str = "train", image_column: str = "image", caption_column: str = "text"
) -> pd.Series:
    """Copy a data set with the images in its Parquet files into WebDataset shards, ``output/shards``, as its rows come.

    Called again it begins anew.

    Args:
        source: hf://datasets/NAME on the Hugging Face hub, or a folder of Parquet files.
        output: folder.
        split, image_column, caption_column: of the data set. A list of captions makes as many samples.

    Returns:
        Number of samples: "success". A row without an image becomes one that cannot be read, for 01_prepare_data to list.

    Raises:
        ValueError: no such split or column, from datasets.
        ImportError: webdataset, which comes with img2dataset, is not installed.
    """
    from webdataset import ShardWriter

    rows = datasets.load_dataset(source.removeprefix("hf://datasets/"), split=split, streaming=True)
    rows = rows.select_columns([image_column, caption_column]).cast_column(image_column, datasets.Image(decode=False))
    (out := Path(output) / "shards").mkdir(parents=True, exist_ok=True)
    with ShardWriter(f"{out}/%05d.tar", maxcount=10_000, verbose=0) as shards:
        for row in tqdm(rows, desc=source, mininterval=2):
            image, captions = (row[image_column] or {}).get("bytes") or b"", row[caption_column]
            for caption in captions if isinstance(captions, list) else [captions]:
                shards.write({"__key__": f"{shards.total:09d}", "jpg": image, "txt": str(caption)})
    return pd.Series({"success": shards.total})
