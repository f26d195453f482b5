"""A model's processor, as its own files describe it; of one that takes videos, too, what images need is enough.

Video processors of transformers need torchvision, whose usual builds don't fit every torch and then break all imports
of models. Image processors have a twin that works with pillow alone, which transformers takes where there is no
torchvision. So where it is missing or broken, a processor is loaded with a stand-in for its video half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.errors import UsageError, first_line

_EXTRA = "pip install 'ktmerge[vision]'"


def load_processor(base: Path) -> Any:
    """The processor beside the weights in ``base``.

    Raises:
        UsageError: there is none that takes images, or a package it needs is not installed.
    """
    try:
        import PIL.Image  # noqa: F401 - only whether it is there
    except ImportError:
        raise UsageError(f"images need pillow, which is not installed: {_EXTRA}") from None
    with quiet_transformers():
        from transformers import AutoProcessor

        loader: Any = AutoProcessor
        try:
            with _without_videos():
                processor = loader.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        except ImportError as error:
            missing = error.name or first_line(error)
            raise UsageError(f"{base}: its processor needs a package that is not there ({missing}): {_EXTRA}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{base}: has no processor that takes images: {first_line(error)}") from None
    if not hasattr(processor, "image_processor") or not isinstance(getattr(processor, "image_token", None), str):
        raise UsageError(f"{base}: has no processor that takes images, but a {type(processor).__name__}.")
    return processor


@contextmanager
def _without_videos() -> Iterator[None]:
    """Where torchvision is not available, processors get a stand-in for their video processor."""
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available():
        yield
        return
    from transformers import processing_utils
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.models.auto import video_processing_auto

    loader: Any = video_processing_auto.AutoVideoProcessor
    kinds: Any = processing_utils.MODALITY_TO_BASE_CLASS_MAPPING
    proper, kind = loader.__dict__["from_pretrained"], kinds["video_processor"]
    mixin: Any = ImageProcessingMixin
    stand_in = type("NoVideos", (mixin,), {"num_frames": None, "fps": None})
    loader.from_pretrained = staticmethod(lambda *args, **kwargs: stand_in())
    kinds["video_processor"] = mixin.__name__  # the proper class cannot be looked up without torchvision
    try:
        yield
    finally:
        loader.from_pretrained, kinds["video_processor"] = proper, kind
