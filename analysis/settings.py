"""Tabulate the settings of rows, and the commands that repeat their runs."""

import zipfile
from pathlib import Path

from analysis.archive import unpack_command, unpacked_path
from analysis.labels import differing, short_names, value_text
from analysis.rows import Group
from analysis.runs import Run
from analysis.tables import Table


def settings(group: Group) -> Table | None:
    """Return the options in which the rows differ; ``None`` where there are none."""
    found = [row.any.identity.setting for row in group.rows]
    names = short_names(differing(found))
    if not names:
        return None
    lines = [
        [row.label, row.name, *("-" if setting.get(key) is None else _brief(setting[key]) for key in names)]
        for row, setting in zip(group.rows, found, strict=True)
    ]
    notes = [
        "Options in which rows differ, also those that a row's mode does not use. A dash marks one that the row does "
        "not have, or has not set."
    ]
    return Table("Settings", ["row", "name of its runs", *names.values()], lines, notes)


def _brief(value: object) -> str:
    if value == float("inf"):
        return "no limit"
    return f"{value:.4g}" if isinstance(value, float) else value_text(value)


def runs_table(group: Group) -> Table:
    """List every run behind the rows, with the command that repeats it."""
    lines = [
        [row.label, run.identity.seed, str(run.epochs), f"python train.py fit --config {config_of(run)}"]
        for row in group.rows
        for run in row.runs.values()
    ]
    folders = [run.folder for row in group.rows for run in row.runs.values()]
    archives = {Path(folder.root.filename or "") for folder in folders if isinstance(folder, zipfile.Path)}
    unpack = [unpack_command(archive) for archive in sorted(archives)]
    notes = [f"First unpack the runs: {', '.join(unpack)}"] if unpack else []
    notes += [f"Protocol {group.digest}: " + ", ".join(f"{key} {value}" for key, value in group.protocol.items())]
    return Table("Runs, and the command that repeats each", ["row", "seed", "epochs", "command"], lines, notes)


def config_of(run: Run) -> Path:
    """Return the path of a run's config, in an archive where it will be once unpacked."""
    return Path(str(unpacked_path(run.folder))) / "config.yaml"
