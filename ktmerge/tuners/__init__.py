"""base + data -> tuned: reads data, trains every weight, saves under the base's names.

Importing it loads neither torch nor transformers.
"""

from ktmerge.tuners.preview import PreviewSample, preview
from ktmerge.tuners.report import FinetuneReport
from ktmerge.tuners.train import finetune

__all__ = ["FinetuneReport", "PreviewSample", "finetune", "preview"]
