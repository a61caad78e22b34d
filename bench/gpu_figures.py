"""A measured number and its bar, for `bench.gpu_check`."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured number; `at_most` or `at_least` is its bar, if it has one."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    def as_json(self) -> dict[str, Any]:
        """With the bar in words and whether it is met; NaN meets none."""
        figure: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.at_most is not None:
            figure |= {"bar": f"<= {self.at_most:.4g}", "met": self.value <= self.at_most}
        if self.at_least is not None:
            figure |= {"bar": f">= {self.at_least:.4g}", "met": self.value >= self.at_least}
        return figure
