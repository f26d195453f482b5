"""The file format: headers, names, tensor classes, parts, the atomic writer. Knows nothing about merging or tuning.

Importing it loads neither torch nor transformers.
"""

from ktmerge.checkpoints.alignment import Alignment, align
from ktmerge.checkpoints.checkpoint import Checkpoint, content_digest, header_digest
from ktmerge.checkpoints.classes import TensorClass, tensor_class
from ktmerge.checkpoints.expressions import PartExpression
from ktmerge.checkpoints.files import copy_files, refuse_overlap
from ktmerge.checkpoints.header import FilePlan, TensorInfo
from ktmerge.checkpoints.hub import resolve
from ktmerge.checkpoints.opening import open_model
from ktmerge.checkpoints.parts import Parts
from ktmerge.checkpoints.reader import Reader, TensorReader
from ktmerge.checkpoints.writer import Writer

__all__ = [
    "Alignment",
    "Checkpoint",
    "FilePlan",
    "PartExpression",
    "Parts",
    "Reader",
    "TensorClass",
    "TensorInfo",
    "TensorReader",
    "Writer",
    "align",
    "content_digest",
    "copy_files",
    "header_digest",
    "open_model",
    "refuse_overlap",
    "resolve",
    "tensor_class",
]
