"""Test the tables of settings and of runs against the configs of the runs."""

import shlex
from pathlib import Path

import yaml

from analysis.rows import Group, group
from analysis.runs import read
from analysis.settings import runs_table, settings


def test_settings_are_those_in_which_rows_differ(corners: Path) -> None:
    (entry,) = group(read([corners])[0])
    table = settings(entry)
    assert table is not None and list(table.columns) == ["row", "name of its runs", "mode", "energy", "geometry"]
    for row, line in zip(entry.rows, table.rows, strict=True):
        config = yaml.safe_load((row.any.shown / "config.yaml").read_text())
        options = config["model"]["init_args"]["optimizer"]["init_args"]
        # Both switches are options that runs from before they existed lack: on is no setting.
        on = {True: "-", False: "False"}
        assert line == [row.label, row.name, options["mode"], on[options["energy"]], on[options["geometry"]]]


def test_a_setting_that_a_row_does_not_have_is_a_dash(groups: list[Group]) -> None:
    table = settings(groups[0])
    assert table is not None
    lines = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    assert (lines["grok_adamw"]["rho"], lines["grok_aga"]["rho"]) == ("-", "0.1")
    assert (lines["grok_adamw"]["amsgrad"], lines["grok_aga"]["amsgrad"]) == ("False", "-")
    assert lines["aga of search"]["name of its runs"] == "aga of search"
    # Seeds, and whatever is equal, are no settings.
    assert not {"seed", "p", "width", "max_epochs"} & set(table.columns)


def test_a_single_row_has_no_table_of_settings(groups: list[Group]) -> None:
    assert len(groups[1].rows) == 1
    assert settings(groups[1]) is None


def test_every_run_has_the_command_that_repeats_it(groups: list[Group]) -> None:
    table = runs_table(groups[0])
    lines = iter(table.rows)
    for row in groups[0].rows:
        for seed in row.runs:
            label, shown, epochs, command = next(lines)
            assert (label, shown, epochs) == (row.label, seed, "6")
            *words, config = shlex.split(command)
            assert words == ["python", "train.py", "fit", "--config"]
            assert str(yaml.safe_load(Path(config).read_text())["seed_everything"]) == seed
    assert next(lines, None) is None
    assert "data.train_fraction 0.3" in table.notes[0] and groups[0].digest in table.notes[0]
