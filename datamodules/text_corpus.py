"""Read the lines of a text corpus, split by split: from a folder on disk, or from the hub."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
SPLITS = ("train", "validation", "test")
_PATTERNS = {"train": "*train*", "validation": "*valid*", "test": "*test*"}
_PARQUET = ".parquet"


@dataclass(frozen=True)
class Corpus:
    """Where a corpus comes from, what it is, and how to read it.

    ``digest`` (hexadecimal) follows from the text alone. ``read`` returns the lines of every split, without their
    line ends; it is the slow part.
    """

    source: str
    digest: str
    read: Callable[[], dict[str, list[str]]]


def open_corpus(root: Path | None) -> Corpus:
    """Find the corpus and digest it.

    Args:
        root: a folder with one text or Parquet file a split, told by ``train``, ``valid`` and ``test`` in their names,
            or a copy that ``save_to_disk`` of ``datasets`` wrote; ``None`` loads the raw WikiText-2 from the hub.

    Raises:
        FileNotFoundError: no such folder, or a split without a file in it.
        ValueError: several files for one split; anything but text files where ``datasets`` is not installed.
        ConnectionError: the hub cannot be reached and has not been before.
    """
    if root is None:
        return _digested(f"{HUB_CONFIG} from the hub", _from_hub())
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root} to read the corpus from: see data.root")
    if (root / "dataset_dict.json").is_file():
        return _digested("a saved copy of datasets", _datasets("a saved copy").load_from_disk(str(root)))
    files = {split: _file(root, split) for split in SPLITS}
    kind = "parquet" if files["train"].suffix == _PARQUET else "text"
    digest = hashlib.sha256()
    for path in files.values():
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    read = _from_parquet if kind == "parquet" else _from_text
    return Corpus(f"local {kind} files", digest.hexdigest(), lambda: read(files))


def _file(root: Path, split: str) -> Path:
    pattern = _PATTERNS[split]
    found = [path for path in sorted(root.rglob(pattern)) if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise FileNotFoundError(f"{root} holds no file named {pattern}, for the {split} split")
    if len(found) > 1:
        raise ValueError(
            f"{root} holds {len(found)} files named {pattern}, such as {found[0].name} and {found[1].name}:"
            " leave one for each split"
        )
    return found[0]


def _datasets(what: str) -> Any:
    """Import ``datasets``, which text files do without."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {what} needs the package datasets: install it (pip install datasets), or name a folder with one"
            " text file a split by --data.root"
        ) from error
    return datasets


def _from_hub() -> Any:
    load_dataset = _datasets("the hub").load_dataset
    print(f"asking the hub for {HUB_CONFIG}", flush=True)
    # Each of its attempts would print two lines where there is no network.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return load_dataset(HUB_NAME, HUB_CONFIG)
    except Exception as error:
        # Several libraries are involved, each with errors of its own for the same trouble.
        raise ConnectionError(
            f"{HUB_CONFIG} could not be loaded from the hub ({type(error).__name__}) and there is no copy of it here:"
            " connect to the network, or name a folder that holds its files by --data.root"
        ) from error


def _from_text(files: dict[str, Path]) -> dict[str, list[str]]:
    lines = {}
    for split, path in files.items():
        try:
            with path.open(encoding="utf-8") as file:
                lines[split] = [line.rstrip("\r\n") for line in file]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error
    return lines


def _from_parquet(files: dict[str, Path]) -> dict[str, list[str]]:
    names = {split: str(path) for split, path in files.items()}
    # Streamed: datasets would otherwise keep a copy of its own, and go by the file's name and time.
    return _lines(_datasets("Parquet files").load_dataset("parquet", data_files=names, streaming=True))


def _digested(source: str, dataset: Any) -> Corpus:
    lines = _lines(dataset)
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(hashlib.sha256("\n".join(lines[split]).encode()).digest())
    return Corpus(source, digest.hexdigest(), lambda: lines)


def _lines(dataset: Any) -> dict[str, list[str]]:
    if missing := [split for split in SPLITS if split not in dataset]:
        raise ValueError(f"the corpus lacks the split {missing[0]}; it has {', '.join(dataset)}")
    # One entry is one line; the hub's copy keeps the line ends in some of them.
    return {split: [str(row["text"]).rstrip("\r\n") for row in dataset[split]] for split in SPLITS}
