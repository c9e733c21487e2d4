"""The CSV file of a run: nothing is lost when the process dies, and a resumed run goes on where its checkpoint was."""

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
    """Lightning's writer, with whole rows on the disk after every save, and a way back.

    Args:
        log_dir: folder of the file.
        keep: whether to go on after the rows that are there; otherwise they are deleted.
    """

    def __init__(self, log_dir: str, keep: bool) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.count = 0
        if not keep:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self.go_back(len(self._read()))

    def _check_log_dir_exists(self) -> None:
        """Leave the file alone, which Lightning would delete."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Take in a row."""
        super().log_metrics(metrics_dict, step)
        self.count += 1

    def save(self) -> None:
        """Bring the rows since the last save to the disk: they are appended, or with new columns all rewritten."""
        if not self.metrics:
            return
        try:
            if self._record_new_keys() or not self.path.exists():
                self._write([*(self._read() if self.path.exists() else []), *self.metrics])
            else:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, fieldnames=self.metrics_keys).writerows(self.metrics)
                    _finish(file)
        except OSError as error:
            # Where the disk is full, the system does not say which file it was.
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            # Rows that could not be written once are not tried again in the middle of leaving.
            self.metrics = []

    def go_back(self, count: int) -> None:
        """Forget all but the first ``count`` rows, and columns that only the others had."""
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
            _finish(file)
        os.replace(partial, self.path)


def _finish(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger for a run folder that a run may go on with.

    Args:
        folder: of the run.
        resumes: whether the rows in it are this run's.
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
        """The rows logged so far; 0 on all processes but the first."""
        return 0 if getattr(rank_zero_only, "rank", 0) else self.experiment.count

    @rank_zero_only
    def go_back(self, count: int) -> None:
        """Forget all but the first ``count`` rows."""
        self.experiment.go_back(count)
