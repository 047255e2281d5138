"""Measures real training steps, keeps the records, and holds predictions against them."""
