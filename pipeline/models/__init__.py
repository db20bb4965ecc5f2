"""Classifiers with their preprocessing inside, cut into spatial features and a head.

The zoo is `build`; a network of your own is wrapped with `classifier`.
"""

from pipeline.models.classifier import Classifier, classifier
from pipeline.models.weights import load_weights, save_weights, weights_sha256
from pipeline.models.zoo import build

__all__ = ["Classifier", "build", "classifier", "load_weights", "save_weights", "weights_sha256"]
