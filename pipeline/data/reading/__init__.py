"""What the sources read with: files, photographs, annotations, names."""
