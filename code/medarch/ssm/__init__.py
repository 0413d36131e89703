"""State space models: from the first recurrence to Mamba."""
