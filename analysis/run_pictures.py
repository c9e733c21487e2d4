"""Draw the pictures of one run from its log."""

from pathlib import Path


def draw(folder: Path) -> None:
    """Write ``pictures/curves.png`` and, for AGA, ``second_passes.png``.

    The imports are in here, so that a run that is not drawn loads neither SciPy nor matplotlib.

    Args:
        folder: of the run, with its config and log.

    Raises:
        ValueError: there is no config.
    """
    from analysis.curves import curves, second_passes
    from analysis.rows import group
    from analysis.runs import Run
    from analysis.style import add_legend

    (compared,) = group([Run(folder)])
    if not compared.rows:
        return
    figures = {
        "curves": curves(compared, compared.metric, next(iter(compared.axes), "epoch")),
        "second_passes": second_passes(compared.rows[0]),
    }
    if figures["curves"] is not None:
        add_legend(figures["curves"])
    (folder / "pictures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / "pictures" / f"{name}.png", dpi=120, facecolor="white")
