"""Training a teacher on labels, guided to look at the object if asked."""
