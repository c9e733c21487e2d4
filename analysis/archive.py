"""Find run folders on disk and in archives, and pack them.

python -m analysis.archive results/grok                         # packs its runs into results/grok/runs.zip
python -m zipfile -e results/grok/runs.zip results/grok         # unpacks them again
"""

import argparse
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from analysis.study import FILE as STUDY
from experiment.quantities import count

ARCHIVE = "runs.zip"
# Read by reports or by people; no weights.
FILES = ("config.yaml", "protocol.yaml", "metrics.csv", "summary.json", "error.txt", "samples.txt")
# A folder with either of them is a run's.
_MARKS = {"config.yaml", "metrics.csv"}
# Weights & Biases has a separate config.yaml there.
_OTHER = {"wandb", "checkpoints"}
_NO_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can store

# The folder of a run; both classes read files by the same methods.
Folder: TypeAlias = Path | zipfile.Path


def find(paths: Iterable[Path]) -> Iterator[Folder]:
    """Yield every run folder at or below ``paths`` and in archives there.

    They come in the order of their names. A run that lies beside its archive is taken from the disk. A path that does
    not exist is yielded as it is.

    Raises:
        ValueError: a path is a file and no archive.
    """
    for path in paths:
        if path.is_file():
            yield from _packed(path)
        elif not path.is_dir():
            yield path
        for parent, below, files in os.walk(path, followlinks=True):
            if _MARKS & set(files):
                below.clear()
                yield Path(parent)
            elif ARCHIVE in files:
                packed = _packed(Path(parent, ARCHIVE))
                yield from (run for run in packed if not Path(parent, run.at).is_dir())
            below[:] = sorted(set(below) - _OTHER)


def _packed(file: Path) -> Iterator[zipfile.Path]:
    """Yield the run folders in an archive."""
    try:
        archive = zipfile.Path(file)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is neither a folder nor an archive of runs (a zip file)") from error
    files = map(Path, archive.root.namelist())
    folders = {file.parent for file in files if file.name in _MARKS and _OTHER.isdisjoint(file.parts)}
    for folder in sorted(folders):
        yield archive / folder.as_posix() if folder.name else archive


def former_folder(checkpoint: str, run: Folder) -> Folder:
    """Return the folder of the run that wrote a checkpoint.

    It is the one in the archive of ``run`` if there is one.
    """
    folder = Path(checkpoint).parent.parent
    if isinstance(run, zipfile.Path):
        # Archives name a run by the end of its path.
        for start in range(len(folder.parts)):
            packed = zipfile.Path(run.root, "/".join(folder.parts[start:]) + "/")
            if (packed / "metrics.csv").exists():
                return packed
    return folder


def unpacked_path(folder: Folder) -> Path:
    """Return where a run folder is once its archive is unpacked in place."""
    return folder if isinstance(folder, Path) else Path(str(folder.root.filename)).parent / folder.at


def unpack_command(archive: Path) -> str:
    """Return the shell command that unpacks an archive in place."""
    return f"python -m zipfile -e {archive} {archive.parent}"


def pack(folder: Path, file: Path) -> int:
    """Pack every run folder at or below ``folder`` into ``file``.

    Names in the archive are relative to ``folder``. The configs that a search wrote are packed too. The same runs give
    the same bytes. The file is written beside its place and then renamed.

    Returns:
        The number of runs.
    """
    runs = [run for run in find([folder]) if isinstance(run, Path) and run.is_dir()]
    paths = [run / name for run in runs for name in FILES if (run / name).is_file()]
    if (folder / "trials.journal").is_file():
        paths += [path for path in folder.glob("*.yaml") if path.name != STUDY]
    partial = file.with_name(file.name + ".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(path.relative_to(folder).as_posix() for path in paths):
                info = zipfile.ZipInfo(name, _NO_TIME)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, (folder / name).read_bytes())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return len(runs)


def main() -> int:
    """Pack the runs of folders, and return the exit code."""
    parser = argparse.ArgumentParser(prog="analysis.archive", description="Pack the runs of a folder into runs.zip.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders that contain run folders")
    for folder in parser.parse_args().folders:
        file = folder / ARCHIVE
        try:
            found = list(find([folder]))
            if packed := [run for run in found if isinstance(run, zipfile.Path)]:
                archive = Path(packed[0].root.filename or "")
                raise ValueError(
                    f"{packed[0]} is packed and not on disk: unpack {archive} first ({unpack_command(archive)})"
                )
            if not any(run.is_dir() for run in found):
                raise ValueError(f"there is no run in {folder}")
            print(f"{count(pack(folder, file), 'run')} in {file} ({file.stat().st_size / 2**20:.1f} MiB)")
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
