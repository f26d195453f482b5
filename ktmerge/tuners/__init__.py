"""base + data -> tuned: reads data, trains every weight, saves under the base's names.

Importing it loads neither torch nor transformers.
"""

from ktmerge.tuners.estimate import Estimate, estimate
from ktmerge.tuners.preview import PreviewSample, preview
from ktmerge.tuners.report import FinetuneReport
from ktmerge.tuners.train import finetune

__all__ = ["Estimate", "FinetuneReport", "PreviewSample", "estimate", "finetune", "preview"]
