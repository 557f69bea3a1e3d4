"""Shipped configurations; `opdlab fit -c quickstart` finds them by name."""
