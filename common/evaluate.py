"""The meters of both benchmarks under the name that scripts outside this repository import them by."""

from common.metrics import OccupancyMeter
from common.report.occupancy import SscMeter

__all__ = ["OccupancyMeter", "SscMeter"]
