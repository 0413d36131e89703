"""Models, benchmarks and machinery of the book on emerging architectures for medical AI."""
