"""Keep torchmetrics from importing heavy packages only because they are installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core import imports
from lightning_utilities.core.imports import RequirementCache

_HEAVY = ("torchvision", "transformers", "matplotlib", "scipy")


@contextmanager
def without_heavy_packages() -> Iterator[None]:
    """Treat heavy packages as not installed within the block.

    Otherwise torchmetrics imports them at every start, which takes three seconds, for metrics that are not used
    here. A task that needs such a package imports it itself.
    """
    check_requirement, package_available = RequirementCache._check_requirement, imports.package_available

    def check_light_requirement(requirement: RequirementCache) -> None:
        check_requirement(requirement)
        if (requirement.requirement or "").startswith(_HEAVY):
            requirement.available = False

    def light_package_available(package_name: str) -> bool:
        return package_name not in _HEAVY and package_available(package_name)

    RequirementCache._check_requirement = check_light_requirement  # type: ignore[method-assign, assignment]
    imports.package_available = light_package_available  # type: ignore[assignment]
    try:
        yield
    finally:
        RequirementCache._check_requirement = check_requirement  # type: ignore[method-assign]
        imports.package_available = package_available
