"""Real data sets by loader, splits, and worlds that generate data from a key."""

from mechlab.data.images import Images, load_digits, load_images, load_mnist, rotate_images
from mechlab.data.sources import MNIST_TEST, MNIST_TRAIN, CorruptData, MissingData, Source, available, locate
from mechlab.data.splits import split_indices

__all__ = [
    "MNIST_TEST",
    "MNIST_TRAIN",
    "CorruptData",
    "Images",
    "MissingData",
    "Source",
    "available",
    "load_digits",
    "load_images",
    "load_mnist",
    "locate",
    "rotate_images",
    "split_indices",
]
