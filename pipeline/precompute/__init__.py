"""Stage 1: the teacher's answers for every image, and what storing and freezing them costs."""
