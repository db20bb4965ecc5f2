"""Paired augmentation: one geometry for an image and its map."""
