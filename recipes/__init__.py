"""What to do: recipes, model families and error classes, as data. No arrays here."""
