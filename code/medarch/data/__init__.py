"""Real data that ships with installed packages, read with its checksum verified."""
