"""Models: importing this package registers backbones and meta-architectures with detectron2.

Letters in shapes, in all of this package:

B: images (where an encoder reads both, pairs of an image and a sentence).
E: expressions (sentences), those of all images of a batch one after the other.
L: tokens of a sentence, special tokens and padding included.
Q: queries of a decoder.
N: instances, or visual tokens where there are no instances.
C: channels.
"""

from . import asda, backbone, deris, risam, shared_ris, vipa  # noqa: F401  (registration)
from .segmenter import ReferringSegmenter

__all__ = ["ReferringSegmenter"]
