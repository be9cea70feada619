"""Shared instruments: models with known laws, drafters of every kind, checks that can fail."""
