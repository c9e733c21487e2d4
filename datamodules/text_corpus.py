"""Read the lines of a text corpus from a folder or from the hub."""

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
    """Describe a corpus and how to read it.

    ``digest`` (hexadecimal) depends only on the text. ``read`` returns the lines of every split, without their line
    ends, and is slow.
    """

    source: str
    digest: str
    read: Callable[[], dict[str, list[str]]]


def open_corpus(root: Path | None) -> Corpus:
    """Find the corpus and compute its digest.

    Args:
        root: a folder with one text or Parquet file for each split, with ``train``, ``valid`` and ``test`` in their
            names, or a copy saved by ``save_to_disk`` of ``datasets``. ``None`` loads the raw WikiText-2 from the hub.

    Raises:
        FileNotFoundError: the folder, or the file of a split, is missing.
        ValueError: several files for one split, or other than text files without the package ``datasets``.
        ConnectionError: the hub cannot be reached, and there is no local copy.
    """
    if root is None:
        return _digested(f"{HUB_CONFIG} from the hub", _from_hub())
    if not root.is_dir():
        raise FileNotFoundError(f"the corpus folder {root} is missing: set data.root to an existing one")
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
        raise FileNotFoundError(f"{root} has no file named {pattern} for the {split} split: add one")
    if len(found) > 1:
        raise ValueError(
            f"{root} has {len(found)} files named {pattern}, such as {found[0].name} and {found[1].name}:"
            " keep one for each split"
        )
    return found[0]


def _datasets(what: str) -> Any:
    """Import ``datasets``.

    Text files do not need it.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {what} needs the package datasets: install it (pip install datasets), or set --data.root to a"
            " folder with one text file for each split"
        ) from error
    return datasets


def _from_hub() -> Any:
    load_dataset = _datasets("the hub").load_dataset
    print(f"asking the hub for {HUB_CONFIG}", flush=True)
    # Without a network, each attempt would print two lines.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return load_dataset(HUB_NAME, HUB_CONFIG)
    except Exception as error:
        # Several libraries are involved, which raise different exceptions for the same cause.
        raise ConnectionError(
            f"{HUB_CONFIG} could not be loaded from the hub ({type(error).__name__}) and there is no local copy:"
            " connect to the network, or set --data.root to a folder with its files"
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
    # Streaming avoids the cache of datasets, which would identify a file by its name and time.
    return _lines(_datasets("Parquet files").load_dataset("parquet", data_files=names, streaming=True))


def _digested(source: str, dataset: Any) -> Corpus:
    lines = _lines(dataset)
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(hashlib.sha256("\n".join(lines[split]).encode()).digest())
    return Corpus(source, digest.hexdigest(), lambda: lines)


def _lines(dataset: Any) -> dict[str, list[str]]:
    if missing := [split for split in SPLITS if split not in dataset]:
        raise ValueError(f"the corpus lacks the split {missing[0]}, it has {', '.join(dataset)}: add the missing one")
    # One entry is one line. Some entries in the hub's copy have line ends.
    return {split: [str(row["text"]).rstrip("\r\n") for row in dataset[split]] for split in SPLITS}
