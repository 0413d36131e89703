"""Real data that ships with installed packages, read with its checksum verified."""

from medarch.data.cards import DataCard

__all__ = ["DataCard"]
