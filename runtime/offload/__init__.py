"""What lives off the device: an optimizer that host and device share, one that steps late, states in files."""
