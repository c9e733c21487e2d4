"""Write durations, counts and large quantities for people."""

_DURATIONS = (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def duration(seconds: float) -> str:
    """Return such as "0.84 s", "42 s", "2 min 5 s", "3 h 20 min" or "2 d 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    for unit, size, part, part_size in _DURATIONS:
        if round(seconds) >= size:
            number, rest = divmod(round(seconds / part_size), size // part_size)
            return f"{number} {unit} {rest} {part}" if rest else f"{number} {unit}"
    return f"{seconds:.0f} s"


def count(number: int, noun: str) -> str:
    """Return such as "1 epoch" or "2,000 epochs"; the noun's plural ends with an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def quantity(number: float, unit: str, largest: float | None = None) -> str:
    """Return three digits with the unit's prefix, such as "5.17 TFLOP"; "-" for NaN.

    The prefix is that of ``largest``, if given, so that the numbers of a column have the same.
    """
    if number != number:
        return "-"
    rounded, power = float(f"{number if largest is None else largest:.3g}"), 0
    while abs(rounded) >= 1000 and power < len(_PREFIXES) - 1:
        rounded, power = rounded / 1000, power + 1
    return f"{number / 1000**power:.3g} {_PREFIXES[power]}{unit}"
