"""Rounding methods: a float weight in, a `QuantizedLinear` out. Named in the recipe schema."""
