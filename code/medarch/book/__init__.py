"""What the cells of a chapter import: the ledger, exercises, records and the figures' house style."""
