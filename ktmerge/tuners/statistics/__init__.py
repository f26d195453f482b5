"""What methods want to know of a model's data: inputs of its linear maps and Fisher information, by running it.

Importing it loads neither torch nor transformers.
"""

from ktmerge.tuners.statistics.measure import StatisticsReport, measure

__all__ = ["StatisticsReport", "measure"]
