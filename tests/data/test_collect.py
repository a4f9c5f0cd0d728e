"""A list of URLs becomes shards that 01 takes, from a server on loopback that is not always kind."""

import io
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from protoclip_lab.data.collect import collect
from protoclip_lab.data.pairs import prepare

pytest.importorskip("img2dataset", reason="pip install 'protoclip_lab[collect]' to test it")


def jpeg(number, kind="JPEG"):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 48, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


class Unkind(BaseHTTPRequestHandler):
    done = threading.Event()

    def do_GET(self):
        kind, _, number = self.path.strip("/").partition("/")
        self.server.asked.append(self.path)
        if kind == "missing":
            return self.send_error(404)
        body = {"good": jpeg(number.__len__()), "png": jpeg(1, "PNG"), "text": b"<html>no image</html>"}.get(kind, jpeg(2))
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "slow":
            self.done.wait()
        self.wfile.write(body[:300] if kind == "cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Unkind) as running:
        running.asked, running.daemon_threads = [], True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        Unkind.done.set()
        running.shutdown()


ROWS = ["good/a", "good/bb", "good/ccc", "missing/1", "text/1", "cut/1", "slow/1", "png/1"]


def write_list(path, server, text="{caption}\t{url}\n", header=""):
    rows = [text.format(caption=f'a "quoted caption of {row}', url=f"http://127.0.0.1:{server.server_port}/{row}") for row in ROWS]
    path.write_text(header + "".join(rows), "utf-8")
    return path


def test_what_can_be_had_becomes_pairs_and_the_rest_is_listed_with_its_cause(server, tmp_path):
    urls = write_list(tmp_path / "cc3m.tsv", server)
    command = [sys.executable, "-m", "protoclip_lab", "collect", str(urls), str(tmp_path / "out"), "-p", "timeout=2"]
    command += ["-p", "retries=1", "-p", "processes_count=1", "-p", "thread_count=4", "-p", "image_size=32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[-5:])
    assert outcomes["success"] == "4" and sum(map(int, outcomes.values())) == len(ROWS)
    failed = pd.read_csv(tmp_path / "out" / "failed.tsv", sep="\t").set_index("url")["error_message"]
    causes = {url.split("/")[3]: cause for url, cause in failed.items()}
    assert causes.keys() == {"missing", "text", "cut", "slow"}
    assert "404" in causes["missing"] and "timed out" in causes["slow"] and "decoding" in causes["text"]
    # Asked again once, as told.
    assert server.asked.count("/missing/1") == 2
    pairs = prepare(tmp_path / "out" / "shards", tmp_path / "pairs")
    assert sorted(pairs.captions) == sorted(f'a "quoted caption of {row}' for row in ROWS if row.startswith(("good", "png")))
    assert {image.size for image, _ in pairs} == {(32, 32)}


def test_called_again_it_asks_for_nothing_that_is_there(server, tmp_path):
    urls = write_list(tmp_path / "cc12m.tsv", server, "{url}\t{caption}\n", "url\tcaption\n")
    Unkind.done.set()
    options = {"processes_count": 1, "thread_count": 4, "retries": 0, "image_size": 32}
    first = collect(urls, **options)
    asked = len(server.asked)
    assert asked == len(ROWS) and first["success"] == 5  # nobody is slow now
    pd.testing.assert_series_equal(collect(urls, tmp_path / "cc12m", **options), first)
    assert len(server.asked) == asked


@pytest.mark.parametrize("text", ["a\tb\nc\td\n", "name\tlink\tother\nx\thttp://x\ty\n"])
def test_a_list_without_urls_is_refused(text, tmp_path):
    (tmp_path / "list.tsv").write_text(text)
    with pytest.raises(ValueError, match=r"list\.tsv has no columns 'url' and 'caption'; its first row is \["):
        collect(tmp_path / "list.tsv", tmp_path / "out")
