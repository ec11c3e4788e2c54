"""Importing the package repairs torchvision, which the tests import too."""

import vit  # noqa: F401
