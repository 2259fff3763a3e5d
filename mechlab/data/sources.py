"""Where real data sets come from: public addresses and digests; found locally, or downloaded and verified.

A source is looked for in ``$MECHLAB_DATA/NAME``, then in the user's cache
(``$XDG_CACHE_HOME/mechlab/data/NAME``, by default under ``~/.cache``), and then downloaded into that cache.
A file counts only if its contents have the expected digest, and is put in place by one atomic rename: an
interrupted download leaves nothing behind.

The digest of a ``.gz`` file is that of what it *holds*. The same data compressed again (at another
level, or with another date in the header) is the same data, and mirrors do differ in this.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mechlab.core.errors import UserError

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30


class MissingData(UserError, FileNotFoundError):
    """A data set is in none of the folders searched, and could not or should not be downloaded."""


class CorruptData(UserError, ValueError):
    """A file is there, or was downloaded, but it is not the file it should be."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that is published as plain files.

    Attributes:
      name: the folder's name below ``$MECHLAB_DATA`` and below the cache.
      files: file name -> (public address, sha256 of the contents in hex); for ``.gz``, of what it holds.
    """

    name: str
    files: Mapping[str, tuple[str, str]]


_MNIST_ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"

#: The 60,000 training images and labels of MNIST.
MNIST_TRAIN = Source(
    name="mnist",
    files={
        "train-images-idx3-ubyte.gz": (
            _MNIST_ADDRESS + "train-images-idx3-ubyte.gz",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        "train-labels-idx1-ubyte.gz": (
            _MNIST_ADDRESS + "train-labels-idx1-ubyte.gz",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
    },
)

#: The 10,000 test images and labels of MNIST, in the same folder as the training files.
MNIST_TEST = Source(
    name="mnist",
    files={
        "t10k-images-idx3-ubyte.gz": (
            _MNIST_ADDRESS + "t10k-images-idx3-ubyte.gz",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        "t10k-labels-idx1-ubyte.gz": (
            _MNIST_ADDRESS + "t10k-labels-idx1-ubyte.gz",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    },
)

_STORIES_ADDRESS = "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K/"

#: A trained language model of llama2.c with its vocabulary (MIT).
STORIES260K = Source(
    name="stories260k",
    files={
        "stories260K.bin": (
            _STORIES_ADDRESS + "stories260K.bin",
            "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
        ),
        "tok512.bin": (
            _STORIES_ADDRESS + "tok512.bin",
            "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
        ),
    },
)

#: 1.1 MB of Shakespeare's plays (public domain).
TINYSHAKESPEARE = Source(
    name="tinyshakespeare",
    files={
        "input.txt": (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )
    },
)

_WIKITEXT_ADDRESS = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"

#: Validation and test text of WikiText-2 (arXiv 1609.07843; CC BY-SA 3.0), words with "<unk>" as published.
WIKITEXT2 = Source(
    name="wikitext-2",
    files={
        "valid.txt": (
            _WIKITEXT_ADDRESS + "valid.txt",
            "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        ),
        "test.txt": (
            _WIKITEXT_ADDRESS + "test.txt",
            "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ),
    },
)

_GSM8K_ADDRESS = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"

#: GSM8K (arXiv 2110.14168; MIT): 7,473 and 1,319 word problems with worked answers, as JSON lines.
GSM8K = Source(
    name="gsm8k",
    files={
        "train.jsonl": (
            _GSM8K_ADDRESS + "train.jsonl",
            "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        ),
        "test.jsonl": (
            _GSM8K_ADDRESS + "test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
    },
)


_EMOTIONS_ADDRESS = "https://raw.githubusercontent.com/andyzoujm/representation-engineering/main/data/emotions/"

#: 1,250 scenarios of a sentence for six emotions, from representation engineering (arXiv 2310.01405; MIT).
EMOTIONS = Source(
    name="emotions",
    files={
        f"{emotion}.json": (f"{_EMOTIONS_ADDRESS}{emotion}.json", digest)
        for emotion, digest in (
            ("anger", "4577af8b0c62b18e3f06fb96883e95ed7b776f0809f605bfe792e438fe1832df"),
            ("disgust", "3532b5d3c3701ad23c799dd436a86db81b716ecd41b35e890e2fb2ae4a80dfff"),
            ("fear", "cf791978f94f62ec617480a646f3a16d38aaf594a385c698bec08bf32747ee2b"),
            ("happiness", "3dedefdc819007074a1a53c7a606d1e5661ac0cc19984212aa809c3a9f6bb646"),
            ("sadness", "999065615aac1bfb95c5cec054965f9abf17f36d59c7a779916eb28eb3f4ea24"),
            ("surprise", "43d90c0bbf755c789373286e35bc522461f9fe960fb5e3c5586a1749e19c7812"),
        )
    },
)


def locate(source: Source, *, download: bool = True) -> Path:
    """The folder that holds every file of ``source``, verified; downloads what is missing.

    A folder counts when it holds all files of the source. Files are never deleted or replaced.

    Args:
      source: what is wanted.
      download: fetch missing files into the user's cache. With ``False`` the network is not touched.

    Returns:
      The folder.

    Raises:
      MissingData: (a ``FileNotFoundError``) if it is nowhere and was not downloaded; names what was searched.
      CorruptData: (a ``ValueError``) if a file's contents have the wrong digest.
    """
    for folder in _folders(source):
        if all((folder / file).is_file() for file in source.files):
            for file in source.files:
                _verify(source, folder, file)
            return folder
    if not download:
        raise MissingData(_missing_message(source, "It was not to be downloaded."))
    folder = _cache_folder(source)
    for file in source.files:
        if not (folder / file).is_file():
            _download(source, file, folder)
        else:
            _verify(source, folder, file)
    return folder


def available(source: Source) -> bool:
    """Whether ``source`` is here, complete and with the right digests. Touches no network.

    Args:
      source: what is wanted.

    Returns:
      True if ``locate(source, download=False)`` would return.
    """
    try:
        locate(source, download=False)
    except (MissingData, CorruptData):
        return False
    return True


def _cache_folder(source: Source) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mechlab" / "data" / source.name


def _folders(source: Source) -> list[Path]:
    given = os.environ.get("MECHLAB_DATA")
    return ([Path(given) / source.name] if given else []) + [_cache_folder(source)]


def _missing_message(source: Source, reason: str, *, file: str | None = None) -> str:
    folders = _folders(source)
    absent = [file] if file else [name for name in source.files if not (folders[-1] / name).is_file()]
    wanted = "\n".join(f"  {name}  from {source.files[name][0]}" for name in absent)
    searched = "\n".join(f"  {folder}" for folder in folders)
    return (
        f'data set "{source.name}" was not found. {reason}\nWanted:\n{wanted}\nSearched:\n{searched}\n'
        f"Put every file of the set into one of these folders, set MECHLAB_DATA to a folder that holds "
        f"{source.name}/, or run again with a network."
    )


def _digest(path: Path) -> str:
    """sha256 in hex of a file's contents; of a ``.gz`` file, of what it holds (or why it cannot be read)."""
    digest = hashlib.sha256()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        return f"none, not a whole gzip file ({error})"
    return digest.hexdigest()


def _verify(source: Source, folder: Path, file: str) -> None:
    expected = source.files[file][1]
    found = _digest(folder / file)
    if found != expected:
        raise CorruptData(
            f'data set "{source.name}": {folder / file} is not the published file.\n'
            f"  expected sha256 {expected}\n  found    sha256 {found}\n"
            f"Move it away, then run again to download it from {source.files[file][0]}"
        )


def _download(source: Source, file: str, folder: Path) -> None:
    address, expected = source.files[file]
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".part-", suffix=Path(file).suffix, dir=folder)
    os.close(handle)
    part = Path(name)
    try:
        try:
            _fetch(address, part, label=f"{source.name}/{file}")
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is also the open answer
            reason = f"Downloading it failed: {error or type(error).__name__}."
            raise MissingData(_missing_message(source, reason, file=file)) from error
        found = _digest(part)
        if found != expected:
            raise CorruptData(
                f'data set "{source.name}": what came from {address} is not the published {file}.\n'
                f"  expected sha256 {expected}\n  found    sha256 {found}\n"
                f"Nothing was stored. Try again, or put the file into {folder} yourself."
            )
        part.chmod(0o644)
        part.replace(folder / file)
    finally:
        part.unlink(missing_ok=True)


def _fetch(address: str, target: Path, *, label: str) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as answer,
        target.open("wb") as out,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        task = progress.add_task(label, total=total)
        received = 0
        while chunk := answer.read(_CHUNK):
            out.write(chunk)
            received += len(chunk)
            progress.advance(task, len(chunk))
    # A closed connection ends the stream without an exception.
    if total is not None and received < total:
        raise OSError(f"the connection ended after {received} of {total} bytes")
