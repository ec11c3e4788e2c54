"""Decoding pictures, and the look at some of them before a training: the house's, under this package's names."""

from common.data.pictures import check as check_images
from common.data.pictures import read as read_image

__all__ = ["check_images", "read_image"]
