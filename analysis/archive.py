"""Keep the logs of many runs in one zip file, which ``compare.py`` reads like the folder they came from."""

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from analysis.runs import find

# What a report reads, and what a person may want to; no weights.
FILES = ("config.yaml", "protocol.yaml", "metrics.csv", "summary.json", "error.txt", "samples.txt")
_NO_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold


def pack(folder: Path, file: Path) -> int:
    """Pack every run at or below ``folder`` into ``file``, under the names they have below it.

    The same runs give the same bytes. The file is written beside its place and then renamed.

    Returns:
        The number of runs.
    """
    runs = [run for run in find([folder]) if run.is_dir()]
    partial = file.with_name(file.name + ".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            paths = (run / name for run in runs for name in FILES if (run / name).is_file())
            for name in sorted(path.relative_to(folder).as_posix() for path in paths):
                info = zipfile.ZipInfo(name, _NO_TIME)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, (folder / name).read_bytes())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return len(runs)


@contextmanager
def unpacked(paths: Iterable[Path]) -> Iterator[tuple[list[Path], Callable[[Path], Path]]]:
    """Unpack every zip file among ``paths`` to a temporary folder, which is removed at the end of the block.

    Yields:
        The paths, folders of their contents in the place of zip files; and a function that returns what to call a path
        below one of these: the archive's path, and the name in it.

    Raises:
        ValueError: a file that is no zip file.
    """
    archives: dict[Path, Path] = {}

    def shown(path: Path) -> Path:
        place = next((place for place in archives if path.is_relative_to(place)), None)
        return path if place is None else archives[place] / path.relative_to(place)

    with ExitStack() as stack:
        found = []
        for path in paths:
            if not path.is_file():
                found.append(path)
                continue
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ars2-")))
            try:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(place)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} is neither a folder nor an archive of runs (a zip file)") from error
            archives[place] = path
            found.append(place)
        yield found, shown
