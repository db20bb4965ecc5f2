"""Classifiers with their preprocessing inside, cut into spatial features and a head.

The zoo is `build`; a network of your own is wrapped with `classifier`.
"""

from pipeline.models.bcos import BCosClassifier
from pipeline.models.classifier import Classifier, classifier
from pipeline.models.weights import fill, load_weights, save_weights, weights_sha256
from pipeline.models.zoo import build, start_from

Explainable = Classifier | BCosClassifier
"""What the zoo gives: takes images [B,3,H,W] in 0..1; has `net`, `classes`, `preprocess`, `map_size(image_size)`."""

__all__ = [
    "BCosClassifier",
    "Classifier",
    "Explainable",
    "build",
    "classifier",
    "fill",
    "load_weights",
    "save_weights",
    "start_from",
    "weights_sha256",
]
