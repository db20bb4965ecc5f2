"""Stage 2: a student learns from the teacher's answers (paper Eq. 1-3)."""
