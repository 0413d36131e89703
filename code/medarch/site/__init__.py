"""What builds the book: execution, gates, pages, notebooks. Nothing here is imported by a chapter."""
