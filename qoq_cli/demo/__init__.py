"""The embedded model `tiny`, its texts, and how they were made."""
