"""The dashboard: shows what the floors below compute. ``data`` shapes rows, ``charts`` draws them, ``app`` is the page."""
