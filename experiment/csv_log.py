"""Log to a CSV file that survives kills and rewinds to a checkpoint."""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class Rows(ExperimentWriter):
    """Write complete rows durably, and truncate them on resuming.

    Args:
        log_dir: folder of the file.
        keep: whether to append to existing rows instead of deleting them.
    """

    def __init__(self, log_dir: str, keep: bool) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.count = 0
        if not keep:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self.truncate(len(self._read()))

    def _check_log_dir_exists(self) -> None:
        """Keep an existing file, which Lightning would delete."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Add a row."""
        super().log_metrics(metrics_dict, step)
        self.count += 1

    def save(self) -> None:
        """Append the new rows to the file, or rewrite the file if they have new columns."""
        if not self.metrics:
            return
        try:
            if self._record_new_keys() or not self.path.exists():
                self._write([*(self._read() if self.path.exists() else []), *self.metrics])
            else:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, fieldnames=self.metrics_keys).writerows(self.metrics)
                    _flush(file)
        except OSError as error:
            # The system does not name the file when the disk is full.
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            # Do not retry rows that could not be written while the process exits.
            self.metrics = []

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` rows, and drop columns that only later rows had."""
        self.save()
        rows = self._read() if self.path.exists() else []
        rows = [{key: value for key, value in row.items() if key and value} for row in rows[:count]]
        self.metrics_keys = sorted(set().union(*rows))
        self.count = len(rows)
        if rows:
            self._write(rows)
        else:
            self.path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
            _flush(file)
        os.replace(partial, self.path)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger for the folder of a run that may be resumed.

    Args:
        folder: of the run.
        resumes: whether the existing rows belong to this run.
    """

    def __init__(self, folder: Path, resumes: bool = False) -> None:
        parent = folder.parent
        super().__init__(save_dir=str(parent.parent), name=parent.name, version=folder.name)
        self.resumes = resumes

    @property
    @rank_zero_experiment
    def experiment(self) -> Rows:
        """The writer."""
        if self._experiment is None:
            self._experiment = Rows(self.log_dir, keep=self.resumes)
        assert isinstance(self._experiment, Rows)
        return self._experiment

    @property
    def count(self) -> int:
        """The number of rows logged so far; 0 on all ranks but zero."""
        return 0 if getattr(rank_zero_only, "rank", 0) else self.experiment.count

    @rank_zero_only
    def truncate(self, count: int) -> None:
        """Keep the first ``count`` rows."""
        self.experiment.truncate(count)
