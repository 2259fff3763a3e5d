"""Sources: where files are found, what is refused; a download, from loopback, arrives whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mechlab.data import MNIST_TEST, MNIST_TRAIN, CorruptData, MissingData, Source, available, locate

BODY = b"nine ducks on a pond\n" * 5_000


class Server:
    """Serves ``files`` on loopback; an entry of ``cut`` closes the connection after that many bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.asked.append(name)
                if name not in outer.files:
                    self.send_error(404)
                    return
                body = outer.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.cut.get(name)])

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def source(self, **files: bytes) -> Source:
        """A source of ``a_txt=b"..."`` as ``a.txt``, with the digests of these contents."""
        named = {name.replace("_", "."): body for name, body in files.items()}
        self.files |= named
        return Source(
            name="ducks",
            files={name: (self.address + name, hashlib.sha256(body).hexdigest()) for name, body in named.items()},
        )


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.thread.start()
    yield server
    server.http.shutdown()
    server.thread.join()
    server.http.server_close()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(folder of the set in MECHLAB_DATA, folder of the set in the cache), neither of them made yet."""
    monkeypatch.setenv("MECHLAB_DATA", str(tmp_path / "given"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "given" / "ducks", tmp_path / "cache" / "mechlab" / "data" / "ducks"


def put(folder: Path, **files: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (folder / name.replace("_", ".")).write_bytes(body)


def test_given_folder_comes_before_the_cache_and_the_network(server: Server, folders: tuple[Path, Path]) -> None:
    given, cache = folders
    source = server.source(a_txt=BODY)
    put(given, a_txt=BODY)
    put(cache, a_txt=BODY)
    assert locate(source) == given
    assert available(source)
    assert server.asked == []


def test_cache_is_used_when_the_given_folder_is_incomplete(server: Server, folders: tuple[Path, Path]) -> None:
    given, cache = folders
    source = server.source(a_txt=BODY, b_txt=b"b")
    put(given, a_txt=BODY)
    put(cache, a_txt=BODY, b_txt=b"b")
    assert locate(source) == cache
    assert server.asked == []


def test_cache_without_any_variable_is_in_the_home_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHLAB_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(server.source(a_txt=BODY)) == tmp_path / ".cache" / "mechlab" / "data" / "ducks"


def test_download_fetches_only_what_is_missing_and_once(server: Server, folders: tuple[Path, Path]) -> None:
    cache = folders[1]
    source = server.source(a_txt=BODY, b_txt=b"b")
    put(cache, b_txt=b"b")
    assert not available(source)
    assert locate(source) == cache
    assert (cache / "a.txt").read_bytes() == BODY
    assert available(source)
    locate(source)
    assert server.asked == ["a.txt"]
    assert sorted(path.name for path in cache.iterdir()) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("place", [0, 1])
def test_wrong_digest_is_refused_by_name_and_kept(server: Server, folders: tuple[Path, Path], place: int) -> None:
    source = server.source(a_txt=BODY)
    put(folders[place], a_txt=b"other")
    path = folders[place] / "a.txt"
    with pytest.raises(ValueError, match="not the published file") as caught:
        locate(source)
    for part in (str(path), source.files["a.txt"][1], hashlib.sha256(b"other").hexdigest(), "Move it away"):
        assert part in str(caught.value)
    assert path.read_bytes() == b"other"
    assert not available(source)
    assert server.asked == []


def test_damaged_file_in_an_incomplete_cache_is_refused(server: Server, folders: tuple[Path, Path]) -> None:
    source = server.source(a_txt=BODY, b_txt=b"b")
    put(folders[1], b_txt=b"damaged")
    with pytest.raises(CorruptData, match=r"b\.txt"):
        locate(source)


def test_missing_without_download_names_files_and_folders(server: Server, folders: tuple[Path, Path]) -> None:
    source = server.source(a_txt=BODY)
    with pytest.raises(FileNotFoundError) as caught:
        locate(source, download=False)
    for part in ("a.txt", server.address, str(folders[0]), str(folders[1])):
        assert part in str(caught.value)
    assert server.asked == []
    assert not folders[1].exists()


@pytest.mark.parametrize("broken", ["no server", "404", "cut"])
def test_failed_download_says_so_and_leaves_nothing(server: Server, folders: tuple[Path, Path], broken: str) -> None:
    source = server.source(a_txt=BODY)
    if broken == "no server":
        # Port 9 (discard) of loopback: nothing listens there.
        source = Source(name="ducks", files={"a.txt": ("http://127.0.0.1:9/a.txt", "0" * 64)})
    if broken == "404":
        server.files.clear()
    if broken == "cut":
        server.cut["a.txt"] = 1_000
    with pytest.raises(MissingData, match="Downloading it failed") as caught:
        locate(source)
    for part in ("a.txt", source.files["a.txt"][0], str(folders[0]), str(folders[1])):
        assert part in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert list(folders[1].iterdir()) == []


def test_download_with_the_wrong_contents_is_not_stored(server: Server, folders: tuple[Path, Path]) -> None:
    source = server.source(a_txt=BODY)
    server.files["a.txt"] = b"<html>try again later</html>"
    with pytest.raises(CorruptData, match="Nothing was stored"):
        locate(source)
    assert list(folders[1].iterdir()) == []


def test_interrupt_leaves_no_file(server: Server, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mechlab.data import sources

    def interrupted(address: str, target: Path, *, label: str) -> None:
        target.write_bytes(BODY[:100])
        raise KeyboardInterrupt

    source = server.source(a_txt=BODY)
    monkeypatch.setattr(sources, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate(source)
    assert list(folders[1].iterdir()) == []


def test_digest_of_a_gz_file_is_of_what_it_holds(server: Server, folders: tuple[Path, Path]) -> None:
    source = Source(name="ducks", files={"a.gz": (server.address + "a.gz", hashlib.sha256(BODY).hexdigest())})
    server.files["a.gz"] = gzip.compress(BODY, 9, mtime=1)
    put(folders[0], a_gz=gzip.compress(BODY, 1, mtime=2))
    assert locate(source) == folders[0]
    (folders[0] / "a.gz").unlink()
    assert locate(source) == folders[1]


@pytest.mark.parametrize(
    "body",
    [gzip.compress(BODY)[:-20], b"no gzip", gzip.compress(BODY)[:10] + b"\xff" * 50],
    ids=["truncated", "not gzip", "damaged inside"],
)
def test_damaged_gz_file_is_refused(server: Server, folders: tuple[Path, Path], body: bytes) -> None:
    source = Source(name="ducks", files={"a.gz": (server.address + "a.gz", hashlib.sha256(BODY).hexdigest())})
    put(folders[0], a_gz=body)
    with pytest.raises(CorruptData, match="not a whole gzip file"):
        locate(source)


def test_mnist_sources_share_one_folder_and_no_file() -> None:
    assert MNIST_TRAIN.name == MNIST_TEST.name == "mnist"
    assert not set(MNIST_TRAIN.files) & set(MNIST_TEST.files)
    for file, (address, digest) in {**MNIST_TRAIN.files, **MNIST_TEST.files}.items():
        assert address.startswith("https://") and address.endswith(file)
        assert len(bytes.fromhex(digest)) == 32
